"""Folders of runs in any state: what can be read is reported, what cannot is a row that says why."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import finished, write_run

from slm_pipeline.commands.study import status
from slm_pipeline.errors import UserError
from slm_pipeline.report import damage, documents, page, per_run
from slm_pipeline.report.damage import Damaged
from slm_pipeline.report.runs import read_runs
from slm_pipeline.report.study import read_study
from slm_pipeline.report.write import write_report


def recovered(folder: Path, layers: int, value: float) -> dict[str, Any]:
    """The summary of a run with everything in it that a report shows."""
    done = finished(folder, layers, value)
    store = folder / "store" / str(layers)
    store.mkdir(parents=True, exist_ok=True)
    (store / "curve.json").write_text(json.dumps([{"step": 1, "loss": value}, {"step": 2, "eval_loss": value - 1}]))
    done["repair"] = {
        "name": "refit", "options": {}, "num_tokens": 8, "seconds": 1.0, "changes": {"lines": ["of the repair"],
        "marks": [{"label": "new weights", "layers": [2], "part": "whole"}], "idle_parameters": 0},
        "divergence": {name: {"kl": 0.5, "same_top_1": 0.5} for name in ("pruned", "repaired")},
    }  # fmt: skip
    done["recovery"] = {"name": "lora", "options": {}, "num_tokens": 10, "seconds": 3.0, "loss": "nats"}
    done["stages"]["recover"] = {"seconds": 1.0, "reused": False, "peak_memory_gb": 1.0, "path": str(store)}
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 1, "output_len": 8, "num_runs": 3, "num_warmup": 1}
    done["efficiency"] = {"pruned": {"tokens_per_second": 10.0 * value, "latency_seconds": None, **settings}}
    done["sublayers"] = {"attention": [3], "mlp": []}
    done["windows"] = {"evaluations": 3, "evaluated": 2}
    return done


@pytest.fixture
def three(tmp_path):
    """Three runs with a recovery; the last one's method has no merge rule."""
    folder = tmp_path / "three"
    for job, (overrides, rule) in enumerate(
        [(["method.merge_rule=mean"], "mean"), ([], "official"), (["method=shortgpt"], None)]
    ):
        config = {"method": {"merge_rule": rule} if rule else {}}
        method = "slm" if rule else "shortgpt"
        summary = recovered(tmp_path, 24 - job, 20.0 + job)
        write_run(folder / str(job), overrides, summary, config=config, choices={"method": method, "recovery": "lora"})
        steps = [{"similarity": 0.9 - job / 10, "accepted": True}]
        (folder / str(job) / "plan.json").write_text(json.dumps({"scores": {"steps": steps}, "threshold": 0.8}))
    return folder


def test_an_option_that_some_runs_lack_is_drawn(three, tmp_path, caplog):
    study = read_study(three)
    assert list(study.options) == ["method.merge_rule", "method"]
    written = write_report(study, tmp_path / "out")
    names = {
        "layer_strips",
        "metric",
        "metric_by_speed",
        "score_by_layers",
        "score_by_speed",
        "search_traces",
        "training_loss",
    }
    assert {path.stem for path in written.pictures} == names
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "summary.json is empty"),
        ('{"format": 1, "na', "summary.json is cut off, or not JSON"),
        ("[]", "summary.json: it is [], not an object"),
        ("null", "summary.json: it is null, not an object"),
        ('{"a": 1}', "summary.json: stages is not there"),
        ('{"stages": {"merge": {"seconds": NaN, "reused": true}}}', "stages.merge.seconds is NaN, not a number"),
        ('{"stages": {}, "dropped": [1, "x"]}', 'summary.json: dropped[1] is "x", not a layer\'s index'),
        ("[" * 100_000, "summary.json is cut off, or not JSON"),
        (b"\xff\xfe{", "summary.json is not UTF-8"),
        ("folder", "summary.json is not a file"),
        ("link", "summary.json is a dangling link"),
    ],
)
def test_a_damaged_summary_is_a_row_that_says_why(content, reason, three, tmp_path):
    file = three / "1" / "summary.json"
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif content == "link":
        file.symlink_to("gone")
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    runs = read_runs(three)
    assert [run.status for run in runs] == ["done", "unreadable", "done"]
    assert reason in runs[1].reason
    assert status(runs, 0.0).startswith("3 jobs: 2 done, 1 unreadable\n")
    write_report(read_study(three), tmp_path, ["csv"])
    assert reason in (tmp_path / "summary.csv").read_text().replace('""', '"')


def test_what_lies_around_a_summary_may_be_lost(three, tmp_path, caplog):
    (three / "0" / ".hydra" / "overrides.yaml").write_text("{a: [")
    (three / "1" / ".hydra" / "hydra.yaml").write_text("- 1\n")
    (three / "1" / ".hydra" / "config.yaml").write_bytes(b"\xff")
    (three / "2" / "plan.json").write_text('{"scores": 3}')
    (tmp_path / "store" / "24" / "curve.json").write_text("[3]")
    (three / "study.json").write_text("{")
    runs = read_runs(three)
    assert [run.status for run in runs] == ["done", "done", "done"]
    written = write_report(read_study(three), tmp_path / "out")
    assert {"search_traces", "training_loss"} <= {path.stem for path in written.pictures}
    for said in (
        "overrides.yaml is cut off, or not YAML",
        "config.yaml is not UTF-8",
        "plan.json: scores is 3, not an",
    ):
        assert said in caplog.text
    assert "curve.json: [0] is 3, not an object" in caplog.text
    assert f"{three}/study.json is damaged" in caplog.text


def test_a_log_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"stage": "recover", "step": 1, "loss": 2.0}\n3\n{"stage": "merge"}\n{"stage": "recover", "ste')
    assert damage.read_lines(file, damage.LOGGED_ROW) == [{"stage": "recover", "step": 1, "loss": 2.0}]
    file.unlink()
    file.mkdir()
    with pytest.raises(Damaged, match=r"metrics\.jsonl is not a file"):
        damage.read_lines(file, damage.LOGGED_ROW)


def test_a_plot_that_fails_does_not_cost_the_report(three, tmp_path, monkeypatch, caplog):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("slm_pipeline.show.curves.against", fails)
    monkeypatch.setattr(per_run, "layer_strips", fails)
    written = write_report(read_study(three), tmp_path / "out")
    assert {path.stem for path in written.pictures} == {
        "metric_by_speed",
        "score_by_speed",
        "search_traces",
        "training_loss",
    }
    assert "no plot of the metric: RuntimeError: no font" in caplog.text
    assert "no plot of the layers: RuntimeError: no font" in caplog.text
    assert "<h1>three</h1>" in (tmp_path / "out" / "report.html").read_text()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400),
    st.lists(st.integers(-3, 40), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value: the keys that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, below in inner for place in places(below, (*here, key)))]


def test_a_name_with_a_break_in_a_summary_is_one_line_of_the_reason(tmp_path):
    write_run(tmp_path / "s" / "1", ["method=laco"], None)
    (tmp_path / "s" / "1" / "summary.json").write_text(json.dumps({"metrics": {"a\nb": 0}}))
    (run,) = read_study(tmp_path / "s").runs
    assert (run.status, "\n" in run.reason) == ("unreadable", False)


@given(data=st.data())
def test_no_value_in_a_summary_or_a_configuration_costs_the_report(data):
    """Each example puts something else in one to three places of one run's files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder / "s" / "0", ["method=slm"], recovered(folder, 24, 20.0), choices={"method": "slm"})
        summary = recovered(folder, 22, 25.0)
        config = {
            "name": "s",
            "seed": 1,
            "study": {"question": "q", "metric": "layers", "x": "seed", "series": ["seed"]},
        }
        files: list[Any] = [copy.deepcopy(summary), copy.deepcopy(config)]
        for _ in range(data.draw(st.integers(1, 3))):
            number = data.draw(st.integers(0, 1))
            place = data.draw(st.sampled_from(places(files[number])))
            value = data.draw(VALUES)
            if not place:
                files[number] = value
                continue
            inner = files[number]
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
        write_run(folder / "s" / "1", ["method=laco"], None, choices={"method": "laco"})
        (folder / "s" / "1" / "summary.json").write_text(json.dumps(files[0]))
        (folder / "s" / "1" / "config.yaml").write_text(json.dumps(files[1]))
        try:
            study = read_study(folder / "s")
        except UserError:
            return
        run = study.runs[1]
        assert run.status in ("done", "unreadable")
        assert "\n" not in run.state
        assert status(study.runs, 0.0).startswith("2 jobs: ")
        for document in (documents.markdown, documents.text, documents.latex, documents.csv):
            document(study).encode()
        page.html(study, []).encode()
        per_run.training_rows(run)


@given(data=st.data())
def test_no_damage_to_a_folder_costs_the_status(data):
    """Files of a run and of its study are cut off, emptied, replaced by folders and dangling links, or gone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder / "s" / "0", ["seed=1"], recovered(folder, 24, 20.0))
        write_run(folder / "s" / "1", ["seed=2"], "no")
        jobs = {"format": 1, "command": "slm", "jobs": [["seed=1"], ["seed=2"], ["seed=3"]]}
        (folder / "s" / "study.json").write_text(json.dumps(jobs))
        files = sorted(path for path in (folder / "s").rglob("*") if path.is_file())
        for _ in range(data.draw(st.integers(1, 4))):
            file = data.draw(st.sampled_from(files))
            how = data.draw(st.sampled_from(["cut", "bytes", "folder", "link", "loop", "gone"]))
            content = file.read_bytes() if file.is_file() else b""
            if file.is_dir():
                os.rmdir(file)
            else:
                file.unlink(missing_ok=True)
            if how == "cut":
                file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
            elif how == "bytes":
                file.write_bytes(data.draw(st.binary(max_size=20)))
            elif how == "folder":
                file.mkdir()
            elif how in ("link", "loop"):
                file.symlink_to("gone" if how == "link" else file.name)
        runs = read_runs(folder / "s")
        assert {run.job for run in runs} >= {"0", "1"}
        assert status(runs, 0.0)
        documents.markdown(read_study(folder / "s"))
