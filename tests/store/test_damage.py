"""Whatever becomes of the files of a store, it says so in one line or mends itself, and what it remakes is right."""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import run_slm
from hypothesis import given
from hypothesis import strategies as st

from slm_pipeline.commands import store
from slm_pipeline.commands.study import status
from slm_pipeline.config import STAGES
from slm_pipeline.errors import UserError
from slm_pipeline.jobs.stages.calibrate import Calibrate
from slm_pipeline.jobs.stages.recover import Recover
from slm_pipeline.machine import provenance
from slm_pipeline.report.runs import read_runs
from slm_pipeline.store import checksums, users
from slm_pipeline.store.artifact import Artifact, check_store
from slm_pipeline.store.files import write_json
from slm_pipeline.store.unfinished import note_complete

NUMBERS = {"mean": 0.1 + 0.2, "count": 3}
PARTS = {"part.json": b'{"a": 1}\n', "model/weights": b"w" * 5000, "model/config.json": b'{"layers": 6}\n'}


def make(folder: Path) -> dict[str, Any]:
    """Two pieces and a checkpoint folder, as stages make them: what is there is believed."""
    if not (folder / "part.json").exists():
        (folder / "part.json").write_bytes(PARTS["part.json"])
        note_complete(folder, "part.json")
    assert (folder / "part.json").read_bytes() == PARTS["part.json"]
    if not (folder / "model").is_dir():
        (folder / "model").mkdir()
        for name in ("model/weights", "model/config.json"):
            (folder / name).write_bytes(PARTS[name])
        note_complete(folder, "model")
    return NUMBERS


def is_right(artifact: Artifact) -> bool:
    return artifact.record()["result"] == NUMBERS and all(
        (artifact.path / name).read_bytes() == content for name, content in PARTS.items()
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished result, one that was interrupted, and a run that uses both."""
    output_dir = tmp_path_factory.mktemp("whole")
    run_dir = output_dir / "runs" / "slm" / "now"
    run_dir.mkdir(parents=True)
    write_json(run_dir / "summary.json", {})
    with mock.patch.object(provenance, "git_commit", return_value=None):
        check_store(output_dir / "store", STAGES)
        for artifact in artifacts(output_dir):
            users.note(artifact.path, run_dir)
            artifact.produce(make)
    unfinished = artifacts(output_dir)[1]
    (unfinished.path / "stage.json").unlink()
    unfinished.path.rename(unfinished.partial)
    return output_dir


def artifacts(output_dir: Path) -> list[Artifact]:
    return [Artifact(output_dir / "store", "merge", {"number": number}) for number in (1, 2)]


GARBAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\x00" * 50, b'{"pieces": [1], "files": 1}', b"[" * 100_000]


def damage(path: Path, kind: str, where: float, garbage: bytes) -> None:
    """Do ``kind`` to a file, or to a folder where that can be done to one."""
    if kind in ("flip", "truncate", "garbage") and not path.is_file():
        return
    if kind == "flip":
        content = bytearray(path.read_bytes())
        if content:
            content[int(where * len(content))] ^= 0x10
            path.write_bytes(content)
    elif kind == "truncate":
        content = path.read_bytes()
        path.write_bytes(content[: int(where * len(content))])
    elif kind == "garbage":
        path.write_bytes(garbage)
    else:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if kind == "folder":
            (path / "inside").mkdir(parents=True)
        elif kind == "file":
            path.write_bytes(garbage)
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "fifo":
            os.mkfifo(path)


KINDS = ("flip", "truncate", "garbage", "delete", "folder", "file", "dangling", "loop", "fifo")
number = st.floats(0, 1, exclude_max=True)


@pytest.fixture
def _no_fsync(monkeypatch):
    """Thousands of them take minutes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("_no_fsync")
@given(st.lists(st.tuples(number, st.sampled_from(KINDS), number, st.sampled_from(GARBAGE)), min_size=1, max_size=4))
def test_a_damaged_store_says_so_or_mends_itself(whole, tmp_path, damages):
    output_dir = tmp_path / "outputs"
    shutil.rmtree(output_dir, ignore_errors=True)
    shutil.copytree(whole, output_dir, symlinks=True)
    checksums._read.clear()  # as a new process
    for which, kind, where, garbage in damages:
        there = sorted((output_dir / "store").rglob("*"))
        if there:
            damage(there[int(which * len(there))], kind, where, garbage)
    looked_at = store.read_store(output_dir)
    with redirect_stdout(io.StringIO()):
        for entry in looked_at:
            store._line(entry, store.models_of(looked_at))
        store.verify(looked_at)
        store.clean(looked_at, users.Users(output_dir))
    status(read_runs(output_dir / "runs"), 0)
    for artifact in artifacts(output_dir):
        with suppress(UserError):
            if artifact.done:
                artifact.record()
            artifact.produce(make, is_whole=lambda artifact=artifact: artifact.intact)
            assert is_right(artifact)
            assert not os.path.lexists(artifact.partial)


@pytest.mark.parametrize(
    ("name", "kind", "warned"),
    [
        ("stage.json", "truncate", "stage.json is damaged: "),
        ("stage.json", "garbage", "stage.json is damaged: "),
        ("stage.json", "delete", "stage.json is not there"),
        ("stage.json", "folder", "stage.json is damaged: not a file"),
        ("part.json", "flip", "part.json does not fit its checksum"),
        ("model/weights", "truncate", "model/weights has 2500 bytes, not 5000"),
        ("model/weights", "delete", "model/weights is not there"),
        ("model", "dangling", "model/config.json is not there"),
    ],
)
def test_a_damaged_result_is_made_again_with_a_warning_that_names_it(name, kind, warned, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    artifact = artifacts(tmp_path)[0]
    damage(artifact.path / name, kind, 0.5, b"")
    (entry,) = (entry for entry in store.read_store(tmp_path) if entry.path == artifact.path)
    assert entry.state.startswith(f"damaged: {warned}")
    assert not artifact.done
    assert artifact.produce(make)[1] is False
    assert f"{artifact.path} is damaged: {warned}" in caplog.text
    assert is_right(artifact)


def test_stage_json_of_another_result_is_not_believed(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    first, second = artifacts(tmp_path)
    shutil.copytree(first.path, second.path)
    assert not second.done
    with pytest.raises(UserError, match=f"{second.path}: stage.json is of another result"):
        second.record()


def test_flipped_bytes_of_a_large_file_are_seen_by_whoever_reads_it(tmp_path):
    """Reuse compares sizes; the whole file is read before a stage that needs it."""

    def large(folder: Path) -> dict[str, Any]:
        (folder / "model").write_bytes(bytes(2 * checksums.SMALL))
        return {}

    artifact = Artifact(tmp_path, "merge", {})
    artifact.produce(large)
    with open(artifact.path / "model", "r+b") as file:
        file.seek(checksums.SMALL)
        file.write(b"x")
    assert artifact.done
    assert not artifact.intact
    assert not artifact.done  # what has been seen once is known
    assert artifact.produce(large)[1] is False
    assert artifact.intact


def test_a_readme_may_be_edited(tmp_path):
    def with_card(folder: Path) -> dict[str, Any]:
        (folder / "README.md").write_text("# Card")
        return {}

    artifact = Artifact(tmp_path, "merge", {})
    artifact.produce(with_card)
    (artifact.path / "README.md").write_text("# A better card")
    assert artifact.intact


def test_results_of_a_version_without_checksums_are_accepted_if_they_can_be_read(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    artifact = artifacts(tmp_path)[0]
    record = artifact.record()
    del record["files"]
    write_json(artifact.path / "stage.json", record)
    (artifact.path / "complete.json").unlink()
    assert artifact.produce(make)[1] is True
    assert artifact.produce(make, is_whole=lambda: False)[1] is False
    assert "files" in artifact.record()
    write_json(artifact.path / "stage.json", record)
    (artifact.path / "part.json").write_text('{"a"')
    assert not artifact.done
    header = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    (artifact.path / "part.json").write_bytes(PARTS["part.json"])
    (artifact.path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(7))
    assert checksums.unreadable(artifact.path) == "w.safetensors is cut off"


def test_unfinished_work_of_another_decision_is_dropped(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    artifact = artifacts(tmp_path)[1]
    write_json(artifact.partial / "identity.json", {"number": 3})
    (artifact.partial / "model" / "weights").write_bytes(b"of another")
    artifact.produce(make)
    assert f"{artifact.partial} is not unfinished work of this result: removed" in caplog.text
    assert is_right(artifact)


@pytest.mark.parametrize("what", ["lock", "partial", "path"])
@pytest.mark.parametrize("kind", ["folder", "file", "dangling"])
def test_what_should_not_lie_there_is_put_aside_or_named(what, kind, tmp_path):
    artifact = Artifact(tmp_path, "merge", {})
    artifact.path.parent.mkdir()
    place = getattr(artifact, what)
    damage(place, kind, 0, b"x")
    if (what, kind) == ("lock", "folder"):  # not empty: whose is it?
        with pytest.raises(UserError, match=f"cannot work in the store: {place}: Directory not empty"):
            artifact.produce(make)
        return
    artifact.produce(make)
    assert is_right(artifact)


def test_a_store_that_may_not_be_read_is_one_line(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    artifact = artifacts(tmp_path)[0]
    (artifact.path / "stage.json").unlink()
    refused = PermissionError(13, "Permission denied", str(artifact.partial))
    monkeypatch.setattr(Path, "mkdir", mock.Mock(side_effect=refused))
    with pytest.raises(UserError) as error:
        artifact.produce(make)
    assert str(error.value) == f"cannot work in the store: {artifact.partial}: Permission denied"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("the old mill runs past the river " * 60)
    examples = [{"instruction": f"say {number}", "input": "", "output": "a tree"} for number in range(12)]
    (folder / "alpaca.json").write_text(json.dumps(examples))
    return [
        "model=random", "model.num_layers=4", "model.hidden_size=32", "model.intermediate_size=48", "tracker=jsonl",
        "pictures=false", f"data_dir={folder}", "calibration=text_file", "calibration.path=text.txt",
        "calibration.num_samples=4", "calibration.seq_len=64", "pruning_ratio=r25", "recovery=partial_layers",
        "recovery.num_layers=1", "recovery.source=file", "recovery.path=alpaca.json", "recovery.validation_size=2",
        "recovery.max_steps=2", "recovery.batch_size=2", "recovery.micro_batch_size=2", "recovery.warmup_steps=0",
        "evaluation=perplexity", "evaluation.of=[pruned,recovered]", "evaluation.perplexity.corpora=[text.txt]",
        "evaluation.perplexity.window=64",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store and the summary of the run that made it, in a folder that the store could not know."""
    output_dir, run_dir = tmp_path_factory.mktemp("outputs"), tmp_path_factory.mktemp("results") / "final"
    outcome = run_slm(*job, f"output_dir={output_dir}", f"hydra.run.dir={run_dir}")
    assert outcome.status == 0, outcome.err
    return output_dir, json.loads((run_dir / "summary.json").read_text())


def test_a_run_in_a_folder_of_its_own_is_known_to_the_store(finished):
    output_dir, summary = finished
    known = users.Users(output_dir)
    for stage in summary["stages"].values():
        use = known.of(str(Path(stage["path"]).relative_to(output_dir / "store")))
        assert [path.name for path in use.runs] == ["final"]
        assert "final" in (use.kept_because(gone=True, unrecorded=True) or "")
    entries = store.read_store(output_dir)
    assert store.clean(entries, known, gone=True, unrecorded=True) == []


def test_a_damaged_input_is_made_again_before_it_is_read(job, finished, tmp_path, caplog):
    """Of a finished job one number is asked for again: all that it reads is read whole first."""
    output_dir, summary = finished
    shutil.copytree(output_dir, tmp_path, dirs_exist_ok=True)
    for name in ("merge", "recover"):
        weights = tmp_path / Path(summary["stages"][name]["path"]).relative_to(output_dir) / "model/model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 0x40
        weights.write_bytes(content)
    run_dir = tmp_path / "again"
    checksums._read.clear()
    with (
        mock.patch.object(checksums, "SMALL", 0),  # as if the weights were large
        mock.patch.object(Recover, "preflight", autospec=True) as looked_at,
        mock.patch.object(Calibrate, "publish", autospec=True) as published,
    ):
        outcome = run_slm(*job, f"output_dir={tmp_path}", f"hydra.run.dir={run_dir}", "force=[evaluate]")
    assert outcome.status == 0, outcome.err
    assert looked_at.call_count == 1  # though it seemed done
    assert published.call_count == 1  # what was whole is not gone through again
    again = json.loads((run_dir / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    for name in ("merge", "recover"):
        warning = f"{again['stages'][name]['path']} is damaged: model/model.safetensors does not fit its checksum"
        assert f"{warning}; it is made again" in again["warnings"]
        assert not again["stages"][name]["reused"]
    assert Path(again["checkpoint"]).parent == Path(again["stages"]["recover"]["path"])


def test_a_recovery_without_its_model_is_trained_again(job, finished, tmp_path):
    output_dir, summary = finished
    shutil.copytree(output_dir, tmp_path, dirs_exist_ok=True)
    recovered = tmp_path / Path(summary["checkpoint"]).relative_to(output_dir)
    shutil.rmtree(recovered)
    run_dir = tmp_path / "again"
    outcome = run_slm(*job, f"output_dir={tmp_path}", f"hydra.run.dir={run_dir}")
    assert outcome.status == 0, outcome.err
    again = json.loads((run_dir / "summary.json").read_text())
    assert again["checkpoint"] == str(recovered)
    assert {name: stage["reused"] for name, stage in again["stages"].items()} == {
        "calibrate": True, "merge": True, "recover": False, "evaluate_pruned/perplexity/text.txt": True,
        "evaluate_recovered/perplexity/text.txt": True,
    }  # fmt: skip
    weights = Path(summary["checkpoint"]) / "model.safetensors"
    assert (recovered / "model.safetensors").read_bytes() == weights.read_bytes()
