"""Searches, layers and trainings of many runs in one picture."""

from __future__ import annotations

import json

from studies import finished, write_run

from slm_pipeline.report import per_run
from slm_pipeline.report.runs import read_runs
from slm_pipeline.report.study import read_study


def test_searches_strips_and_trainings_are_drawn_once_for_each_that_differs(tmp_path, drawn):
    curve = [{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 2.5}]
    for job, (threshold, recovery) in enumerate([(0.9, "lora"), (0.9, "full"), (0.8, "lora")]):
        result = finished(tmp_path, 24 if threshold == 0.9 else 20, 20.0)
        result["recovery"] = {"name": recovery, "num_tokens": 10, "seconds": 1.0, "loss": "nats"}
        store = tmp_path / "store" / str(job)
        result["stages"]["recover"] = {"seconds": 1.0, "reused": False, "peak_memory_gb": 1.0, "path": str(store)}
        folder = tmp_path / "t" / str(job)
        write_run(folder, [f"threshold.value={threshold}", f"recovery={recovery}"], result)
        steps = [{"low": 27, "high": 28, "similarity": threshold, "accepted": True}]
        (folder / "plan.json").write_text(json.dumps({"threshold": threshold, "scores": {"steps": steps}}))
        store.mkdir(parents=True)
        logits = [{"step": 2, "logit_eval_loss": 0.5, "learning_rate": 1e-3}] if job == 1 else []
        (store / "curve.json").write_text(json.dumps([*({**row, "loss": 3.0 + job} for row in curve), *logits]))
    per_run.draw(read_study(tmp_path / "t"), tmp_path)
    (traces,) = drawn["search_traces"]["arguments"]
    assert [(trace.label, trace.threshold) for trace in traces] == [("0.9", 0.9), ("0.8", 0.8)]
    (strips,) = drawn["layer_strips"]["arguments"]
    assert [(strip.label, len(strip.layer_groups), strip.num_layers) for strip in strips] == [
        ("0.9", 24, 30),
        ("0.8", 20, 30),
    ]
    (trainings,) = drawn["training_loss"]["arguments"]
    assert [(t.panel, t.label, t.loss) for t in trainings] == [
        ("lora", "0.9", "nats"),
        ("lora", "0.8", "nats"),
        ("full", "0.9", "nats"),
        ("full", "0.9", "nats, whole model"),
    ]
    assert trainings[3].rows == [{"step": 2, "eval_loss": 0.5, "learning_rate": 1e-3}]
    assert trainings[1].rows[0] == {"step": 1, "loss": 5.0}


def test_runs_that_no_option_tells_apart_have_labels_and_looks_of_their_own(tmp_path, drawn):
    """Three runs, the same options twice; ten values in a label would be none."""
    for job, seed in enumerate((0, 0, 1)):
        folder = tmp_path / "s" / str(job)
        write_run(
            folder, [f"seed={seed}", *(f"method.a{i}={seed}" for i in range(10))], finished(tmp_path, 20 + job, 9.0)
        )
        steps = [{"low": 27, "high": 28, "similarity": 0.9 - job / 10, "accepted": True}]
        (folder / "plan.json").write_text(json.dumps({"scores": {"steps": steps}}))
    per_run.draw(read_study(tmp_path / "s"), tmp_path)
    (traces,) = drawn["search_traces"]["arguments"]
    assert [trace.label for trace in traces] == ["job 0", "job 1", "job 2"]
    assert len({trace.look for trace in traces}) == 3


def test_a_training_whose_result_was_cleaned_away_is_read_from_the_log(tmp_path):
    result = finished(tmp_path, 24, 20.0)
    result["stages"]["recover"] = {
        "seconds": 1.0,
        "reused": False,
        "peak_memory_gb": 1.0,
        "path": str(tmp_path / "gone"),
    }
    write_run(tmp_path / "run", [], result)
    rows = [
        {"time": "x", "stage": "merge", "step": 0, "similarity": 0.9},
        {"time": "x", "stage": "recover", "step": 1, "loss": 3.0},
        {"time": "x", "stage": "recover", "num_tokens": 5},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = read_runs(tmp_path / "run")
    assert per_run.training_rows(run) == [rows[1]]
