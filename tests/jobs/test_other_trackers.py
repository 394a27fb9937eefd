"""The event files of TensorBoard, read back record by record; what a service that fails costs."""

from __future__ import annotations

import json
import re
import struct
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from slm_pipeline.config import TrackerConfig
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import other_trackers, tracking
from slm_pipeline.results.number import Number

NUMBERS = [
    Number("pruned/perplexity/bundled", 20.5, "perplexity"),
    Number("pruned/average", 41.25, "%", 2.5, higher_is_better=True),
]


def open_tracker(run_dir: Path, kind: str) -> tracking.Tracker:
    config = TrackerConfig(kind=kind, project="depth", tags=["mine"])
    settings = {"seed": 7, "method": {"name": "slm", "steps": [1, 2]}, "recovery": None, "long": "x" * 9999}
    return tracking.open_tracker(
        config, run_dir=run_dir, name="first", run_config=settings, group="ratio", tags=["slm"], job_type="evaluate"
    )


def events(folder: Path) -> list[tuple[str, int, float | str]]:
    """Tag, step and value of everything in a folder's event file: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    content, found, place = file.read_bytes(), [], 0
    while place < len(content):
        (size,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + size])
        for value in event.summary.value:
            if value.image.width:
                found.append((value.tag, event.step, f"{value.image.width} x {value.image.height}"))
                continue
            text = value.tensor.string_val[0].decode() if value.tensor.string_val else value.simple_value
            found.append((value.tag.removesuffix("/text_summary"), event.step, text))
        place += size + 16
    return found


def test_tensorboard_has_every_number_under_its_key_and_curves_at_their_steps(tmp_path):
    with open_tracker(tmp_path / "run", "tensorboard") as tracker:
        tracker.log({"loss": 2.5}, stage="recover", step=3)
        tracker.log({"loss": 2.0}, stage="recover", step=1)  # another training: steps need not grow
        tracker.numbers(NUMBERS, stage="evaluate_pruned")
        tracker.summary({number.key: number for number in [*NUMBERS, Number("num_layers", 24.0, "layers")]})
        Image.new("RGBA", (40, 20)).save(tmp_path / "layers.png")
        tracker.image("layers", tmp_path / "layers.png")
    settings, *found = events(tmp_path / "run" / "tensorboard")
    assert found == [
        ("recover/loss", 3, 2.5),
        ("recover/loss", 1, 2.0),
        ("pruned/perplexity/bundled", 0, 20.5),
        ("pruned/average", 0, 41.25),
        ("num_layers", 0, 24.0),  # what no stage had logged
        ("pruned/average/stderr", 0, 2.5),
        ("layers", 0, "40 x 20"),
    ]
    lines = str(settings[2]).splitlines()
    assert lines[:4] == ["    seed: 7", "    method.name: slm", "    method.steps: [1, 2]", "    recovery: None"]
    assert len(lines[4]) == len("    long: ") + 500
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in logged] == ["recover", "recover", "evaluate_pruned"]


class Fails(other_trackers.Service):
    """A service that takes the first numbers alone."""

    packages = ("json",)
    ended: list[bool] = []

    def __init__(self, run: other_trackers.Begun) -> None:
        self.run = run
        self.taken = 0
        if run.project != "depth":
            raise ConnectionError("no\nserver")

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.taken:
            raise OSError("gone")
        self.taken += 1

    def image(self, name: str, path: Path) -> None:
        raise OSError("gone")

    def end(self, *, failed: bool) -> None:
        self.ended.append(failed)
        raise OSError("gone")


def test_a_service_that_fails_costs_a_warning_and_no_number(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(other_trackers.SERVICES, "mlflow", Fails)
    tracker = open_tracker(tmp_path, "mlflow")
    for step in range(3):
        tracker.log({"loss": 1.0}, stage="recover", step=step)
    tracker.image("layers", tmp_path / "layers.png")
    error = RuntimeError("the job")
    tracker.__exit__(RuntimeError, error, None)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert caplog.text.count("mlflow lacks some metrics: OSError: gone") == 1
    assert "mlflow lacks the picture layers: OSError: gone" in caplog.text
    assert "the mlflow run was not closed: OSError: gone" in caplog.text
    assert Fails.ended == [True]


def test_a_number_that_did_not_arrive_is_sent_again_at_the_end(tmp_path, monkeypatch):
    sent: list[dict[str, float]] = []

    class Late(Fails):
        def log(self, values: Mapping[str, float], step: int) -> None:
            sent.append(dict(values))
            if len(sent) == 1:
                raise OSError("gone")

    monkeypatch.setitem(other_trackers.SERVICES, "mlflow", Late)
    tracker = open_tracker(tmp_path, "mlflow")
    numbers = [Number(key, value, "") for key, value in (("pruned/a", 1.0), ("pruned/b", 2.0))]
    for number in numbers:
        tracker.numbers([number], stage="evaluate")
    tracker.summary({number.key: number for number in numbers})
    assert sent == [{"pruned/a": 1.0}, {"pruned/b": 2.0}, {"pruned/a": 1.0}]


def test_a_service_that_does_not_begin_is_an_error_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(other_trackers.SERVICES, "trackio", Fails)
    begun: dict[str, Any] = {"name": "x", "run_config": {}, "group": None, "tags": [], "job_type": "merge"}
    config = TrackerConfig(kind="trackio", project="width")
    with pytest.raises(UserError, match="trackio did not start a run: no server; tracker=jsonl does without it"):
        tracking.open_tracker(config, run_dir=tmp_path, **begun)


@pytest.mark.parametrize("kind", tracking.OTHERS)
def test_a_service_that_is_not_installed_is_named_with_what_to_do(kind, monkeypatch):
    assert set(other_trackers.SERVICES) == set(tracking.OTHERS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"tracker={kind} needs {kind}.*: pip install {kind}, or tracker=jsonl"):
        tracking.check_tracker(TrackerConfig(kind=kind))


def test_mlflow_gets_names_that_it_takes(tmp_path, monkeypatch):
    """It refuses a whole call for one name with a character that is not among these."""
    logged: dict[str, float] = {}

    def log_metrics(values: Mapping[str, float], step: int) -> None:
        assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in values)
        logged.update(values)

    fake = types.SimpleNamespace(__spec__=object(), log_metrics=log_metrics, log_params=dict)
    for name in ("set_experiment", "start_run", "end_run"):
        setattr(fake, name, lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with open_tracker(tmp_path, "mlflow") as tracker:
        speed = Number("pruned/efficiency/1x32+128/speedup", 1.5, stderr=0.1)
        tracker.numbers([speed, *NUMBERS], stage="evaluate_pruned")
        tracker.summary({number.key: number for number in [speed, *NUMBERS]})
    assert logged == {
        "pruned/efficiency/1x32_128/speedup": 1.5,
        "pruned/perplexity/bundled": 20.5,
        "pruned/average": 41.25,
        "pruned/efficiency/1x32_128/speedup/stderr": 0.1,
        "pruned/average/stderr": 2.5,
    }
