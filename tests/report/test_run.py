"""The tables of one run and of many, from a summary small enough to check by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from slm_pipeline.errors import UserError
from slm_pipeline.report import (
    WIDTH,
    Table,
    flat_metrics,
    read_runs,
    score_table,
    study_table,
    write_study,
    write_summary_md,
)


def task(score: float, stderr: float, limit: int | None = 20) -> dict[str, Any]:
    return {
        "metric": "acc",
        "score": score,
        "stderr": stderr,
        "num_examples": limit or 3270,
        "limit": limit,
        "batch_size": 16,
        "lm_eval_version": "0.4.13",
    }


def perplexity(value: float, **changes: Any) -> dict[str, Any]:
    return {"perplexity": value, "num_tokens": 8184, "window": 1024, "stride": None, "bos": False, **changes}


@pytest.fixture
def summary(tmp_path) -> dict[str, Any]:
    return {
        "format": 1,
        "name": "first",
        "command": "slm name=first pruning_ratio=r20 'model.path=/a b'",
        "model": "smollm2_135m",
        "method": "slm",
        "threshold": 0.81,
        "seed": 7,
        "num_layers": {"dense": 30, "pruned": 24},
        "parameters": {"dense": 134515008, "pruned": 113276160},
        "layer_groups": [[i] for i in range(20)] + [[20, 21, 22, 23]] + [[24], [25]] + [[29]],
        "dropped": [26, 27, 28],
        "metrics": {
            "dense": {
                "zero_shot": {"boolq": 60.0, "piqa": 70.0, "average": 65.0},
                "perplexity": {"bundled": perplexity(15.234)},
            },
            "pruned": {"perplexity": {"bundled": perplexity(123456.0)}},
        },
        "details": {"evaluate_dense": {"zero_shot": {"boolq": task(60.0, 11.2), "piqa": task(70.0, 6.0)}}},
        "stages": {
            "calibrate": {"seconds": 3.21, "reused": True, "peak_memory_gb": 1.5, "path": str(tmp_path / "c")},
            "merge": {"seconds": 30.0, "reused": False, "peak_memory_gb": 2.25, "path": str(tmp_path / "m")},
            "evaluate_dense": {"seconds": 12.0, "reused": False, "peak_memory_gb": 1.0, "path": str(tmp_path / "e")},
        },
        "checkpoint": str(tmp_path / "m" / "model"),
        "warnings": ["the calibration text is also an evaluation corpus"],
        "pictures": ["layers.png", "layers.svg"],
    }


def test_text_holds_the_run_in_lines_that_fit_a_terminal(tmp_path, summary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "run" / "plan.json").write_text("{}")
    text = write_summary_md(tmp_path / "run", summary)
    assert text.splitlines()[:12] == [
        "first: smollm2_135m, slm, threshold 0.81, seed 7",
        "layers 30 -> 24 (-20.0%), parameters 134.5M -> 113.3M (-15.8%)",
        "",
        "Results (scores in percent, perplexity: lower is better)",
        "  model    boolq   piqa  average  perplexity bundled",
        "  dense     60.0   70.0     65.0               15.23",
        "          +-11.2  +-6.0    +-6.4",
        "  pruned                                    1.23e+05",
        "",
        "How it was measured",
        "  dense: zero-shot: lm-eval 0.4.13, the first 20 examples of each task, batch size 16",
        "  perplexity bundled: 8184 tokens scored, windows of 1024 tokens, not overlapping, no BOS",
    ]
    assert "0-19 {20-23} 24-25 29" in text
    assert "dropped: 26, 27, 28" in text
    assert "  merge              30.0  no         2.25  m\n" in text
    assert "  calibrate           3.2  yes        1.50  c\n" in text
    assert "checkpoint: m/model\n" in text
    assert "plan: run/plan.json\n" in text
    assert "pictures: layers.png, layers.svg\n" in text
    assert "wandb sync run/wandb/offline-run-1\n" in text
    assert summary["warnings"][0] in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()


def test_markdown_has_the_same_and_the_details(tmp_path, summary):
    write_summary_md(tmp_path, summary)
    markdown = (tmp_path / "summary.md").read_text()
    assert markdown.startswith("# first: smollm2_135m, slm, threshold 0.81, seed 7\n\nlayers 30 -> 24 (-20.0%)")
    assert "| dense  |   60.0 |  70.0 |    65.0 |              15.23 |\n" in markdown
    assert "| dense | boolq | 60.00 |  11.20 | acc    |       20 |\n" in markdown
    assert f"```bash\n{summary['command']}\n```\n" in markdown
    assert f"- checkpoint: {tmp_path}/m/model\n" in markdown


def test_small_limits_are_called_out_and_whole_tasks_are_not(tmp_path, summary):
    warning = "20 examples a task: +-11 points (one standard error) on a score; use evaluation=zero_shot"
    assert warning in write_summary_md(tmp_path, summary)
    summary["details"]["evaluate_dense"]["zero_shot"] = {"boolq": task(60.0, 0.9, limit=None)}
    text = write_summary_md(tmp_path, summary)
    assert "use evaluation=zero_shot" not in text
    assert "dense: zero-shot: lm-eval 0.4.13, all examples, batch size 16" in text


def test_settings_that_differ_are_said_for_each_model(tmp_path, summary):
    summary["metrics"]["pruned"]["perplexity"]["bundled"] = perplexity(20.0, stride=512, bos=True, split="test")
    text = write_summary_md(tmp_path, summary)
    assert "dense: perplexity bundled: 8184 tokens scored, windows of 1024 tokens, not overlapping, no BOS" in text
    scored = "windows of 1024 tokens, the last 512 tokens of each scored, BOS before each"
    assert f"pruned: perplexity bundled (test): 8184 tokens scored, {scored}" in " ".join(text.split())


def test_what_was_not_run_is_absent(tmp_path, summary):
    for key in ("metrics", "details", "threshold", "num_layers", "parameters", "layer_groups", "dropped", "checkpoint"):
        del summary[key]
    text = write_summary_md(tmp_path, {**summary, "warnings": [], "pictures": []})
    assert text.startswith("first: smollm2_135m, slm, seed 7\nnothing merged in this run\n\nStages\n")
    for word in ("Results", "measured", "Layers", "Recovery", "Warnings", "checkpoint", "picture", "W&B", "Efficiency"):
        assert word not in text
        assert word not in (tmp_path / "summary.md").read_text()


def test_a_threshold_that_may_not_be_the_highest_is_called_that(tmp_path, summary):
    hint = "threshold 0.81 reaches the pruning ratio, but a higher one may too"
    assert hint in write_summary_md(tmp_path, {**summary, "threshold_is_highest": False})
    assert hint not in write_summary_md(tmp_path, {**summary, "threshold_is_highest": True})


def test_recovery_lists_its_numbers(tmp_path, summary):
    summary["recovery"] = {"name": "lora", "options": {}, "num_tokens": 123456, "eval_loss": 2.34567}
    assert "Recovery\n  lora: num tokens 123456, eval loss 2.346\n" in write_summary_md(tmp_path, summary)


def test_unknown_standard_errors_are_left_out(tmp_path, summary):
    summary["details"]["evaluate_dense"]["zero_shot"]["piqa"]["stderr"] = None
    lines = write_summary_md(tmp_path, summary).splitlines()
    assert lines[lines.index("  dense     60.0  70.0     65.0               15.23") + 1] == "          +-11.2"
    assert "| dense | piqa  | 70.00 |        | acc    |       20 |" in (tmp_path / "summary.md").read_text()


def test_numbers_for_a_server_to_compare(summary):
    columns, rows = score_table(summary)
    assert columns == ["model", "task", "score", "stderr", "metric", "examples"]
    assert rows == [["dense", "boolq", 60.0, 11.2, "acc", 20], ["dense", "piqa", 70.0, 6.0, "acc", 20]]
    assert flat_metrics(summary) == {
        "num_layers": 24,
        "parameters": 113276160,
        "dense/boolq": 60.0,
        "dense/piqa": 70.0,
        "dense/average": 65.0,
        "dense/perplexity/bundled": 15.234,
        "pruned/perplexity/bundled": 123456.0,
    }


def test_efficiency_has_a_row_for_each_model(tmp_path, summary):
    settings = {
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 1,
        "output_len": 128,
        "num_runs": 30,
        "num_warmup": 10,
    }
    speeds = {"dense": (3.2, 40.0), "pruned": (2.5, 51.25)}
    summary["efficiency"] = {
        target: {"latency_seconds": s, "tokens_per_second": n, "weights_gb": 0.538, "peak_memory_gb": None, **settings}
        for target, (s, n) in speeds.items()
    }
    text = write_summary_md(tmp_path, summary)
    assert (
        "  model   latency in s  tokens per s  weights in GB  peak memory in GB\n"
        "  dense            3.2            40          0.538\n"
        "  pruned           2.5         51.25          0.538\n"
    ) in text
    assert "efficiency: cpu, float32, batch size 1, 128 new tokens, mean of 20 runs after 10 to warm up\n" in text


def test_a_wide_table_goes_on_below_and_pipes_are_escaped():
    table = Table(["model", "a" * 60, "b" * 60], [["x", "1", "2|3"], ["y", "", "4"]])
    assert table.text() == (
        f"  model  {'a' * 60}\n  x      {'1'.rjust(60)}\n  y\n  model  {'b' * 60}\n"
        f"  x      {'2|3'.rjust(60)}\n  y      {'4'.rjust(60)}\n"
    )
    assert "2\\|3 |\n" in table.markdown()


@pytest.fixture
def sweep(tmp_path, summary) -> Path:
    """Jobs 0, 1, 2 and 10: finished twice, failed, unfinished."""
    directory = tmp_path / "ratio"
    for job in (10, 2, 1, 0):
        (directory / str(job) / ".hydra").mkdir(parents=True)
        (directory / str(job) / ".hydra" / "overrides.yaml").write_text(f"- model=tiny\n- pruning_ratio=r{job}\n")
        (directory / str(job) / "store" / ".hydra").mkdir(parents=True)  # no run of its own
    for job, layers, value in ((0, 27, 30.5), (2, 24, 20.25)):
        done = copy.deepcopy(summary)
        done["num_layers"]["pruned"] = layers
        scores = {"zero_shot": {"average": layers + 0.5}, "perplexity": {"bundled": perplexity(value)}}
        done["metrics"]["pruned"] = scores
        (directory / str(job) / "summary.json").write_text(json.dumps(done))
    failure = {"error": "ratio=2 must be\nbelow 1", "type": "UserError"}
    (directory / "1" / "failure.json").write_text(json.dumps(failure))
    return directory


def cells(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in [rows[0], *rows[2:]]]


def test_read_runs_finds_every_job_in_order(sweep):
    runs = read_runs(sweep)
    assert [(run["job"], run["status"]) for run in runs] == [
        ("0", "done"),
        ("1", "FAILED"),
        ("2", "done"),
        ("10", "unfinished"),
    ]
    assert runs[1]["reason"] == "ratio=2 must be below 1"
    assert runs[2]["overrides"] == ["model=tiny", "pruning_ratio=r2"]
    assert runs[2]["summary"]["num_layers"]["pruned"] == 24
    assert [run["job"] for run in read_runs(sweep / "2")] == ["2"]
    with pytest.raises(UserError, match="is not a directory of runs"):
        read_runs(sweep / "absent")


def test_study_has_a_row_for_each_job_and_says_shared_things_once(sweep):
    text = write_study(sweep)
    assert (sweep / "summary.md").read_text() == text
    assert text.startswith("# ratio: 4 jobs, 2 done, 1 FAILED, 1 unfinished\n")
    assert "All jobs: `model=tiny`\n" in text
    assert "Dense model: perplexity bundled 15.23, average 65.0\n" in text
    assert "20 examples a task: +-11 points" in text
    numbers = ["layers", "parameters", "perplexity bundled pruned", "average pruned", "seconds"]
    assert cells(text) == [
        ["job", "overrides", *numbers, "status"],
        ["0", "pruning_ratio=r0", "27", "113.3M", "30.50", "27.5", "42", "done"],
        ["1", "pruning_ratio=r1", "", "", "", "", "", "FAILED: ratio=2 must be below 1"],
        ["2", "pruning_ratio=r2", "24", "113.3M", "20.25", "24.5", "42", "done"],
        ["10", "pruning_ratio=r10", "", "", "", "", "", "unfinished"],
    ]


def test_study_sorts_the_best_first_and_the_failed_last(sweep):
    runs = read_runs(sweep)
    order = {name: [row[0] for row in cells(study_table(runs, name))[1:]] for name in ("average pruned", "layers")}
    assert order == {"average pruned": ["0", "2", "1", "10"], "layers": ["2", "0", "1", "10"]}
    with pytest.raises(UserError, match="sort_by='accuracy' is not a column .* layers, parameters, perplexity bundled"):
        study_table(runs, "accuracy")
    assert "Sorted by layers, best first" in study_table(runs, "layers")


def test_a_study_of_failures_alone_is_a_table_and_an_empty_one_an_error(sweep, tmp_path):
    assert study_table(read_runs(sweep)[1:2], "layers") == study_table(read_runs(sweep)[1:2])
    assert cells(study_table(read_runs(sweep)[1:2])) == [
        ["job", "overrides", "status"],
        ["1", "model=tiny pruning_ratio=r1", "FAILED: ratio=2 must be below 1"],
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no runs in .*empty"):
        write_study(tmp_path / "empty")
