"""Where a result came from: code, versions, machine, and how much memory it took."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import slm_pipeline

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "lm_eval", "datasets", "hydra-core", "wandb")


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout this package runs from, ``-dirty`` appended when it has changes; None outside git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of the installed packages that results depend on."""
    found = {"slm_pipeline": slm_pipeline.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """Name of the accelerator in use, or of the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}"


def collect() -> dict[str, Any]:
    """What ``stage.json`` says about the code and machine that made a result."""
    return {"git_commit": git_commit(), "versions": versions(), "device": device_name(), "argv": sys.argv}


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory: of the accelerators, and of this process where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5); getrusage follows
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():  # else nothing lies there yet, and torch refuses
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_memory_gb() -> float:
    """Peak memory in 10^9 bytes since the last reset: of all accelerators, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        total = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(total / 1e9, 3)
