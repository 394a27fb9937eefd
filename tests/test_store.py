"""``slm-store`` on a store made by hand."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock

from slm_pipeline.artifacts import write_json
from slm_pipeline.commands import store

RESULTS = {
    "calibrate": {"source": "bundled", "num_samples": 10, "seq_len": 128, "num_tokens": 1280},
    "merge": {"num_layers": {"dense": 30, "pruned": 24}, "layers": "0-21 {22-24} 25-29"},
    "evaluate": {"zero_shot": {"boolq": {"score": 60.0}, "piqa": {"score": 70.0}}},
}


def add(output_dir: Path, stage: str, key: str, num_bytes: int, *, days: float = 0, used_by: str | None = None) -> Path:
    folder = output_dir / "store" / stage / key
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * num_bytes)
    if "." not in key:
        write_json(folder / "stage.json", {"result": RESULTS.get(stage, {})})
    for file in folder.iterdir():
        os.utime(file, (time.time() - 86400 * days,) * 2)
    if used_by:
        link = output_dir / used_by / stage
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder, link.parent))
    return folder


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    add(tmp_path, "calibrate", "aaaa", 5, used_by="runs/slm/now")
    add(tmp_path, "merge", "bbbb", 3_000_000, used_by="sweeps/ratios/now/0")
    add(tmp_path, "merge", "cccc", 2_000_000, days=3)
    add(tmp_path, "recover", "dddd.partial", 1_500)
    add(tmp_path, "evaluate", "eeee", 400, days=9)
    return tmp_path


def run(capsys, *arguments: str) -> str:
    with mock.patch.object(sys, "argv", ["slm-store", *arguments]):
        store.main()
    return capsys.readouterr().out


def left(output_dir: Path) -> set[str]:
    return {path.name for path in (output_dir / "store").glob("*/*") if path.is_dir()}


def test_list(output_dir, capsys):
    lines = run(capsys, "list", "--output-dir", str(output_dir)).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["bbbb", "cccc", "dddd.partial", "eeee", "aaaa"]  # largest first
    merged, unused, partial, scores, calibration = lines[:-1]
    assert "3.0 MB" in merged
    assert "1 runs" in merged
    assert "30 -> 24 layers: 0-21 {22-24} 25-29" in merged
    assert "0 runs" in unused
    assert "3.0 d" in unused
    assert "1.5 kB" in partial
    assert partial.endswith("unfinished")
    assert scores.endswith("boolq, piqa")
    assert calibration.endswith("bundled, 10 x 128 tokens")
    assert lines[-1].startswith("5 results, 5.0 MB")


def test_clean_only_says_what_it_would_remove(output_dir, capsys):
    out = run(capsys, "clean", "--output-dir", str(output_dir))
    assert "would remove 3 results" in out
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial", "eeee"}


def test_clean_removes_what_no_run_links_to(output_dir, capsys):
    out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes")
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
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes", *options)
    assert left(output_dir) == kept


def test_clean_leaves_what_a_job_is_working_on(output_dir, capsys):
    with FileLock(output_dir / "store" / "recover" / "dddd.lock"):
        out = run(capsys, "clean", "--output-dir", str(output_dir), "--yes")
    assert f"in use, left alone: {output_dir}/store/recover/dddd.partial" in out
    assert "removed 2 results" in out
    assert left(output_dir) == {"aaaa", "bbbb", "dddd.partial"}


def test_no_store(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(capsys, "list", "--output-dir", str(tmp_path))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no store; name another with --output-dir\n"


def test_result_half_deleted_does_not_look_whole(output_dir, capsys, monkeypatch):
    def interrupted(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--stage", "evaluate")
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial", "eeee.old"}
    run(capsys, "clean", "--output-dir", str(output_dir), "--yes", "--stage", "evaluate")
    assert left(output_dir) == {"aaaa", "bbbb", "cccc", "dddd.partial"}
