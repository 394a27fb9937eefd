"""Which runs use the results of a store, as the store itself knows. Imports no torch.

    <store>/users/<digest>.json    {"run", "from_store", "mount", "uses", "used_before"}

``run`` is the absolute path of a run folder and ``from_store`` the same as seen from the store, in case both are moved;
``mount`` the mount point of its disk; ``uses`` and ``used_before`` name folders of the store, "merge/0123456789abcdef".
A run notes each result before it makes or reuses it, so that nobody who holds the result's lock and reads what is
noted removes it under the run's hands.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError
from slm_pipeline.store import checksums
from slm_pipeline.store.files import remove, write_json

FOLDER = "users"

log = logging.getLogger(__name__)


def begin(store: Path, run_dir: Path) -> None:
    """Note that a run begins in ``run_dir``; what an earlier run in this folder used becomes ``used_before``."""
    file, known = _read(store, run_dir)
    known["used_before"] = sorted({*known["uses"], *known["used_before"]})
    known["uses"] = []
    _write(file, known)


def note(result: Path, run_dir: Path) -> None:
    """Note that the run in ``run_dir`` uses a result: a folder of its own store or of another."""
    store, name = result.parent.parent, f"{result.parent.name}/{result.name}"
    file, known = _read(store, run_dir)
    if name not in known["uses"]:
        known["uses"] = sorted([*known["uses"], name])
        known["used_before"] = [other for other in known["used_before"] if other != name]
        _write(file, known)


def note_path(path: str | None, run_dir: Path) -> None:
    """Note that a run reads ``path`` (a model, a plan) if that lies in a store, whichever."""
    if not path:
        return
    place = Path(os.path.realpath(Path(path).expanduser()))
    for folder in (place, *place.parents):
        if folder.parent.name != FOLDER and (folder.parent.parent / "store.json").is_file():
            try:
                note(folder, run_dir)
            except UserError as error:  # somebody else's store
                log.warning("%s: it does not know that this run uses %s", error, path)


def _read(store: Path, run_dir: Path) -> tuple[Path, dict[str, Any]]:
    run = Path(os.path.abspath(run_dir))
    file = store / FOLDER / f"{checksums.digest(str(run))}.json"
    mount = next(str(folder) for folder in (run, *run.parents) if os.path.ismount(folder))
    known = {"run": str(run), "from_store": os.path.relpath(run, store), "mount": mount, "uses": [], "used_before": []}
    try:
        record = _record(file)
        known |= {"uses": list(record.uses), "used_before": list(record.used_before)}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("%s is written anew: %s", file, error)
        if os.path.isdir(file):  # which nothing can be renamed onto
            with _explained(file):
                remove(file)
    return file, known


def _write(file: Path, known: dict[str, Any]) -> None:
    with _explained(file):
        write_json(file, checksums.sealed(known))


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = ": free some space (slm-store clean) and run the same command again"
        raise UserError(
            f"cannot note in {file.parent} which results this run uses: {error.strerror}"
            + (full if error.errno in (errno.ENOSPC, errno.EDQUOT) else "")
        ) from error


@dataclass(frozen=True)
class _Record:
    run: Path
    candidates: tuple[Path, ...]  # where the run folder may be
    mount: str
    uses: frozenset[str]
    used_before: frozenset[str]


def _record(file: Path) -> _Record:
    known = checksums.read_sealed(file)
    run = Path(known["run"])
    candidates = (run, Path(os.path.normpath(file.parent.parent / known["from_store"])))
    return _Record(run, candidates, known["mount"], frozenset(known["uses"]), frozenset(known["used_before"]))


@dataclass
class Use:
    """Who uses a result, as far as that is known.

    Attributes:
        runs: folders of runs that use it.
        doubts: in words, what might use it, though that cannot be known.
        gone: runs that used it and whose folder is not there any more: deleted, or moved.
        recorded: whether any run has noted it; not so in stores of earlier versions.
    """

    runs: set[Path] = field(default_factory=set)
    doubts: list[str] = field(default_factory=list)
    gone: list[Path] = field(default_factory=list)
    recorded: bool = False

    def kept_because(self, *, gone: bool = False, unrecorded: bool = False) -> str | None:
        """Why a result cannot be removed, in words; None where nobody uses it.

        Args:
            gone: take it that runs whose folder is not there were deleted.
            unrecorded: take it that results of which no run has noted anything are not used.
        """
        if self.runs:
            return f"used by {min(self.runs)}" + (f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else "")
        if self.doubts:
            return self.doubts[0]
        if self.gone and not gone:
            return f"used by {self.gone[0]}, which was deleted or moved: --gone if deleted"
        if not self.recorded and not unrecorded:
            return "no run has noted that it uses it, as in stores of earlier versions: --unrecorded if none does"
        return None


class Users:
    """Who uses what in a store, from what its runs have noted and from the links in their folders.

    Args:
        output_dir: of the store; folders of ``runs`` and ``sweeps`` there count by their links alone, too.
    """

    def __init__(self, output_dir: Path):
        output_dir = Path(os.path.abspath(output_dir))  # as in what runs have noted, so that none counts twice
        self.store = output_dir / "store"
        self._links: dict[Path, set[Path]] = {}  # resolved target -> run folders with a link to it
        self._seen: dict[Path, tuple[int, int]] = {}
        self._records: dict[Path, tuple[_Record, str | None]] = {}
        self._unreadable: dict[Path, str] = {}
        for place in ("runs", "sweeps"):
            for folder, names, files in os.walk(output_dir / place, onerror=self._note_unreadable):
                self._add_links(Path(folder), [*names, *files])
        self.refresh()

    def refresh(self) -> None:
        """Read what was noted since the last time."""
        for file in sorted((self.store / FOLDER).glob("*.json")):
            try:
                state = file.stat()
                if self._seen.get(file) == (state.st_ino, state.st_mtime_ns):
                    continue
                record = _record(file)
                self._records[file] = record, self._whereabouts(record)
                self._seen[file] = state.st_ino, state.st_mtime_ns
                self._unreadable.pop(file, None)
            except FileNotFoundError:  # a dangling link, or it was removed just now
                continue
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                self._unreadable[file] = f"{file} cannot be read and may name it ({error}): remove that file if not"

    def of(self, name: str) -> Use:
        """Who uses ``name``, such as "merge/0123456789abcdef"."""
        use = Use(
            runs=set(self._links.get(Path(os.path.realpath(self.store / name)), ())),
            doubts=list(self._unreadable.values()),
        )
        use.recorded = bool(use.runs)
        for record, missing in self._records.values():
            use.recorded |= name in record.used_before or name in record.uses
            if name not in record.uses:
                continue
            if missing is None:
                use.runs.add(record.run)
            elif missing:
                use.doubts.append(f"used by {missing}")
            else:
                use.gone.append(record.run)
        return use

    def forget(self, names: set[str]) -> None:
        """Remove what was noted of runs that are gone and used nothing but ``names``."""
        for file, (record, missing) in self._records.items():
            if missing == "" and not any((self.store / name).exists() for name in record.uses - names):
                file.unlink(missing_ok=True)

    def _note_unreadable(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            self._unreadable[Path(error.filename)] = f"{error.filename} cannot be read ({error.strerror})"

    def _whereabouts(self, record: _Record) -> str | None:
        """None for a run folder that is there, whose links are added; empty if it is gone; else why nobody can say."""
        for folder in record.candidates:
            try:
                names = os.listdir(folder)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                return f"{folder}, which cannot be read: {error.strerror}"
            self._add_links(folder, names)
            return None
        return "" if os.path.ismount(record.mount) else f"{record.run}, and no disk is mounted at {record.mount}"

    def _add_links(self, folder: Path, names: list[str]) -> None:
        for link in (folder / name for name in names):
            if link.is_symlink():
                self._links.setdefault(Path(os.path.realpath(link)), set()).add(folder)
