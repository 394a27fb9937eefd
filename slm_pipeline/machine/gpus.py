"""One GPU for each process of a multirun: what ``hydra/launcher=gpus`` does. Imports no torch.

The launcher's worker processes run one job after another. Each takes a GPU before its first job and keeps it until it
ends: a lock file for every place on a GPU, released by the kernel however the process ends. So no two workers share a
place, nor do those of another study of the same user on this host.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import shutil
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

from filelock import FileLock, Timeout

from slm_pipeline.errors import UserError

log = logging.getLogger(__name__)

_place: FileLock | None = None  # held until this process ends


def visible() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; empty where there are none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def models() -> list[str]:
    """The names of this machine's GPUs, as its driver lists them; empty where it lists none."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found


def memory() -> list[int]:
    """Bytes of each of `visible`, as ``nvidia-smi`` lists them; empty where it does not."""
    with suppress(ValueError):
        return [int(line) * 2**20 for line in _listed("memory.total", tuple(visible()))]
    return []


def number_and_name() -> str | None:
    """``2 x NVIDIA H100``: `visible`, as ``nvidia-smi`` or the driver names them; None where neither does. Nothing is
    left on the GPUs, as by asking CUDA."""
    here = visible()
    names = _listed("name", tuple(here)) or models()
    return f"{len(here)} x {', '.join(sorted(set(names)))}" if here and names else None


@functools.cache
def _listed(what: str, gpus: tuple[str, ...]) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", f"--id={','.join(gpus)}"]
    if gpus and shutil.which(command[0]) is not None:
        with suppress(OSError, subprocess.SubprocessError):
            listed = subprocess.run(command, capture_output=True, text=True, timeout=20)
            return listed.stdout.splitlines() if listed.returncode == 0 else []
    return []


def in_words(device: str) -> str:
    """What ``model.device`` comes to on this machine: ``cpu``, or the kind of GPU, with their number if several."""
    names = [] if device == "cpu" else visible()
    if not names:
        return "cpu"
    known = sorted(set(models())) or ["GPU"]
    return f"{len(names)} x {', '.join(known)}" if device == "balanced" and len(names) > 1 else ", ".join(known)


def check_device(device: str, num_gpus: int) -> None:
    """Raise `UserError` if ``model.device`` asks for a GPU and there is none of that number."""
    if device == "balanced" and not num_gpus:
        raise UserError("model.device=balanced spreads the model over GPUs; this machine has none")
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= num_gpus:
        raise UserError(
            f"model.device={device!r}: this machine has {num_gpus} GPUs; use model.device=cpu or auto, or name the GPUs"
            " where the driver does not list them, as in CUDA_VISIBLE_DEVICES=0,1"
        )


def check(num_workers: int) -> None:
    """Raise `UserError` unless there is a GPU to run on, and somebody to run there."""
    if not visible():
        raise UserError(
            "hydra/launcher=gpus runs a job on each GPU, and this machine shows none: use joblib or basic, or name the"
            " GPUs where the driver does not list them, as in CUDA_VISIBLE_DEVICES=0,1"
        )
    if num_workers < 1:
        raise UserError(f"hydra.launcher.n_jobs={num_workers} must be at least 1: jobs at a time on all GPUs together")
    _lock_folder()


def _lock_folder() -> Path:
    """Where this user's locks lie: in a folder of the temporary directory that nobody else can have made or write to.

    Raises:
        UserError: somebody else was there first.
    """
    folder = Path(tempfile.gettempdir()) / f"slm_pipeline_gpus_{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()  # not what a link leads to
    if not stat.S_ISDIR(state.st_mode):
        wrong = "is not a folder"
    elif state.st_uid != os.getuid():
        wrong = f"belongs to user {state.st_uid}"
    elif state.st_mode & 0o077:
        wrong = f"is open to other users (mode {stat.S_IMODE(state.st_mode):o}, must be 700)"
    else:
        return folder
    raise UserError(f"{folder}, where the locks of the GPUs belong, {wrong}: remove it, or set TMPDIR to another place")


def take_one(num_workers: int) -> str:
    """Let this process see a single GPU, the least taken one, for the rest of its life; waits for a free place.

    Args:
        num_workers: processes that run at a time, at least 1; more than there are GPUs share them evenly.

    Returns:
        The GPU's name, which is now ``CUDA_VISIBLE_DEVICES``.
    """
    global _place
    if _place is not None:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    names = visible()
    folder = _lock_folder()
    places = list(product(range(math.ceil(num_workers / len(names))), names))
    waited = False
    while True:
        for number, name in places:
            lock = FileLock(folder / f"{name}.{number}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _place = lock
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            return name
        if not waited:
            log.info("all GPUs are taken by other studies; waiting")
            waited = True
        time.sleep(1)
