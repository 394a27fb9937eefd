"""metrics.jsonl, and the W&B runs as they really lie on disk: the offline log is read back record by record."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from wandb_files import history, nested, only, wandb_records

from slm_pipeline.config import TrackerConfig
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import tracking
from slm_pipeline.results.number import Number

FAKE_KEY = "0123456789abcdef" * 2 + "01234567"
# The smallest PNG: one black pixel.
PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for kind, data in [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\0")),
        (b"IEND", b""),
    ]
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """A home of its own and no W&B settings, so that nothing of the user's is read or written."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))  # there is none
    yield
    import wandb

    wandb.teardown()


def open_tracker(run_dir: Path, config: TrackerConfig | None = None, **changes: Any) -> tracking.Tracker:
    options: dict[str, Any] = {"name": "first", "run_config": {"seed": 7}, "group": "ratio", "tags": ["slm"], **changes}
    return tracking.open_tracker(config or TrackerConfig(kind="wandb"), run_dir=run_dir, job_type="evaluate", **options)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_relative_folder_is_the_callers_wherever_the_wandb_service_was_started(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with open_tracker(Path("run")) as tracker:
            tracker.log({"loss": 1.0}, stage="recover")
    assert [history(tmp_path / name / "run")[0]["recover/loss"] for name in ("first", "second")] == [1.0, 1.0]


def test_jsonl_has_one_line_a_call_on_disk_at_once(tmp_path):
    with open_tracker(tmp_path / "run", TrackerConfig(kind="jsonl")) as tracker:
        tracker.log({"loss": 2.5, "num_tokens": 64}, stage="recover", step=3)
        tracker.log({"average": 41.25}, stage="evaluate")
        first, second = lines(tmp_path / "run")
    assert first.pop("time") <= second.pop("time")
    assert first == {"stage": "recover", "step": 3, "loss": 2.5, "num_tokens": 64}
    assert second == {"stage": "evaluate", "average": 41.25}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_non_finite_numbers_and_taken_names_are_refused(tmp_path):
    with open_tracker(tmp_path, TrackerConfig(kind="jsonl")) as tracker:
        with pytest.raises(ValueError, match="recover/loss is nan at step 3"):
            tracker.log({"loss": math.nan}, stage="recover", step=3)
        with pytest.raises(ValueError, match="'step'"):
            tracker.log({"step": 1.0}, stage="recover")
    assert lines(tmp_path) == []


def test_wandb_run_holds_config_curves_table_picture_and_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    run_dir = tmp_path / "run"
    (tmp_path / "map.png").write_bytes(PNG)
    config = TrackerConfig(kind="wandb", project="depth", tags=["table1", "slm"])
    with open_tracker(run_dir, config, run_config={"model": {"name": "tiny"}, "seed": 7}) as tracker:
        tracker.numbers([Number("num_layers", 24, "layers")], stage="merge")
        for step, loss in [(10, 3.5), (20, 3.0), (5, 2.75)]:
            tracker.log({"loss": loss}, stage="recover", step=step)
        tracker.table("results", ["model", "average"], [["dense", 50.5], ["pruned", None]])
        tracker.image("pictures/map", tmp_path / "map.png")
        perplexity = Number("pruned/perplexity/bundled", 17.5, "perplexity", stderr=0.5)
        tracker.summary({perplexity.key: perplexity})

    run = only(run_dir, "run")
    assert (run.project, run.display_name, run.run_group, run.job_type) == ("depth", "first", "ratio", "evaluate")
    assert list(run.tags) == ["table1", "slm"]
    logged = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (logged["model"], logged["seed"]) == ({"name": "tiny"}, 7)
    assert only(run_dir, "exit").exit_code == 0

    rows = history(run_dir)
    assert {"num_layers": 24} in rows  # a number has one name everywhere
    curve = [(row["recover/step"], row["recover/loss"]) for row in rows if "recover/loss" in row]
    assert curve == [(10, 3.5), (20, 3.0), (5, 2.75)]  # also the step that goes back
    axes = [r.metric for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "metric"]
    assert ("recover/*", "recover/step") in [(axis.glob_name, axis.step_metric) for axis in axes]

    files = next(run_dir.glob("wandb/offline-run-*")) / "files"
    (table,) = [row["results"] for row in rows if "results" in row]
    content = json.loads((files / table["path"]).read_text())
    assert (content["columns"], content["data"]) == (["model", "average"], [["dense", 50.5], ["pruned", None]])
    (picture,) = [row["pictures/map"] for row in rows if "pictures/map" in row]
    assert (files / picture["path"]).read_bytes() == (tmp_path / "map.png").read_bytes()

    finals = [nested(r.summary.update) for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "summary"]
    assert {"pruned/perplexity/bundled": 17.5, "pruned/perplexity/bundled stderr": 0.5} in finals

    assert [line["stage"] for line in lines(run_dir)] == ["merge", "recover", "recover", "recover"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if FAKE_KEY.encode() in path.read_bytes()]
    assert not [path for path in written if tmp_path / "home" in path.parents]
    assert not [name for name in os.environ if name.startswith("WANDB_") and name.endswith("_DIR")]


def test_a_failed_run_is_closed_as_failed_and_the_next_is_another_run(tmp_path):
    def fail() -> None:
        with open_tracker(tmp_path / "0") as tracker:
            tracker.log({"loss": 1.0}, stage="recover", step=1)
            raise RuntimeError("stage died")

    with pytest.raises(RuntimeError, match="stage died"):
        fail()
    with open_tracker(tmp_path / "1", name="second") as tracker:
        tracker.log({"loss": 2.0}, stage="recover", step=1)

    assert only(tmp_path / "0", "exit").exit_code == 1
    assert only(tmp_path / "1", "exit").exit_code == 0
    assert only(tmp_path / "0", "run").run_id != only(tmp_path / "1", "run").run_id
    assert [row["recover/loss"] for row in history(tmp_path / "0")] == [1.0]
    assert [row["recover/loss"] for row in history(tmp_path / "1")] == [2.0]


def test_a_run_that_was_never_closed_does_not_take_the_next_jobs_metrics(tmp_path):
    abandoned = open_tracker(tmp_path / "0")
    abandoned.log({"loss": 1.0}, stage="recover", step=1)
    with open_tracker(tmp_path / "1") as tracker:
        tracker.log({"loss": 2.0}, stage="recover", step=1)
    assert [row["recover/loss"] for row in history(tmp_path / "0")] == [1.0]
    assert [row["recover/loss"] for row in history(tmp_path / "1")] == [2.0]


def test_online_without_a_key_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="WANDB_API_KEY.*tracker=wandb_offline"):
        open_tracker(tmp_path / "run", TrackerConfig(kind="wandb", mode="online"))
    assert not (tmp_path / "run").exists()


def test_online_with_a_key_passes_the_check(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_API_KEY", FAKE_KEY)
        assert tracking.check_tracker(TrackerConfig(kind="wandb", mode="online")) == "online"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {FAKE_KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking.check_tracker(TrackerConfig(kind="wandb", mode="online")) == "online"


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracker=wandb_offline needs wandb: pip install wandb, or tracker=jsonl"):
        tracking.check_tracker(TrackerConfig(kind="wandb"))


@pytest.mark.parametrize("wanted", ["offline", "disabled"])
def test_wandb_mode_of_the_environment_wins_and_is_said(monkeypatch, caplog, tmp_path, wanted):
    monkeypatch.setenv("WANDB_MODE", wanted)
    with open_tracker(tmp_path, TrackerConfig(kind="wandb", mode="online")) as tracker:
        tracker.log({"loss": 1.0}, stage="recover", step=1)
    assert f"WANDB_MODE={wanted} in the environment wins" in caplog.text
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == (wanted == "offline")
    assert len(lines(tmp_path)) == 1


def test_wandb_mode_online_does_not_override_offline(monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert tracking.check_tracker(TrackerConfig(kind="wandb")) == "offline"
    assert "WANDB_MODE=online in the environment is ignored" in caplog.text


def test_options_that_wandb_refuses_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="W&B did not start a run: .*a/b.*tracker=jsonl"):
        open_tracker(tmp_path, TrackerConfig(kind="wandb", project="a/b"))
    with pytest.raises(UserError, match="tracker.kind=.paper. is not one of jsonl, wandb, tensorboard, mlflow"):
        tracking.check_tracker(TrackerConfig(kind="paper"))
    with pytest.raises(UserError, match="tracker.mode='dryrun' is not one of offline, online"):
        tracking.check_tracker(TrackerConfig(kind="wandb", mode="dryrun"))


def test_names_and_tags_are_cut_to_what_wandb_takes(tmp_path, caplog):
    with open_tracker(tmp_path, name="n" * 130, group="g" * 128, tags=["x" * 70, "slm", "slm"]):
        pass
    run = only(tmp_path, "run")
    assert (run.display_name, run.run_group, list(run.tags)) == ("n" * 128, "g" * 128, ["x" * 64, "slm"])
    assert [
        record.args[:2]
        for record in caplog.records
        if record.name == "slm_pipeline.jobs.tracking" and "cut" in record.msg
    ] == [("run name", 128), ("tag", 64)]


def test_jobs_of_a_study_never_share_a_run_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "fixed")
    for job in ("0", "1"):
        with open_tracker(tmp_path / job, group="thresholds/now"):
            pass
    with open_tracker(tmp_path / "single", group=None):  # of a W&B agent, which gives it its run
        pass
    ids = [only(tmp_path / job, "run").run_id for job in ("0", "1", "single")]
    assert len(set(ids)) == 3
    assert ids[2] == "fixed"


def test_what_wandb_or_a_disk_cannot_take_is_said_once_and_ends_nothing(tmp_path, caplog):
    with open_tracker(tmp_path / "run") as tracker:
        run = tracker._run
        broken = mock.Mock(side_effect=OSError(28, "No space left on device"))
        with mock.patch.object(run, "log", broken), mock.patch.object(run, "finish", broken):
            for step in range(3):
                tracker.log({"loss": 1.0}, stage="recover", step=step)
            tracker.table("scores", ["a"], [[1]])
            tracker.image("layers", tmp_path / "absent.png")
            tracker.__exit__(None, None, None)
        with mock.patch.object(tracker, "_file", mock.Mock(write=broken)):
            tracker.log({"loss": 1.0}, stage="recover", step=4)
    said = [record.getMessage() for record in caplog.records]
    assert said.count("W&B lacks some metrics: OSError: [Errno 28] No space left on device") == 1
    for what in ("W&B lacks the table scores", "W&B lacks the picture layers", "the W&B run was not closed"):
        assert sum(message.startswith(what) for message in said) == 1
    assert any("lacks a line: OSError" in message for message in said)
    assert [row["step"] for row in lines(tmp_path / "run")] == [0, 1, 2]
