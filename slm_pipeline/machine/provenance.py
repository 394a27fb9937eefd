"""Where a result came from: code, versions, machine."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import slm_pipeline
from slm_pipeline.machine import gpus

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
    """Name of the accelerator in use, or of the processor. Where nothing runs on a GPU in this process, as when others
    do the work, nothing is put there to learn it."""
    torch = sys.modules.get("torch")
    if (torch is None or not torch.cuda.is_initialized()) and (found := gpus.number_and_name()) is not None:
        return found
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}"


def collect() -> dict[str, Any]:
    """What ``stage.json`` says about the code and machine that made a result."""
    return {"git_commit": git_commit(), "versions": versions(), "device": device_name(), "argv": sys.argv}
