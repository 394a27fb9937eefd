"""The store: what a key depends on, and that half a result is never taken for a whole one."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from slm_pipeline.config import STAGES
from slm_pipeline.errors import UserError
from slm_pipeline.store.artifact import STORE_FORMAT, Artifact, check_store
from slm_pipeline.store.checksums import digest
from slm_pipeline.store.files import is_held, write_json, write_text
from slm_pipeline.store.unfinished import note_complete


def artifact(root: Path, **identity: object) -> Artifact:
    return Artifact(root, "merge", identity or {"model": "m", "ratio": 0.2})


def make_nothing(folder: Path) -> dict:
    (folder / "plan").write_text("content")
    return {"answer": 42}


def test_every_file_of_a_result_has_the_mode_that_the_umask_gives(tmp_path):
    def make(folder: Path) -> dict:
        (folder / "model").mkdir()
        save_file({"x": torch.zeros(3)}, folder / "model" / "model.safetensors")  # leaves it to its owner alone
        return {}

    before = os.umask(0o027)
    try:
        found = artifact(tmp_path)
        found.produce(make)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in found.path.rglob("*") if file.is_file()}
    assert modes == dict.fromkeys(["model.safetensors", "stage.json", "identity.json", "complete.json"], "0o640")


def test_key_depends_on_stage_and_identity_alone(tmp_path):
    key = artifact(tmp_path, a=1, b=[2, None]).key
    assert key == artifact(tmp_path / "elsewhere", b=[2, None], a=1).key
    assert len(key) == 16
    others = [
        artifact(tmp_path, a=1, b=[2]),
        artifact(tmp_path, a=1.5, b=[2, None]),
        Artifact(tmp_path, "recover", {"a": 1, "b": [2, None]}),
    ]
    assert len({key, *(other.key for other in others)}) == 4


def test_a_lock_that_the_file_system_knows_nothing_of_counts_as_held(tmp_path):
    lock = tmp_path / "a.lock"
    assert not is_held(lock)
    lock.touch()
    assert not is_held(lock)
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOSYS, "not implemented")):
        assert is_held(lock)


def test_digest_is_of_canonical_json():
    assert digest({"b": 1, "a": "x"}) == digest({"a": "x", "b": 1}) != digest({"a": "x", "b": "1"})
    with pytest.raises(ValueError, match="Out of range float"):
        digest({"a": float("nan")})


def test_result_is_renamed_into_place_when_it_is_complete(tmp_path):
    result = artifact(tmp_path)

    def make(folder: Path) -> dict:
        assert folder == result.partial
        assert not result.done
        return make_nothing(folder)

    record, reused = result.produce(make)
    assert not reused
    assert result.done
    assert not result.partial.exists()
    assert (result.path / "plan").read_text() == "content"
    assert record == result.record()
    assert (record["stage"], record["key"], record["identity"]) == ("merge", result.key, {"model": "m", "ratio": 0.2})
    assert record["result"] == {"answer": 42}
    assert record["seconds"] >= 0
    assert record["provenance"]["versions"]["slm_pipeline"]


def test_finished_result_is_not_made_again(tmp_path):
    artifact(tmp_path).produce(make_nothing)

    def fail(folder: Path) -> dict:
        raise AssertionError("made again")

    record, reused = artifact(tmp_path).produce(fail)
    assert (record["result"], reused) == ({"answer": 42}, True)


def test_interrupted_work_is_continued_and_not_taken_for_a_result(tmp_path):
    result = artifact(tmp_path)

    def interrupted(folder: Path) -> dict:
        (folder / "first half").write_text("1")
        note_complete(folder, "first half")
        (folder / "second half").write_text("not all of it")
        (folder / ".third.0123.tmp").write_text("of a write that was killed")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        result.produce(interrupted)
    assert not result.done
    assert (result.partial / "first half").exists()

    def rest(folder: Path) -> dict:
        assert sorted(path.name for path in folder.iterdir()) == ["complete.json", "first half", "identity.json"]
        return {"halves": int((folder / "first half").read_text()) + 1}

    record, reused = result.produce(rest)
    assert (record["result"], reused) == ({"halves": 2}, False)


def test_stopped_between_the_last_write_and_the_rename(tmp_path, monkeypatch):
    """stage.json is there, but still under the partial name: made again, with the warnings of before."""
    result = artifact(tmp_path)

    def warn(folder: Path) -> dict:
        logging.getLogger("slm_pipeline.somewhere").warning("the text is short")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "_put_in_place", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            result.produce(warn)
    assert (result.partial / "stage.json").exists()
    assert not result.done
    assert result.produce(make_nothing)[1] is False
    assert result.done
    assert result.record()["warnings"] == ["the text is short"]


def test_warnings_are_kept_with_the_result_through_interruptions_and_further_makings(tmp_path):
    """Each once, in the order in which they were said; those of before go when everything is made anew."""
    found = artifact(tmp_path)
    log = logging.getLogger("slm_pipeline.somewhere")

    def killed(folder: Path) -> dict:
        log.warning("the text is %s", "short")
        raise KeyboardInterrupt

    def make(folder: Path) -> dict:
        log.warning("the loss rose")
        log.info("not this")
        log.warning("the text is short")
        note_complete(folder)
        return {}

    with pytest.raises(KeyboardInterrupt):
        found.produce(killed)
    with (found.partial / "warnings.jsonl").open("a") as file:
        file.write('"torn')
    log.warning("of nobody")
    record, _ = found.produce(make)
    assert record["warnings"] == ["the text is short", "the loss rose"]
    assert sorted(path.name for path in found.path.iterdir()) == ["complete.json", "identity.json", "stage.json"]
    assert found.produce(make)[0]["warnings"] == record["warnings"]  # reused
    more, _ = found.produce(lambda folder: log.warning("more") or {}, is_whole=lambda: False)
    assert more["warnings"] == ["the text is short", "the loss rose", "more"]
    afresh, _ = found.produce(lambda folder: {}, force=True)
    assert "warnings" not in afresh


def test_force_keeps_the_old_result_until_the_new_one_is_complete(tmp_path):
    result = artifact(tmp_path)
    result.produce(make_nothing)
    result.partial.mkdir()
    (result.partial / "stale").write_text("of an earlier attempt")

    def remake(folder: Path) -> dict:
        assert result.record()["result"] == {"answer": 42}
        assert not (folder / "stale").exists()
        return {"answer": 43}

    assert result.produce(remake, force=True)[0]["result"] == {"answer": 43}
    assert result.record()["result"] == {"answer": 43}
    assert not (result.path / "plan").exists()
    assert sorted(path.name for path in result.path.parent.iterdir()) == [result.key, f"{result.key}.lock"]


def test_force_that_fails_leaves_the_old_result(tmp_path):
    result = artifact(tmp_path)
    result.produce(make_nothing)

    def fail(folder: Path) -> dict:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        result.produce(fail, force=True)
    assert result.record()["result"] == {"answer": 42}


def _slow_job(root: Path, calls: Path) -> None:
    def make(folder: Path) -> dict:
        with open(calls, "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        return {"maker": os.getpid()}

    record, reused = artifact(root).produce(make)
    with open(calls, "a") as file:
        file.write(f"reused={reused} maker={record['result']['maker']}\n")


def test_two_processes_make_a_shared_result_once(tmp_path):
    context = multiprocessing.get_context("fork")  # a spawned process would import everything again
    calls = tmp_path / "calls"
    jobs = [context.Process(target=_slow_job, args=(tmp_path / "store", calls)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    assert [job.exitcode for job in jobs] == [0, 0]
    lines = calls.read_text().splitlines()
    assert lines.count("made") == 1
    (maker,) = {line.split("maker=")[1] for line in lines if "maker=" in line}
    assert int(maker) in [job.pid for job in jobs]
    assert sorted(line.split()[0] for line in lines if "reused" in line) == ["reused=False", "reused=True"]


class SafetensorError(Exception):
    """As safetensors raises it: no errno."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_a_user_error_and_keeps_what_was_done(error, tmp_path):
    result = artifact(tmp_path)

    def fill_the_disk(folder: Path) -> dict:
        (folder / "first task").write_text("done")
        raise error

    with pytest.raises(UserError, match=f"no space left on the device that holds {tmp_path} while running merge"):
        result.produce(fill_the_disk)
    assert not result.done
    assert (result.partial / "first task").read_text() == "done"
    assert result.produce(make_nothing)[1] is False


def test_a_disk_that_is_full_for_a_training_checkpoint(tmp_path):
    """As torch.save itself puts it, which names neither the disk nor its space."""

    def make(folder: Path) -> dict:
        torch.save({"moments": torch.zeros(100_000)}, "/dev/full")
        return {}

    with pytest.raises(UserError, match="no space left on the device"):
        artifact(tmp_path).produce(make)


def test_other_errors_pass_unchanged(tmp_path):
    def fail(folder: Path) -> dict:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "weights")

    with pytest.raises(FileNotFoundError):
        artifact(tmp_path).produce(fail)


def test_store_of_another_format_is_refused(tmp_path):
    check_store(tmp_path / "store", STAGES)
    assert json.loads((tmp_path / "store" / "store.json").read_text()) == {"format": STORE_FORMAT}
    check_store(tmp_path / "store", STAGES)
    write_json(tmp_path / "store" / "store.json", {"format": 99})
    with pytest.raises(UserError, match="is a store of format 99, this version reads 1"):
        check_store(tmp_path / "store", STAGES)


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"other": 1}', ""])
def test_damaged_store_is_refused(content, tmp_path):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(
        UserError, match=r"store.json is not what a store begins with \([^l].*replace it by a file with {\"f"
    ):
        check_store(tmp_path, STAGES)


@pytest.mark.parametrize("name", ["users", "calibrate", "merge", "evaluate"])
def test_what_stops_every_job_is_refused_before_the_first_stage(name, tmp_path):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=f"^{tmp_path}/{name} is not a folder: move it away"):
        check_store(tmp_path, STAGES)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"^{tmp_path}/{name} is a link to nowhere, which is no folder: move it away"):
        check_store(tmp_path, STAGES)
    (tmp_path / "nowhere").mkdir()  # on another disk, say
    check_store(tmp_path, STAGES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"scores": [1.0, float("-inf")]}])
def test_write_json_refuses_what_is_not_a_number(value, tmp_path):
    write_json(tmp_path / "scores.json", {"old": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "scores.json", value)
    assert json.loads((tmp_path / "scores.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_write_text_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_text(tmp_path / "note", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "note", "new")
    assert (tmp_path / "note").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


NESTED = """
import sys
from pathlib import Path
from slm_pipeline.store.artifact import Artifact

def outer(folder):
    block = bytearray(300 * 10**6)
    del block
    inside.produce(lambda _: {})
    return {}

around, inside = (Artifact(Path(sys.argv[1]), "merge", {"inner": inner}) for inner in (False, True))
around.produce(outer)
print(*(result.record()["peak_memory_gb"] for result in (around, inside)))
"""


def test_a_result_made_inside_anothers_making_leaves_the_outer_peak(tmp_path):
    """In a process of its own: one that has run other tests gives memory back when it likes."""
    child = subprocess.run([sys.executable, "-c", NESTED, str(tmp_path)], check=True, capture_output=True, text=True)
    around, inside = map(float, child.stdout.split())
    assert around > inside + 0.25
