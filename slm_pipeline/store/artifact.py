"""Stage results on disk, addressed by what they depend on.

    <output_dir>/store/<stage>/<key>/           files + stage.json, which has their sizes and checksums
    <output_dir>/store/<stage>/<key>.partial/   unfinished work, continued by the next attempt
    <output_dir>/store/<stage>/<key>.lock       held while somebody works on it

The key is a hash of the stage's identity: every option and input that its result depends on. A result is complete
when its folder has been renamed into place, so a killed job never leaves half a result that looks whole. Nothing that
is there is believed unless its checksum says so: a finished result that was damaged is made again, and of unfinished
work the next attempt gets what `note_complete` has noted.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from slm_pipeline.errors import UserError
from slm_pipeline.machine import memory, provenance
from slm_pipeline.store import checksums, users
from slm_pipeline.store.checksums import digest
from slm_pipeline.store.files import give_usual_modes, remove, write_json
from slm_pipeline.store.heard import FILE, Heard, note
from slm_pipeline.store.record import read_record, result_fault
from slm_pipeline.store.unfinished import copy_complete, drop_incomplete

log = logging.getLogger(__name__)

STORE_FORMAT = 1


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
        """Whether there is a finished result, as far as sizes and the content of small files tell."""
        return result_fault(self.path, self.stage, whole=False) is None

    @property
    def intact(self) -> bool:
        """Whether there is a finished result, every file read, once in a process: for whoever goes on to read it."""
        return result_fault(self.path, self.stage, whole=True) is None

    def record(self) -> dict[str, Any]:
        """The content of ``stage.json`` of a finished result.

        Raises:
            UserError: it is not there, or damaged.
        """
        return read_record(self.path, self.stage)

    def produce(
        self, make: Callable[[Path], dict[str, Any]], *, is_whole: Callable[[], bool] | None = None, force: bool = False
    ) -> tuple[dict[str, Any], bool]:
        """Make the result unless it is there, or wait for the job that is making it.

        Args:
            make: fills the folder it is given and returns what ``stage.json`` should hold under ``"result"``. The
                folder may hold what an earlier, interrupted attempt left there and noted with `note_complete`.
            is_whole: whether a finished result has all that is wanted; else it is made again, from a copy of what it
                has. None: a finished result is enough.
            force: make it anew although it is there; the old result stays until the new one is complete.

        Returns:
            The content of ``stage.json``, and whether a finished result was reused.

        Raises:
            UserError: no space left on the device, or the store cannot be written.
        """
        with self._explained():
            held = self._lock()
        with held:
            if self.done and not force and (is_whole is None or is_whole()):
                return self.record(), True
            with self._explained():
                self._prepare(afresh=force)
            with self._explained(only_full_disks=True):
                self._work(make)
            with self._explained():
                self._put_in_place()
            return self.record(), False

    @contextmanager
    def _explained(self, *, only_full_disks: bool = False) -> Iterator[None]:
        """A full disk in words, and a store that cannot be written."""
        try:
            yield
        except Exception as error:
            if _no_space(error):
                raise UserError(
                    f"no space left on the device that holds {self.root} while running {self.stage}; what is finished"
                    " is kept: free some space (slm-store clean) and run the same command again"
                ) from error
            if isinstance(error, OSError) and not only_full_disks:
                raise UserError(f"cannot work in the store: {error.filename or self.path}: {error.strerror}") from error
            raise

    def _lock(self) -> AbstractContextManager[Any]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.lock) and (self.lock.is_symlink() or not self.lock.is_file()):
            log.warning("%s is no lock file: removed", self.lock)
            self.lock.rmdir() if self.lock.is_dir() and not self.lock.is_symlink() else self.lock.unlink()
        return FileLock(self.lock).acquire()

    def _prepare(self, *, afresh: bool) -> None:
        """Leave a folder for unfinished work of this identity in which everything is complete, or nothing."""
        if afresh or not self._is_mine(self.partial):
            remove(self.partial)
        if os.path.lexists(self.path) and not afresh and (wrong := result_fault(self.path, self.stage, whole=True)):
            log.warning("%s is damaged: %s; it is made again", self.path, wrong)
        if not self.partial.exists():
            self.partial.mkdir()
            if not afresh:
                copy_complete(self.path, self.partial)
                if warnings := self._warnings_of_before():
                    note(self.partial / FILE, warnings)
        write_json(self.partial / "identity.json", self.identity)
        drop_incomplete(self.partial)

    def _warnings_of_before(self) -> list[str]:
        """Of a result that is made again from what it has: they are of that too."""
        try:
            return list(self.record().get("warnings", []))
        except UserError:
            return []

    def _is_mine(self, partial: Path) -> bool:
        """Whether a folder holds unfinished work on this very result; a warning if there is something else."""
        if not os.path.lexists(partial):
            return False
        try:
            identity = checksums.read_json(partial / "identity.json")
            if not partial.is_symlink() and digest([STORE_FORMAT, self.stage, identity]) == self.key:
                return True
        except (OSError, ValueError):
            if partial.is_dir() and not any(partial.iterdir()):  # an attempt that was killed as it began
                return False
        log.warning("%s is not unfinished work of this result: removed", partial)
        return False

    def _work(self, make: Callable[[Path], dict[str, Any]]) -> None:
        started, clock = datetime.now(timezone.utc), time.monotonic()
        heard = Heard(self.partial / FILE)
        with memory.measured() as peak, heard:  # a stage may make a result inside another's making
            result = make(self.partial)
        record = {
            "format": STORE_FORMAT,
            "stage": self.stage,
            "key": self.key,
            "identity": self.identity,
            "result": result,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
            "peak_memory_gb": peak.gb,
            "provenance": provenance.collect(),
            **({"warnings": heard.messages} if heard.messages else {}),
        }
        (self.partial / "stage.json").unlink(missing_ok=True)
        write_json(self.partial / "stage.json", checksums.sealed({**record, "files": checksums.describe(self.partial)}))

    def _put_in_place(self) -> None:
        old = self.path.with_name(f"{self.key}.old")
        remove(old)
        give_usual_modes(self.partial)
        if os.path.lexists(self.path):
            os.replace(self.path, old)
        os.replace(self.partial, self.path)
        (self.path / FILE).unlink(missing_ok=True)  # not before: an attempt after a kill would lack the warnings
        remove(old)


class _OfStage(Exception):
    """Carries an error of the stage's own past those of the store."""

    def __init__(self, original: Exception):
        super().__init__(str(original))
        self.original = original


def _no_space(error: Exception) -> bool:
    """Whether the disk is full; safetensors says so in words alone, torch.save that less was written than meant."""
    full = (errno.ENOSPC, errno.EDQUOT)
    words = (os.strerror(errno.ENOSPC), "unexpected pos", "iostream error")
    return getattr(error, "errno", None) in full or any(phrase in str(error) for phrase in words)


def layout_faults(root: Path, stages: Sequence[str]) -> list[str]:
    """What stops every job in the store ``root``, in words, with what to do; nothing if there is no store."""
    faults = []
    marker = root / "store.json"
    if os.path.lexists(marker):
        try:
            found = checksums.read_json(marker)
            if not isinstance(found, dict) or "format" not in found:
                raise ValueError("it names no format")
            if found["format"] != STORE_FORMAT:
                faults.append(f"{root} is a store of format {found['format']}, this version reads {STORE_FORMAT}")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            faults.append(
                f"{marker} is not what a store begins with ({reason}); if the store is this version's, replace it by a"
                f' file with {{"format": {STORE_FORMAT}}}'
            )
    for folder in (root / name for name in (users.FOLDER, *stages)):
        if os.path.lexists(folder) and not folder.is_dir():
            what = f"a link to {os.readlink(folder)}, which is no folder" if folder.is_symlink() else "not a folder"
            faults.append(f"{folder} is {what}: move it away, or mend it")
    return faults


def check_layout(root: Path, stages: Sequence[str]) -> None:
    """Raise `UserError` if ``root`` holds a store that no job of this version can work in; makes nothing."""
    if faults := layout_faults(root, stages):
        raise UserError(f"{'; '.join(faults)}; or choose another output_dir=")


def check_store(root: Path, stages: Sequence[str]) -> None:
    """Create the store or make sure that this version can work in it.

    Args:
        stages: names of its folders.

    Raises:
        UserError: the folder holds a store of another format or a damaged one, or cannot be written.
    """
    marker = root / "store.json"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(marker):
            write_json(marker, {"format": STORE_FORMAT})
    except OSError as error:
        raise UserError(f"cannot write to output_dir: {root}: {error.strerror}; choose another output_dir=") from error
    if not os.access(root, os.W_OK):
        raise UserError(f"cannot write to output_dir: {root} is read-only; choose another output_dir=")
    check_layout(root, stages)
