"""Stage results on disk, addressed by what they depend on.

    <output_dir>/store/<stage>/<key>/           files + stage.json
    <output_dir>/store/<stage>/<key>.partial/   unfinished work, continued by the next attempt
    <output_dir>/store/<stage>/<key>.lock       held while somebody works on it

The key is a hash of the stage's identity: every option and input that its result depends on. A result is complete
when its folder has been renamed into place, so a killed job never leaves half a result that looks whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from slm_pipeline import memory, provenance
from slm_pipeline.errors import UserError

STORE_FORMAT = 1


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused with ``ValueError``."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def give_usual_modes(folder: Path) -> None:
    """Give every file under ``folder`` the mode of a newly made one: some libraries leave theirs to the owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def is_held(lock: Path) -> bool:
    """Whether a living process holds the lock file, or may hold it; asking needs no right to write."""
    try:
        file = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who ask do not see one another
    except OSError:  # it is held, or this file system cannot say
        return True
    finally:
        os.close(file)
    return False


def digest(value: Any) -> str:
    """16 hexadecimal digits of the sha256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """One stage's result, finished or not. ``identity`` is everything the result depends on, as JSON."""

    root: Path
    stage: str
    identity: Mapping[str, Any]

    @property
    def key(self) -> str:
        return digest([STORE_FORMAT, self.stage, self.identity])

    @property
    def path(self) -> Path:
        return self.root / self.stage / self.key

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.key}.partial")

    @property
    def lock(self) -> Path:
        return self.path.with_name(f"{self.key}.lock")

    @property
    def done(self) -> bool:
        return (self.path / "stage.json").is_file()

    def record(self) -> dict[str, Any]:
        """The content of ``stage.json`` of a finished result."""
        return json.loads((self.path / "stage.json").read_text(encoding="utf-8"))

    def produce(
        self, make: Callable[[Path], dict[str, Any]], *, is_whole: Callable[[], bool] | None = None, force: bool = False
    ) -> tuple[dict[str, Any], bool]:
        """Make the result unless it is there, or wait for the job that is making it.

        Args:
            make: fills the folder it is given and returns what ``stage.json`` should hold under ``"result"``. The
                folder may hold what an earlier, interrupted attempt left there.
            is_whole: whether a finished result has all that is wanted; else it is made again, from a copy of what it
                has. None: a finished result is enough.
            force: make it anew although it is there; the old result stays until the new one is complete.

        Returns:
            The content of ``stage.json``, and whether a finished result was reused.

        Raises:
            UserError: no space left on the device.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.lock):
            if self.done and not force and (is_whole is None or is_whole()):
                return self.record(), True
            if force or self.done:
                shutil.rmtree(self.partial, ignore_errors=True)
            try:
                if self.done and not force:
                    shutil.copytree(self.path, self.partial, ignore=shutil.ignore_patterns("stage.json"))
                self.partial.mkdir(exist_ok=True)
                write_json(self.partial / "identity.json", self.identity)
                record = self._work(make)
                self._put_in_place()
            except Exception as error:
                if not _no_space(error):
                    raise
                raise UserError(
                    f"no space left on the device that holds {self.root} while running {self.stage}; what is finished"
                    " is kept: free some space (slm-store clean) and run the same command again"
                ) from error
            return record, False

    def _work(self, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        started, clock = datetime.now(timezone.utc), time.monotonic()
        memory.reset_peak()
        result = make(self.partial)
        record = {
            "format": STORE_FORMAT,
            "stage": self.stage,
            "key": self.key,
            "identity": self.identity,
            "result": result,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
            "peak_memory_gb": memory.peak_gb(),
            "provenance": provenance.collect(),
        }
        write_json(self.partial / "stage.json", record)
        return record

    def _put_in_place(self) -> None:
        old = self.path.with_name(f"{self.key}.old")
        shutil.rmtree(old, ignore_errors=True)
        give_usual_modes(self.partial)
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(self.partial, self.path)
        shutil.rmtree(old, ignore_errors=True)


def _no_space(error: Exception) -> bool:
    """Whether the disk is full; safetensors says so in words alone, torch.save that less was written than meant."""
    full = (errno.ENOSPC, errno.EDQUOT)
    words = (os.strerror(errno.ENOSPC), "unexpected pos")
    return getattr(error, "errno", None) in full or any(phrase in str(error) for phrase in words)


def check_store_format(root: Path) -> None:
    """Raise `UserError` if ``root`` holds a store that this version cannot read; makes nothing."""
    marker = root / "store.json"
    if not marker.is_file():
        return
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{marker} is not what a store begins with ({error}); choose another output_dir=") from error
    if found != STORE_FORMAT:
        raise UserError(
            f"{root} is a store of format {found}, this version reads {STORE_FORMAT}; choose another output_dir="
        )


def check_store(root: Path) -> None:
    """Create the store or make sure that this version can read it.

    Raises:
        UserError: the folder holds a store of another format, or cannot be written.
    """
    marker = root / "store.json"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            write_json(marker, {"format": STORE_FORMAT})
    except OSError as error:
        raise UserError(f"cannot write to output_dir: {root}: {error.strerror}; choose another output_dir=") from error
    if not os.access(root, os.W_OK):
        raise UserError(f"cannot write to output_dir: {root} is read-only; choose another output_dir=")
    check_store_format(root)
