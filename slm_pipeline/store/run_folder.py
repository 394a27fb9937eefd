"""Which folders runs and studies may write to: nothing of the user's is overwritten. Imports nothing heavy.

<run>/.running.lock    held as long as the job's process lives, however it ends; its being there marks a run's folder
<run>/.requeued         of a job that a cluster stopped and will start again
<run>/summary_before.json  the result of an earlier run in this folder, until there is a new one
<sweep>/study.json     marks a study's
<sweep>/.study.lock    held as long as the process lives that starts the study's jobs
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from slm_pipeline.errors import UserError
from slm_pipeline.store.files import is_held

RUNNING = ".running.lock"
STUDY = "study.json"
STARTING = ".study.lock"
REQUEUED = ".requeued"
SUMMARY = "summary.json"
BEFORE = "summary_before.json"
FAILURE = "failure.json"


def check_run(folder: Path, option: str, beginnings: Collection[str]) -> None:
    """Raise `UserError` if the folder holds anything, unless it was a run's from the start; makes nothing.

    Args:
        option: which gave the folder, for the message.
        beginnings: see `beginnings`; empty unless it is known that Hydra has begun here.
    """
    found = _content(folder, option)
    if RUNNING not in found:
        _refuse(folder, option, found - set(beginnings), "a run")


def check_outside(folder: Path, store: Path, option: str) -> None:
    """Raise `UserError` if the folder is the store, lies in it or has it inside."""
    place, of_store = Path(os.path.realpath(folder)), Path(os.path.realpath(store))
    if place.is_relative_to(of_store):
        raise UserError(f"{option}={folder} lies in the store, {store}; choose a folder elsewhere")
    if of_store.is_relative_to(place):
        raise UserError(
            f"{option}={folder} contains output_dir, {store.parent}, which is for all runs; choose a folder of its own"
        )


def beginnings(hydra: Any) -> set[str]:
    """What Hydra puts into a run's folder before the run can mark it, by its configuration."""
    return {".hydra", f"{hydra.job.name}.log"}


def check_study(folder: Path, option: str) -> None:
    """Raise `UserError` if the folder holds anything, unless it was a study's from the start; makes nothing."""
    found = _content(folder, option)
    if study_of(folder) is None:
        _refuse(folder, option, found - {STARTING}, "a study")


def study_of(folder: Path) -> dict[str, Any] | None:
    """What the folder's study.json says, with ``folders`` also of earlier versions; None if there is none of ours."""
    try:
        found = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("command"), str) or "jobs" not in found:
        return None
    jobs = found["jobs"]
    if jobs is None:
        return {**found, "folders": None}
    if not isinstance(jobs, list) or not all(isinstance(job, list) for job in jobs):
        return None
    folders = found.get("folders", [str(number) for number in range(len(jobs))])
    if not isinstance(folders, list) or len(folders) != len(jobs):
        return None
    whole = all(isinstance(item, str) for job in jobs for item in job)
    whole = whole and all(isinstance(name, str) and is_below(name) for name in folders)
    return {**found, "folders": folders} if whole else None


def is_below(name: str) -> bool:
    """Whether a job's folder, as its study names it, lies below the study's."""
    return (
        name.isprintable() and bool(Path(name).parts) and not Path(name).is_absolute() and ".." not in name.split("/")
    )


def _content(folder: Path, option: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"{option}={folder}: {error.strerror}; choose a new folder") from error


def _refuse(folder: Path, option: str, foreign: Collection[str], whose: str) -> None:
    if foreign:
        first = sorted(foreign)[:3]
        more = f" and {len(foreign) - len(first)} more" if len(foreign) > len(first) else ""
        raise UserError(
            f"{option}={folder} holds {', '.join(first)}{more}, which are not of {whose} and could be overwritten;"
            " choose a new folder"
        )


def mark(run_dir: Path) -> None:
    """Make the folder a run's before Hydra writes to it, so that it is known as one whenever the run is killed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / RUNNING).touch()


@contextmanager
def running(run_dir: Path) -> Iterator[None]:
    """Show that a job works in this folder; waits for another that still does, such as its own dying predecessor.

    What an earlier one left is not this one's: its failure goes, its result waits under another name for a new one.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / RUNNING):
        if os.path.lexists(run_dir / SUMMARY):
            os.replace(run_dir / SUMMARY, run_dir / BEFORE)
        for left in (FAILURE, REQUEUED):
            (run_dir / left).unlink(missing_ok=True)
        yield


def is_running(run_dir: Path) -> bool:
    """Whether a living process works in this folder."""
    return is_held(run_dir / RUNNING)


def will_start(directory: Path, study: Mapping[str, Any]) -> bool:
    """Whether somebody is going to start what has not begun of a study: its process, or a cluster that has its jobs.

    Args:
        study: of `study_of`.
    """
    return str(study.get("launcher")).endswith("SlurmLauncher") or is_held(directory / STARTING)
