"""A multirun as a whole: the jobs it has, which of them run, and its report when it ends. Imports nothing heavy.

<sweep>/study.json            {"format", "command", "jobs": the overrides of each, null for a search}
<sweep>/<job>/.running.lock   held as long as the job's process lives, however it ends
<sweep>/study/                the study's own W&B run, with its table and plots
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf

from slm_pipeline.artifacts import is_held, write_json
from slm_pipeline.config import TrackerConfig
from slm_pipeline.errors import UserError

FORMAT = 1
_LOCK = ".running.lock"
REQUEUED = ".requeued"  # in the folder of a job that a cluster stopped and will start again

log = logging.getLogger(__name__)


def is_search(composed: DictConfig) -> bool:
    """Whether a sweeper chooses the jobs one after another, by what the earlier ones returned."""
    return composed.hydra.runtime.choices["hydra/sweeper"] != "basic"


def jobs(composed: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a multirun, as Hydra's own sweeper makes them; of a search, one within it.

    Args:
        composed: with Hydra's own part.
        overrides: of the command line.
    """
    swept = [f"{key}={value}" for key, value in (composed.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*swept, *overrides])
    if is_search(composed):
        return [[first_value(item) for item in parsed]]
    (found,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return found


def first_value(item: Override) -> str:
    """An override with the first of the values that it sweeps over; as it is if it does not sweep."""
    if not item.is_sweep_override():
        return item.input_line or ""
    if isinstance(interval := item.value(), IntervalSweep):
        return f"{item.get_key_element()}={interval.start}"
    return f"{item.get_key_element()}={next(iter(item.sweep_string_iterator()))}"


@dataclass(frozen=True)
class _Begun:
    directory: Path
    name: str
    tracker: TrackerConfig
    command: str


_begun: list[_Begun] = []  # the multirun of this process, until it is reported


def begin(composed: DictConfig) -> None:
    """Note what a multirun is going to do; called by Hydra before its first job, see `callbacks.WriteStudy`."""
    directory = Path(composed.hydra.sweep.dir)
    command = shlex.join(["slm", *sys.argv[1:]])
    listed = None if is_search(composed) else jobs(composed, list(composed.hydra.overrides.task))
    write_json(directory / "study.json", {"format": FORMAT, "command": command, "jobs": listed})
    tracker: Any = OmegaConf.to_container(composed.tracker, resolve=True)
    _begun[:] = [_Begun(directory, composed.name, TrackerConfig(**tracker), command)]


def group(name: str, directory: Path) -> str:
    """Under which W&B shows a multirun's jobs and its own run: ``thresholds/2026-11-25_10-23-48-224084``."""
    return f"{name}/{directory.name}"


@contextmanager
def reported() -> Iterator[None]:
    """Report the multirun that runs inside, once, when it has ended: also with failed jobs, not if interrupted."""
    try:
        yield
    except Exception:
        try:
            _report()
        except Exception as error:  # the first error is the one to show
            log.warning("no report: %s: %s", type(error).__name__, error)
        raise
    _report()


def _report() -> None:
    if not _begun:
        return
    study = _begun.pop()
    from slm_pipeline.report.write import write_study

    try:
        written = write_study(study.directory)
    except UserError as error:  # it ended before its first job
        log.warning("no report: %s", error)
        return
    log.info("the study's report: %s", study.directory / "report.html")
    if study.tracker.kind != "wandb":
        return
    from slm_pipeline.tracking import open_tracker

    of_study = group(study.name, study.directory)
    with open_tracker(
        study.tracker,
        run_dir=study.directory / "study",
        name=of_study,
        run_config={"command": study.command},
        group=of_study,
        tags=["study"],
        job_type="study",
    ) as tracker:
        tracker.table("study", list(written.columns), [list(row) for row in written.rows])
        for picture in written.pictures:
            tracker.image(picture.stem, picture)


@contextmanager
def running(run_dir: Path) -> Iterator[None]:
    """Show that a job works in this folder; waits for another that still does, such as its own dying predecessor."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / _LOCK):
        yield


def is_running(run_dir: Path) -> bool:
    """Whether a living process works in this folder."""
    return is_held(run_dir / _LOCK)
