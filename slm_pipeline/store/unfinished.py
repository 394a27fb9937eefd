"""Unfinished work: which pieces of it are complete, so that the next attempt finds those and nothing else."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from slm_pipeline.store import checksums
from slm_pipeline.store.files import write_json
from slm_pipeline.store.record import result_fault

log = logging.getLogger(__name__)

COMPLETE = "complete.json"


def note_complete(folder: Path, *names: str) -> None:
    """Note files and folders of unfinished work as complete, with their checksums: the next attempt finds them there,
    all of them or none. What was not noted it does not find."""
    piece = checksums.describe(folder, *names)
    noted = checksums.read_sealed(folder / COMPLETE)["pieces"] if (folder / COMPLETE).exists() else []
    _write_noted(folder, [*(other for other in noted if not piece.keys() & other.keys()), piece])


def forget(folder: Path, name: str) -> None:
    """Remove a folder of unfinished work that is not needed any more, with what was noted of it."""
    if (folder / COMPLETE).exists():
        noted = checksums.read_sealed(folder / COMPLETE)["pieces"]
        _write_noted(folder, [piece for piece in noted if not any(file.startswith(f"{name}/") for file in piece)])
    shutil.rmtree(folder / name, ignore_errors=True)


def _noted(folder: Path) -> list[checksums.Files]:
    """Of each call of `note_complete` the files, if they are still what they were; a warning if they are not."""
    whole = []
    try:
        for piece in checksums.read_sealed(folder / COMPLETE)["pieces"]:
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
    write_json(folder / COMPLETE, checksums.sealed({"pieces": pieces}))


def drop_incomplete(folder: Path) -> None:
    """Remove from unfinished work what was not noted as complete, or has changed since.

    A training's checkpoints stay, and files that are appended to: both check themselves.
    """
    pieces = _noted(folder)
    kept = {name for piece in pieces for name in piece} | {"identity.json", COMPLETE}
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what is in it
        name = path.relative_to(folder)
        if path.is_symlink() or not path.is_dir():
            checks_itself = path.suffix == ".jsonl" or (name.parts[0] == "checkpoints" and len(name.parts) > 1)
            if name.as_posix() not in kept and not checks_itself:
                path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()
    _write_noted(folder, pieces)


def copy_complete(source: Path, target: Path) -> None:
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
