"""``hydra/launcher=gpus``: each worker process sees one GPU, and no two the same place on it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile

import pytest
from conftest import run_slm

from slm_pipeline.errors import UserError
from slm_pipeline.machine import gpus, provenance

TAKE = """
import sys, time
from slm_pipeline.machine import gpus
first = gpus.take_one(int(sys.argv[1]))
assert gpus.take_one(int(sys.argv[1])) == first
print(first, *gpus.visible(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def take(tmp_path, monkeypatch):
    """Starts a process that takes a GPU of two and keeps it; what it sees."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8d96")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    processes = []

    def start(num_workers: int, wait: bool = True):
        process = subprocess.Popen(
            [sys.executable, "-c", TAKE, str(num_workers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process, process.stdout.readline().split() if wait else None

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_workers_are_spread_evenly_and_wait_for_a_free_place(take):
    seen = [take(4) for _ in range(4)]
    assert [names for _, names in seen] == [["3", "3"], ["GPU-8d96"] * 2, ["3", "3"], ["GPU-8d96"] * 2]
    fifth, _ = take(4, wait=False)
    with pytest.raises(subprocess.TimeoutExpired):
        fifth.wait(2)
    seen[1][0].kill()  # however a process ends, its place is free
    assert fifth.stdout.readline().split() == ["GPU-8d96"] * 2


@pytest.mark.parametrize(
    ("mode", "owner", "wrong"),
    [
        (0o755, os.getuid(), "is open to other users (mode 755, must be 700)"),
        (0o700, os.getuid() + 1, f"belongs to user {os.getuid()}"),
        (None, os.getuid(), "is not a folder"),
    ],
)
def test_a_lock_folder_of_somebody_else_is_refused(mode, owner, wrong, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: owner)
    folder = tmp_path / f"slm_pipeline_gpus_{owner}"
    if mode is None:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to("elsewhere")
    else:
        folder.mkdir()
        folder.chmod(mode)
    with pytest.raises(UserError) as error:
        gpus.check(1)
    assert str(error.value) == (
        f"{folder}, where the locks of the GPUs belong, {wrong}: remove it, or set TMPDIR to another place"
    )


def test_gpus_in_sight(monkeypatch):
    for given, names in (("0, 2", ["0", "2"]), ("", []), ("-1", []), ("GPU-1", ["GPU-1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert gpus.visible() == names
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="this machine shows none"):
        gpus.check(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    gpus.check(1)
    with pytest.raises(UserError, match="n_jobs=-1 must be at least 1"):
        gpus.check(-1)


def test_no_gpu_is_said_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    outcome = run_slm("-m", "hydra/launcher=gpus", "model=random", "seed=1,2")
    assert outcome.status == 2
    assert outcome.err == (
        "error: hydra/launcher=gpus runs a job on each GPU, and this machine shows none: use joblib or basic, or"
        " name the GPUs where the driver does not list them, as in CUDA_VISIBLE_DEVICES=0,1\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_gpu_is_named_without_asking_cuda(tmp_path, monkeypatch):
    """By nvidia-smi for those that are visible; else by the driver; where nothing runs on one it is not touched."""
    listing = tmp_path / "nvidia-smi"
    listing.write_text(
        '#!/bin/sh\ntest "$1 $3" = "--query-gpu=name --id=2,3" && printf "NVIDIA H100\\nNVIDIA H100\\n"\n'
    )
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert gpus.number_and_name() == provenance.device_name() == "2 x NVIDIA H100"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # which this nvidia-smi refuses
    monkeypatch.setattr(gpus, "models", lambda: ["NVIDIA H200", "NVIDIA H200"])
    assert gpus.number_and_name() == "1 x NVIDIA H200"
    monkeypatch.setattr(gpus, "models", list)
    assert gpus.number_and_name() is None
    assert provenance.device_name() == f"CPU {platform.machine()}"
    gpus._listed.cache_clear()
