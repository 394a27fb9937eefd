"""``slm-store`` on a store made by hand."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock

from slm_pipeline.commands import store
from slm_pipeline.store import checksums, users
from slm_pipeline.store.files import write_json

RESULTS = {
    "calibrate": {"source": "bundled", "num_samples": 10, "seq_len": 128, "num_tokens": 1280},
    "merge": {"num_layers": {"dense": 30, "pruned": 24}, "layers": "0-21 {22-24} 25-29"},
    "evaluate": {
        "measure": "perplexity",
        "label": "perplexity/notes.txt",
        "numbers": {"": {"value": 15.234, "unit": "perplexity", "higher_is_better": False}},
    },
}


def add(output_dir: Path, stage: str, key: str, num_bytes: int, *, days: float = 0, used_by: str | None = None) -> Path:
    folder = output_dir / "store" / stage / key
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * num_bytes)
    if "." not in key:
        about = {"seconds": 1, "peak_memory_gb": 1, "provenance": {"versions": {}}, "files": checksums.describe(folder)}
        record = {"stage": stage, "key": key, "result": RESULTS.get(stage, {}), **about}
        write_json(folder / "stage.json", checksums.sealed(record))
    for file in folder.iterdir():
        os.utime(file, (time.time() - 86400 * days,) * 2)
    if used_by:
        link = output_dir / used_by / stage
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder, link.parent))
    return folder


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """A store of an earlier version: no run has noted what it uses, links alone tell."""
    add(tmp_path, "calibrate", "aaaa", 5, used_by="runs/slm/now")
    add(tmp_path, "merge", "bbbb", 3_000_000, used_by="sweeps/ratios/now/0")
    add(tmp_path, "merge", "cccc", 2_000_000, days=3)
    add(tmp_path, "recover", "dddd.partial", 1_500)
    add(tmp_path, "evaluate", "eeee", 400, days=9)
    return tmp_path


def use(output_dir: Path, run_dir: Path, *results: str) -> Path:
    """As a run notes it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    users.begin(output_dir / "store", run_dir)
    for result in results:
        users.note(output_dir / "store" / result, run_dir)
    return run_dir


def run(capsys, *arguments: str) -> str:
    with mock.patch.object(sys, "argv", ["slm-store", *arguments]):
        store.main()
    return capsys.readouterr().out


def left(output_dir: Path) -> set[str]:
    return {path.name for path in (output_dir / "store").glob("*/*") if path.is_dir()}


def test_list(output_dir, capsys):
    head, *lines = run(capsys, "list", "--output-dir", str(output_dir)).splitlines()
    assert head.split() == ["stage", "key", "size", "age", "used", "by", "what", "it", "is"]
    assert [line.split()[1] for line in lines[:-1]] == ["bbbb", "cccc", "dddd.partial", "eeee", "aaaa"]  # largest first
    merged, unused, partial, scores, calibration = lines[:-1]
    assert "3.0 MB" in merged
    assert "    1 run  " in merged
    assert "30 -> 24 layers: 0-21 {22-24} 25-29" in merged
    assert "0 runs" in unused
    assert "3.0 d" in unused
    assert "1.5 kB" in partial
    assert partial.endswith("unfinished")
    assert scores.endswith("perplexity/notes.txt 15.23")
    assert calibration.endswith("bundled, 10 x 128 tokens")
    assert lines[-1].startswith("5 results, 5.0 MB")


def test_list_says_of_which_model_a_number_is_and_what_was_trained(tmp_path, capsys):
    numbers = RESULTS["evaluate"]
    for stage, key, identity, result in (
        ("merge", "a1", {"model": "m:float32", "method": "slm"}, {**RESULTS["merge"], "checkpoint": "c"}),
        ("repair", "b1", {"model": "m:float32", "checkpoint": "c", "repair": "refit"}, {"checkpoint": "r"}),
        ("recover", "c1", {"checkpoint": "r", "recovery": "lora"}, {}),
        ("evaluate", "d1", {"checkpoint": "m:float32", "measure": "perplexity"}, numbers),
        ("evaluate", "d2", {"checkpoint": "c", "measure": "perplexity"}, numbers),
        ("evaluate", "d3", {"checkpoint": "r", "measure": "perplexity"}, numbers),
        ("evaluate", "d4", {"checkpoint": "recovered:c1", "measure": "perplexity"}, numbers),
        ("evaluate", "d5", {"checkpoint": "of another store", "measure": "perplexity"}, numbers),
    ):
        folder = add(tmp_path, stage, key, 5)
        record = checksums.read_sealed(folder / "stage.json") | {"identity": identity, "result": result}
        write_json(folder / "stage.json", checksums.sealed(record))
    lines = run(capsys, "list", "--output-dir", str(tmp_path)).splitlines()[1:-1]
    said = {line.split()[1]: line.partition(" runs  ")[2] for line in lines}
    assert said == {
        "a1": "slm: 30 -> 24 layers: 0-21 {22-24} 25-29",
        "b1": "refit after slm, 24 layers",
        "c1": "lora after refit",
        "d1": "dense: perplexity/notes.txt 15.23",
        "d2": "slm, 24 layers: perplexity/notes.txt 15.23",
        "d3": "refit: perplexity/notes.txt 15.23",
        "d4": "lora: perplexity/notes.txt 15.23",
        "d5": "perplexity/notes.txt 15.23",
    }


def test_clean_only_says_what_it_would_remove(output_dir, capsys):
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--unrecorded")
    assert "would remove 3 results that no run uses" in out
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial", "eeee"}


def test_clean_leaves_what_no_run_has_noted_unless_told_that_none_uses_it(output_dir, capsys):
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes")
    reason = "no run has noted that it uses it, as in stores of earlier versions: --unrecorded if none does"
    assert out.count(f"    stays: {reason}\n") == 3
    assert "removed 0 results" in out
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial", "eeee"}
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--unrecorded")
    assert "removed 3 results, 2.0 MB" in out
    assert left(output_dir) == {"aaaa", "bbbb"}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--older-than", "5"], {"aaaa", "bbbb", "cccc", "dddd.partial"}),
        (["--older-than", "1", "--stage", "merge"], {"aaaa", "bbbb", "dddd.partial", "eeee"}),
        (["--stage", "calibrate"], {"aaaa", "bbbb", "cccc", "dddd.partial", "eeee"}),
    ],
)
def test_clean_only_some(options, kept, output_dir, capsys):
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--unrecorded", *options)
    assert left(output_dir) == kept


def test_clean_leaves_what_a_job_is_working_on(output_dir, capsys):
    with FileLock(output_dir / "store" / "recover" / "dddd.lock"):
        out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--unrecorded")
    assert f"in use, left alone: {output_dir}/store/recover/dddd.partial" in out
    assert "removed 2 results" in out
    assert left(output_dir) == {"aaaa", "bbbb", "dddd.partial"}


def test_clean_leaves_what_a_run_uses_wherever_its_folder_is(output_dir, tmp_path_factory, capsys):
    final = use(output_dir, tmp_path_factory.mktemp("results") / "final", "merge/cccc", "evaluate/eeee")
    use(output_dir, final, "merge/cccc", "recover/dddd")  # run again in the same folder, with other options
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--gone", "--unrecorded")
    assert "removed 1 results" in out
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial"}


def test_a_run_folder_that_is_gone_was_deleted_or_moved(output_dir, capsys):
    final = use(output_dir, output_dir / "results" / "final", "merge/cccc")
    shutil.rmtree(final)
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--stage", "merge")
    assert f"    stays: used by {final}, which was deleted or moved: --gone if deleted\n" in out
    assert "cccc" in left(output_dir)
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--stage", "merge", "--gone")
    assert left(output_dir) == {"aaaa", "bbbb", "dddd.partial", "eeee"}
    assert not list((output_dir / "store" / "users").iterdir())  # nothing is left to be known of it


def test_runs_and_store_moved_together_still_know_each_other(output_dir, tmp_path_factory, capsys):
    use(output_dir, output_dir / "results" / "final", "merge/cccc")
    moved = tmp_path_factory.mktemp("elsewhere") / "outputs"
    shutil.move(output_dir, moved)
    out = run(capsys, "clean", "--output-dir", str(moved), "--yes", "--stage", "merge", "--gone")
    assert "removed 0 results" in out


def test_a_store_reached_through_a_link_is_the_same(output_dir, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other")
    (other / "store").symlink_to(output_dir / "store")
    use(other, other / "results", "merge/cccc")
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--unrecorded", "--gone")
    assert left(output_dir) == {"aaaa", "bbbb", "cccc"}


def test_a_disk_that_is_not_mounted_proves_nothing(output_dir, capsys):
    final = use(output_dir, output_dir / "disk" / "final", "merge/cccc")
    (file,) = (output_dir / "store" / "users").iterdir()
    known = checksums.read_sealed(file)
    assert os.path.ismount(known["mount"])
    write_json(file, checksums.sealed({**known, "mount": str(final.parent)}))
    shutil.rmtree(final)
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--stage", "merge", "--gone")
    assert f"    stays: used by {final}, and no disk is mounted at {final.parent}\n" in out
    assert "cccc" in left(output_dir)


def test_a_run_folder_nobody_may_read_proves_nothing(output_dir, capsys, monkeypatch):
    final = use(output_dir, output_dir / "results" / "final", "merge/cccc")
    listdir = os.listdir

    def refuse(folder):
        if Path(folder) == final:
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--stage", "merge", "--gone")
    assert f"    stays: used by {final}, which cannot be read: Permission denied\n" in out
    assert "cccc" in left(output_dir)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_note_may_name_anything(content, output_dir, capsys):
    use(output_dir, output_dir / "results" / "final", "merge/bbbb")
    (file,) = (output_dir / "store" / "users").iterdir()
    file.write_bytes(content)
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--gone", "--unrecorded")
    assert out.count(f"    stays: {file} cannot be read and may name it (") == 3
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial", "eeee"}
    file.unlink()
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--gone", "--unrecorded")
    assert left(output_dir) == {"aaaa", "bbbb"}


def test_what_a_run_notes_while_the_store_is_cleaned_stays(output_dir, capsys, monkeypatch):
    """A run notes what it uses before it asks for the lock that the cleaning holds."""
    refresh = users.Users.refresh

    def late(known):
        if hasattr(known, "_ready"):
            use(output_dir, output_dir / "results" / "final", "merge/cccc")
        known._ready = True
        refresh(known)

    monkeypatch.setattr(users.Users, "refresh", late)
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--unrecorded", "--stage", "merge")
    assert f"in use by now, left alone: {output_dir}/store/merge/cccc: used by {output_dir}/results/final" in out
    assert "cccc" in left(output_dir)


def test_what_a_run_reads_from_another_store_is_noted_there(output_dir, tmp_path_factory):
    write_json(output_dir / "store" / "store.json", {"format": 1})
    (output_dir / "store" / "merge" / "cccc" / "model").mkdir()
    run_dir = tmp_path_factory.mktemp("run")
    users.note_path(str(output_dir / "store" / "merge" / "cccc" / "model"), run_dir)
    users.note_path(str(output_dir), run_dir)
    users.note_path(None, run_dir)
    assert users.Users(output_dir).of("merge/cccc").runs == {run_dir}


def test_verify_reads_every_file(output_dir, capsys):
    status, out = verify(output_dir, capsys)
    assert (status, out.splitlines()[-1]) == (0, "4 results: 4 as they were written, 0 without checksums, 0 damaged")
    weights = output_dir / "store" / "merge" / "cccc" / "weights"
    weights.write_bytes(b"x" * 1_999_999 + b"y")
    without = output_dir / "store" / "evaluate" / "eeee" / "stage.json"
    record = {name: value for name, value in json.loads(without.read_text()).items() if name != "files"}
    del record["checksum"]
    write_json(without, record)  # of a version that kept none
    status, out = verify(output_dir, capsys)
    assert status == 1
    assert f"{weights.parent}: weights does not fit its checksum\n" in out
    assert f"{without.parent}: of a version that kept no checksums; it can be read\n" in out
    assert "4 results: 2 as they were written, 1 without checksums, 1 damaged\n" in out
    assert verify(output_dir, capsys, "--stage", "calibrate")[0] == 0


def verify(output_dir: Path, capsys, *options: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run(capsys, "verify", "--output-dir", str(output_dir), *options)
    return int(stop.value.code), capsys.readouterr().out


def test_temporary_files_of_killed_writes_are_swept(output_dir, capsys):
    old, new = (output_dir / "store" / name for name in (".store.json.0a1b.tmp", "merge/.x.0a1b.tmp"))
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 2 * store.HOUR,) * 2)
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes")
    assert (old.exists(), new.exists()) == (False, True)  # a write may go on


def test_no_store(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(capsys, "list", "--output-dir", str(tmp_path))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no store; name another with --output-dir\n"


def test_result_half_deleted_does_not_look_whole(output_dir, capsys, monkeypatch):
    def interrupted(folder: Path) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "remove", interrupted)
        with pytest.raises(SystemExit):
            run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--unrecorded", "--stage", "evaluate")
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial", "eeee.old"}
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--stage", "evaluate")
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial"}


def test_what_is_not_of_the_store_is_named_and_left_alone(output_dir, capsys):
    foreign = output_dir / "store" / "calibrate" / "zz"
    foreign.write_text("mine")
    status, out = verify(output_dir, capsys)
    assert status == 0
    assert f"{foreign}: not of this store: move it away\n4 results: 4 as they were written" in out
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--unrecorded")
    assert foreign.read_text() == "mine"
    assert "not of this store: move it away" in run(capsys, "list", "--output-dir", str(output_dir))


def test_verify_and_list_say_what_stops_every_job(output_dir, capsys):
    (output_dir / "store" / "store.json").write_text("[]")
    (output_dir / "store" / "users").symlink_to("nowhere")
    status, out = verify(output_dir, capsys)
    assert status == 1
    for said in (out, run(capsys, "list", "--output-dir", str(output_dir))):
        assert f"{output_dir}/store/store.json is not what a store begins with (it names no format)" in said
        assert f"{output_dir}/store/users is a link to nowhere, which is no folder" in said


def test_a_run_counts_once_by_its_link_and_by_what_it_noted(output_dir, capsys, monkeypatch):
    use(output_dir, output_dir / "runs" / "slm" / "now", "calibrate/aaaa")
    monkeypatch.chdir(output_dir.parent)
    _, line, _ = run(capsys, "list", "--output-dir", output_dir.name, "--stage", "calibrate").splitlines()
    assert " 1 run " in line


def test_a_folder_in_place_of_a_note_is_replaced(output_dir, tmp_path, caplog):
    run_dir = use(output_dir, tmp_path / "run", "merge/cccc")
    (note,) = (output_dir / "store" / "users").glob("*.json")
    note.unlink()
    (note / "inside").mkdir(parents=True)
    use(output_dir, run_dir, "merge/cccc")
    assert users.Users(output_dir).of("merge/cccc").runs == {run_dir}
    assert f"{note} is written anew: {note.name} is damaged: not a file" in caplog.text
