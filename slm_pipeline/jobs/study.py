"""A multirun as a whole: the jobs it has, which of them run, and its report when it ends. Imports nothing heavy.

<sweep>/study.json            {"format", "command", "jobs": the overrides of each, "folders": of each, below <sweep>,
                              "launcher": its class}; jobs and folders are null for a search, which has "search":
                              what it is called and where its trials are kept, null if they are kept nowhere
<sweep>/.study.lock           held as long as the process lives that starts the jobs
<sweep>/<job>/.running.lock   held as long as the job's process lives, however it ends
<sweep>/study/                the study's own W&B run, with its table and plots
"""

from __future__ import annotations

import logging
import os
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from slm_pipeline.config import COMPOSITION_ERRORS, TrackerConfig
from slm_pipeline.config.overrides import check_group, check_number_of_jobs, first_value, refusal
from slm_pipeline.errors import UserError, only_warned_about, printable
from slm_pipeline.show.numerals import duration
from slm_pipeline.store import run_folder
from slm_pipeline.store.files import LONGEST_NAME, is_held, write_json, write_text
from slm_pipeline.store.run_folder import RUNNING, STARTING, STUDY

FORMAT = 1

log = logging.getLogger(__name__)


def is_search(composed: DictConfig) -> bool:
    """Whether a sweeper chooses the jobs one after another, by what the earlier ones returned."""
    return composed.hydra.runtime.choices["hydra/sweeper"] != "basic"


def jobs(composed: DictConfig, overrides: Sequence[str], loader: ConfigLoader) -> list[list[str]]:
    """The overrides of each job of a multirun, as Hydra's own sweeper makes them; of a search, one within it.

    Args:
        composed: with Hydra's own part.
        overrides: of the command line.
        loader: knows the options that ``glob()`` chooses from.

    Raises:
        UserError: too many jobs, or a value of a group that is no option.
    """
    swept = [f"{key}={value}" for key, value in (composed.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*swept, *overrides])
    for item in parsed:
        check_group(item)
    if is_search(composed):
        return [[first_value(item) for item in parsed]]
    check_number_of_jobs(parsed)
    (found,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return found


def own(overrides: Sequence[str], of_all: Sequence[Sequence[str]]) -> str:
    """The overrides of a job that not all jobs have; all of them of a single job."""
    shared = set(of_all[0]).intersection(*of_all) if len(of_all) > 1 else set()
    return " ".join(word for word in overrides if word not in shared)


def place(hydra: Any) -> str:
    """``job 3 of 8: method=laco; about 12 min left``: where a job stands in its study, as it starts.

    The time is that of the jobs which have ended, on average: the first ones, which make what all share, make it too
    long.

    Args:
        hydra: Hydra's own part of the job's configuration.
    """
    directory, overrides = Path(hydra.sweep.dir), list(hydra.overrides.task)
    begun = run_folder.study_of(directory) or {}
    number = f"job {int(hydra.job.num) + 1}"
    if begun.get("jobs") is None:  # a search
        trials = hydra.sweeper.get("n_trials")
        swept = {key.lstrip("+") for key in hydra.sweeper.get("params") or {}}
        words = [word for word in overrides if word.lstrip("+").partition("=")[0] in swept]
        return f"{number}{f' of {trials}' if trials else ''}: {' '.join(words or overrides)}"
    total = len(begun["jobs"])
    since = (directory / STUDY).stat().st_mtime
    ended = sum(_ended_after(directory / name, since) for name in begun["folders"])
    left = f"; about {duration((time.time() - since) / ended * (total - ended))} left" if ended else ""
    return f"{number} of {total}: {own(overrides, begun['jobs'])}".rstrip(": ") + left


def parts_of_search(directory: Path) -> list[Path]:
    """The folders of the multiruns that belong to the same search as the one in ``directory``, and it itself.

    A search goes on in a new folder each time; those that lie beside one another are found.
    """
    search = (run_folder.study_of(directory) or {}).get("search")
    if search is None:
        return [directory]
    beside = (path.parent for path in directory.parent.glob(f"*/{STUDY}") if path.parent != directory)
    return [directory, *(path for path in beside if (run_folder.study_of(path) or {}).get("search") == search)]


def _ended_after(run_dir: Path, since: float) -> bool:
    for name in (run_folder.SUMMARY, run_folder.FAILURE):
        with suppress(OSError):
            if (run_dir / name).stat().st_mtime >= since:
                return True
    return False


def folder(composed: DictConfig, key: str) -> Path:
    """The folder that ``hydra.run.dir`` or ``hydra.sweep.dir`` names."""
    HydraConfig.instance().set_config(composed)  # for ${hydra:...}
    try:
        found = OmegaConf.select(composed, key)
    finally:
        HydraConfig.instance().cfg = None
    if found in (None, ""):
        raise UserError(f"{key}= is empty; leave it out, or name a folder")
    return Path(str(found))


def folders(composed: DictConfig, listed: Sequence[Sequence[str]], loader: ConfigLoader) -> list[str]:
    """The folder of each job of a multirun, from the study's."""
    if OmegaConf.to_container(composed.hydra.sweep, resolve=False)["subdir"] == "${hydra.job.num}":  # type: ignore
        return [str(number) for number in range(len(listed))]
    found = []
    for number, overrides in enumerate(listed):
        job = loader.load_sweep_config(composed, list(overrides))
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        found.append(os.path.normpath(folder(job, "hydra.sweep.subdir")))
    return found


def check_composed(composed: DictConfig, listed: Sequence[Sequence[str]], loader: ConfigLoader) -> None:
    """Raise `UserError` for the first job that Hydra cannot compose: it would refuse the whole study for it."""
    for number, overrides in enumerate(listed):
        try:
            loader.load_sweep_config(composed, list(overrides))
        except (*COMPOSITION_ERRORS, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"job {number} of {len(listed)}, {own(overrides, listed)}: {refusal(error)}") from error


def check_folders(composed: DictConfig, listed: Sequence[Sequence[str]], loader: ConfigLoader) -> None:
    """Raise `UserError` unless every job has a folder of its own, in which nothing is that is not ours; makes nothing.

    Of a search only its own folder can be known.
    """
    directory = folder(composed, "hydra.sweep.dir")
    run_folder.check_study(directory, "hydra.sweep.dir")
    run_folder.check_outside(directory, Path(composed.output_dir) / "store", "hydra.sweep.dir")
    if is_held(directory / STARTING):
        raise UserError(f"hydra.sweep.dir={directory}: another process runs a study there; choose another folder")
    if is_search(composed):
        return
    begun = (run_folder.study_of(directory) or {}).get("folders") or []
    taken: dict[str, int] = {}
    for number, name in enumerate(folders(composed, listed, loader)):
        if not run_folder.is_below(name):
            raise UserError(f"hydra.sweep.subdir gives job {number} the folder {name!r}, not one below the study's")
        if name in taken:
            raise UserError(
                f"hydra.sweep.subdir gives jobs {taken[name]} and {number} the same folder {name!r}, where one would"
                " overwrite the other; ${hydra.job.num} or ${hydra.job.override_dirname} tells them apart"
            )
        if longest := [part for part in Path(name).parts if len(os.fsencode(part)) > LONGEST_NAME]:
            raise UserError(f"hydra.sweep.subdir gives job {number} a name of {len(longest[0])} characters")
        taken[name] = number
        beginnings = run_folder.beginnings(composed.hydra) if name in begun else ()
        run_folder.check_run(directory / name, "hydra.sweep.subdir", beginnings)


@dataclass(frozen=True)
class _Begun:
    directory: Path
    name: str
    tracker: TrackerConfig
    command: str
    folders: list[str] | None
    lock: FileLock
    before: str | None  # what study.json said of an earlier study


_begun: list[_Begun] = []  # the multirun of this process, until it is reported


def begin(composed: DictConfig) -> None:
    """Note what a multirun is going to do; called by Hydra before its first job, see `callbacks.WriteStudy`."""
    directory = Path(composed.hydra.sweep.dir)
    command = shlex.join(["slm", *sys.argv[1:]])
    loader = GlobalHydra.instance().config_loader()
    listed, names = None, None
    if not is_search(composed):
        state = random.getstate()
        listed = jobs(composed, list(composed.hydra.overrides.task), loader)
        random.setstate(state)  # so that Hydra shuffles alike
        names = folders(composed, listed, loader)
    file = directory / STUDY
    before = file.read_text(encoding="utf-8") if run_folder.study_of(directory) else None
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / STARTING)
    lock.acquire()
    content: dict[str, Any] = {"format": FORMAT, "command": command, "jobs": listed, "folders": names}
    if listed is None:
        sweeper = composed.hydra.sweeper
        kept = sweeper.get("storage")
        content["search"] = f"{sweeper.get('study_name')} in {kept}" if kept else None
    write_json(file, {**content, "launcher": str(composed.hydra.launcher.get("_target_"))})
    tracker: Any = OmegaConf.to_container(composed.tracker, resolve=True)
    _begun[:] = [_Begun(directory, composed.name, TrackerConfig(**tracker), command, names, lock, before)]


def group(name: str, directory: Path) -> str:
    """Under which W&B shows a multirun's jobs and its own run: ``thresholds/2026-11-25_10-23-48-224084``."""
    return f"{name}/{directory.name}"


@contextmanager
def reported() -> Iterator[None]:
    """Report the multirun that runs inside, once, when it has ended: also with failed jobs.

    After an interruption there is the table alone. A study that was refused before its first job leaves nothing.

    Raises:
        UserError: the first failed job's, which says of how many it is the first.
    """
    try:
        yield
    except BaseException as error:
        study = _end(error)
        said = failures(study.directory, str(error)) if study is not None and isinstance(error, Exception) else ""
        if said and isinstance(error, UserError):
            raise UserError(said) from error
        if said:  # a defect of ours keeps its traceback
            log.error("%s", said)
        raise
    _end(None)


def failures(directory: Path, error: str) -> str:
    """``3 of 6 jobs failed; the first, job 1 (method=laco): ERROR``, as its table calls it; empty if none failed, or
    there is one job."""
    from slm_pipeline.report.runs import read_runs

    with only_warned_about("failed jobs are not counted"):
        runs = read_runs(directory)
        failed = [run for run in runs if run.status == "FAILED"]
        if len(runs) < 2 or not failed:
            return ""
        number = f"{len(failed)} of {len(runs)} jobs failed"
        first = next((run for run in failed if run.reason == printable(error.partition("\n")[0])), None)
        if first is None:  # what ended the study is no job's error
            return f"{number}; {error}"
        told = own(first.overrides, [run.overrides for run in runs])
        which = f"job {first.job}{f' ({told})' if told else ''}"
        return f"{number}{': ' if len(failed) == 1 else '; the first, '}{which}: {error}"
    return ""


def _end(error: BaseException | None) -> _Begun | None:
    """The multirun that has ended; None if there is none, or it was refused before its first job."""
    if not _begun:
        return None
    study = _begun.pop()
    study.lock.release()  # nobody starts another job: what has not begun will not
    if isinstance(error, (UserError, *COMPOSITION_ERRORS)) and not _any_begun(study):
        _withdraw(study)
        return None
    with only_warned_about("no report of the study"):
        if error is None or isinstance(error, Exception):
            _report(study)
        else:
            from slm_pipeline.report.write import write_summary

            write_summary(study.directory)
    return study


def _any_begun(study: _Begun) -> bool:
    if study.folders is None:
        return any(study.directory.glob(f"*/{RUNNING}"))
    return any((study.directory / name).exists() for name in study.folders)


def _withdraw(study: _Begun) -> None:
    if study.before is not None:
        write_text(study.directory / STUDY, study.before)
        return
    for name in (STUDY, STARTING, "multirun.yaml"):
        (study.directory / name).unlink(missing_ok=True)
    with only_warned_about("left over"):
        if not any(study.directory.iterdir()):
            study.directory.rmdir()


def _report(study: _Begun) -> None:
    from slm_pipeline.report.write import write_study

    written = write_study(study.directory)
    print(written.text, flush=True)
    log.info("the study's report: %s", study.directory / "report.html")
    if study.tracker.kind != "wandb":
        return
    from slm_pipeline.jobs.tracking import open_tracker

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
