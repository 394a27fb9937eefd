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
import fcntl
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from slm_pipeline import checksums, memory, provenance
from slm_pipeline.checksums import digest
from slm_pipeline.errors import UserError

log = logging.getLogger(__name__)

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
        file = os.open(lock, os.O_RDONLY | os.O_NONBLOCK)  # it may be a pipe
    except FileNotFoundError:
        return False
    except OSError:  # nobody may look
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who ask do not see one another
    except OSError:  # it is held, or this file system cannot say
        return True
    finally:
        os.close(file)
    return False


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
        """The same with every file read, once in a process: for whoever goes on to read the result."""
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
                _copy_complete(self.path, self.partial)
        write_json(self.partial / "identity.json", self.identity)
        drop_incomplete(self.partial)

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
        with memory.measured() as peak:  # a stage may make a result inside another's making
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
        remove(old)


class _OfStage(Exception):
    """Carries an error of the stage's own past those of the store."""

    def __init__(self, original: Exception):
        super().__init__(str(original))
        self.original = original


def read_record(path: Path, stage: str) -> dict[str, Any]:
    """The content of a finished result's ``stage.json``.

    Raises:
        UserError: it is not there, damaged, or of another result.
    """
    try:
        record = checksums.read_sealed(path / "stage.json")
        types: dict[str, Any] = {"key": str, "result": dict, "seconds": (int, float), "peak_memory_gb": (int, float)}
        if record.get("stage") != stage or record.get("key") != path.name:
            raise ValueError("stage.json is of another result")
        if not all(isinstance(record.get(name), kind) for name, kind in types.items()):
            raise ValueError("stage.json lacks what it should hold")
        if not isinstance(record["provenance"]["versions"], dict) or not isinstance(record.get("files", {}), dict):
            raise ValueError("stage.json lacks what it should hold")
    except FileNotFoundError as error:
        raise UserError(f"{path}: stage.json is not there") from error
    except OSError as error:
        raise UserError(f"{path}: stage.json cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    return record


def result_fault(path: Path, stage: str, *, whole: bool) -> str | None:
    """What is wrong with a finished result, in words; None if nothing is. See `checksums.fault`.

    Results of versions that kept no checksums are taken as they are if their JSON and tensor files may be whole.
    """
    try:
        record = read_record(path, stage)
        if "files" not in record:
            return checksums.unreadable(path)
        return checksums.fault(path, record["files"], whole=whole)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    except (ValueError, LookupError, TypeError) as error:
        return f"stage.json is damaged: {error}"


_COMPLETE = "complete.json"


def note_complete(folder: Path, *names: str) -> None:
    """Note files and folders of unfinished work as complete, with their checksums: the next attempt finds them there,
    all of them or none. What was not noted it does not find."""
    piece = checksums.describe(folder, *names)
    noted = checksums.read_sealed(folder / _COMPLETE)["pieces"] if (folder / _COMPLETE).exists() else []
    _write_noted(folder, [*(other for other in noted if not piece.keys() & other.keys()), piece])


def _noted(folder: Path) -> list[checksums.Files]:
    """Of each call of `note_complete` the files, if they are still what they were; a warning if they are not."""
    whole = []
    try:
        for piece in checksums.read_sealed(folder / _COMPLETE)["pieces"]:
            if wrong := checksums.fault(folder, piece, whole=True):
                log.warning("%s: %s; it is made again", folder, wrong)
            else:
                whole.append(piece)
    except FileNotFoundError:  # nothing has been noted
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s: %s; what lies there is made again", folder, error)
    return whole


def _write_noted(folder: Path, pieces: list[checksums.Files]) -> None:
    write_json(folder / _COMPLETE, checksums.sealed({"pieces": pieces}))


def drop_incomplete(folder: Path) -> None:
    """Remove from unfinished work what was not noted as complete, or has changed since.

    A training's checkpoints stay, and files that are appended to: both check themselves.
    """
    pieces = _noted(folder)
    kept = {name for piece in pieces for name in piece} | {"identity.json", _COMPLETE}
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what is in it
        name = path.relative_to(folder)
        if path.is_symlink() or not path.is_dir():
            checks_itself = path.suffix == ".jsonl" or (name.parts[0] == "checkpoints" and len(name.parts) > 1)
            if name.as_posix() not in kept and not checks_itself:
                path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()
    _write_noted(folder, pieces)


def _copy_complete(source: Path, target: Path) -> None:
    """Copy what is complete of a result, finished or damaged, into the folder of a new attempt."""
    pieces = _noted(source)
    if result_fault(source, source.parent.name, whole=True) is None and not pieces:  # of a version that noted nothing
        pieces = [checksums.describe(source)]
        pieces[0].pop("stage.json")
    for name in (name for piece in pieces for name in piece):
        if (source / name).is_file():  # a README.md may have been removed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    _write_noted(target, pieces)


def remove(path: Path) -> None:
    """Remove whatever is there: a folder, a file, a link (not what it leads to)."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _no_space(error: Exception) -> bool:
    """Whether the disk is full; safetensors says so in words alone, torch.save that less was written than meant."""
    full = (errno.ENOSPC, errno.EDQUOT)
    words = (os.strerror(errno.ENOSPC), "unexpected pos", "iostream error")
    return getattr(error, "errno", None) in full or any(phrase in str(error) for phrase in words)


def check_store_format(root: Path) -> None:
    """Raise `UserError` if ``root`` holds a store that this version cannot read; makes nothing."""
    marker = root / "store.json"
    if not os.path.lexists(marker):
        return
    try:
        found = checksums.read_json(marker)["format"]
    except (OSError, ValueError, LookupError, TypeError) as error:
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
        if not os.path.lexists(marker):
            write_json(marker, {"format": STORE_FORMAT})
    except OSError as error:
        raise UserError(f"cannot write to output_dir: {root}: {error.strerror}; choose another output_dir=") from error
    if not os.access(root, os.W_OK):
        raise UserError(f"cannot write to output_dir: {root} is read-only; choose another output_dir=")
    check_store_format(root)
