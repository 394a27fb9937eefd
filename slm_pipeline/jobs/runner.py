"""Run a job: the stages that are not already done, then the table, the pictures and the log."""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from slm_pipeline.config import STAGES, to_config
from slm_pipeline.errors import UserError, only_warned_about
from slm_pipeline.jobs import study, summary
from slm_pipeline.jobs.job import Job, prepare
from slm_pipeline.jobs.needs import smaller_than_tried
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.stages.evaluate import Evaluate
from slm_pipeline.jobs.steps import Step, artifact_of, describe_plan, preflight, steps, too_large
from slm_pipeline.jobs.tracking import Tracker, open_tracker
from slm_pipeline.machine import gpus, memory, provenance, signals, together
from slm_pipeline.report.write import write_summary_so_far
from slm_pipeline.results import objective
from slm_pipeline.results.number import Number
from slm_pipeline.results.of_run import numbers_of
from slm_pipeline.store import run_folder, users
from slm_pipeline.store.artifact import Artifact, check_store
from slm_pipeline.store.files import from_here, is_held, write_json, write_text
from slm_pipeline.store.heard import Heard

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "tokenizers")  # whose versions move numbers, most a little, and are in no key


def run_job(composed: DictConfig, words: Sequence[str]) -> float | None:
    """Run one composed configuration inside Hydra. Leaves summary.json, or failure.json and an error, or if it was
    interrupted neither.

    Args:
        words: of the command line.

    Returns:
        The job's objective, for a sweeper that searches.
    """
    with Heard() as heard:
        return _run_job(composed, words, heard.messages)


def _run_job(composed: DictConfig, words: Sequence[str], warnings: list[str]) -> float | None:
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    multirun = hydra.mode == RunMode.MULTIRUN
    command = shlex.join(["slm", *(hydra.overrides.task if multirun else words)])
    if multirun and hydra.runtime.choices["hydra/launcher"] == "gpus":
        gpus.take_one(hydra.launcher.n_jobs)
    try:
        signals.raise_if_heard()
        if multirun and not composed.dry_run:
            log.info("%s", study.place(hydra))
        config = to_config(composed)
        job = prepare(config, command)
        if config.dry_run:
            print(describe_plan(job))
            return None
        check_store(job.store, STAGES)
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        choices = {
            group: choice
            for group, choice in hydra.runtime.choices.items()
            if isinstance(choice, str) and "/" not in group and "@" not in group
        }
        of_study = study.group(config.name, Path(hydra.sweep.dir)) if multirun else None
        with open_tracker(
            config.tracker,
            run_dir=run_dir,
            name=f"{of_study or config.name}/{run_dir.name}",
            run_config=asdict(config),
            group=of_study,
            tags=[f"{group}={choice}" for group, choice in choices.items()],
            job_type=config.stages[-1] if config.stages else "none",
        ) as tracker:
            try:
                with together.leading(config.model.device):
                    found = execute(job, run_dir, tracker, warnings)
            finally:
                job.loaded.release()  # an error keeps hold of the job
        beside = _finished_beside(run_dir) if multirun else iter(())
        return objective.value(config.objective, numbers_of(found), beside)
    except BaseException as error:
        if isinstance(error, SystemExit):  # that is how a cluster's job ends that is back in the queue
            with suppress(OSError):  # a full disk
                (run_dir / run_folder.REQUEUED).touch()
        elif isinstance(error, Exception) and not (run_dir / "summary.json").exists():
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            _write_failure(run_dir, {"error": first_line, "type": type(error).__name__, "command": command})
        if isinstance(error, UserError):
            log.error("error: %s", error) if multirun else log.debug("error: %s", error)
            log.debug("where it came from", exc_info=error)
        raise
    finally:
        if multirun and not composed.dry_run and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            write_summary_so_far(Path(hydra.sweep.dir))


def record_lost_job(composed: DictConfig, error: UserError) -> None:
    """Leave a FAILED row of a multirun for a job that could not leave one itself: cancelled, killed, never started.

    Args:
        composed: the job's configuration with Hydra's own part, its number in it.
        error: what became of it. Not written where the job did leave a result or a reason.
    """
    sweep_dir = Path(composed.hydra.sweep.dir)
    run_dir = sweep_dir / str(composed.hydra.sweep.subdir)
    overrides = list(composed.hydra.overrides.task)
    if not any((run_dir / name).exists() for name in ("summary.json", "failure.json")):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / run_folder.RUNNING).touch()
        write_text(run_dir / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
        command = shlex.join(["slm", *overrides])
        _write_failure(run_dir, {"error": str(error), "type": type(error).__name__, "command": command})
    write_summary_so_far(sweep_dir)


def execute(job: Job, run_dir: Path, tracker: Tracker, warnings: list[str]) -> dict[str, Any]:
    """Run the job's steps, then write and print what they found."""
    looked_at: set[str] = set()
    preflight(job, looked_at)
    for warning in job.warnings:
        log.warning("%s", warning)
    for warning in too_large(job):
        log.warning("%s", warning)
    if "evaluate" in job.config.stages:
        for label in job.texts_of_calibration():
            log.warning("%s: the calibration samples come from the same text, which favours the pruned model", label)
    users.begin(job.store, run_dir)
    for path in (job.config.model.path, getattr(job.method, "path", None)):
        users.note_path(path, run_dir)
    results: dict[str, Artifact] = {}
    reused: dict[str, bool] = {}
    waiting = steps(job)
    while waiting:
        signals.raise_if_heard()
        step, artifact = _next(waiting, job, results)
        waiting.remove(step)
        stage = step.stage
        if artifact is None:
            continue
        users.note(artifact.path, run_dir)
        if step.selected:
            if not all(results[name].intact for name in stage.needs if _runs(step, job, artifact)):
                preflight(job, looked_at)  # says so if what it would read is damaged and is not selected
                results = {name: result for name, result in results.items() if result.intact}
                waiting = [step for step in steps(job) if step.stage.name not in results]  # what is damaged, again
                continue
            reused[stage.name] = _produce(step, artifact, job, results, tracker, warnings) and reused.get(
                stage.name, True
            )
            _link(run_dir / stage.folder, artifact.path)
            with only_warned_about(f"{stage.name}: its numbers were not logged"):
                stage.publish(artifact, tracker, reused=reused[stage.name])
        if artifact.done:
            results[stage.name] = artifact
            if not step.selected:
                _say(artifact.record().get("warnings", []), warnings)
    signals.raise_if_heard()
    done = [step.stage for step in steps(job) if step.stage.name in reused]
    ran = {stage.name: results[stage.name] for stage in done}
    evaluations = {stage.name: stage for stage in done if isinstance(stage, Evaluate)}
    found = summary.build(job, ran, evaluations, reused, warnings)
    summary.write(found, results, run_dir, tracker, warnings, draw=job.config.pictures)
    return found


def _finished_beside(run_dir: Path) -> Iterator[Mapping[str, Number]]:
    """The numbers of the other jobs of a multirun that are done and whole; of a search also those of before."""
    for folder in study.parts_of_search(run_dir.parent):
        for file in folder.glob("*/summary.json"):
            if file.parent != run_dir:
                with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                    yield numbers_of(json.loads(file.read_text(encoding="utf-8")))


def _runs(step: Step, job: Job, artifact: Artifact) -> bool:
    return step.forced or not step.stage.is_whole(job, artifact)


def _next(waiting: list[Step], job: Job, results: Mapping[str, Artifact]) -> tuple[Step, Artifact | None]:
    """The first step that needs none of those before it and that no other job is at, or the first if all are taken.

    So the jobs of a sweep do not wait for the one that scores their common dense model: they score their own meanwhile.
    """
    names = {step.stage.name for step in waiting}
    ready = [
        (step, artifact_of(step.stage, job, results)) for step in waiting if not names.intersection(step.stage.needs)
    ]
    free = (pair for pair in ready if pair[1] is None or not is_held(pair[1].lock))
    return next(free, ready[0])


def _produce(
    step: Step, artifact: Artifact, job: Job, results: Mapping[str, Artifact], tracker: Tracker, said: list[str]
) -> bool:
    """Make the stage's result, or reuse it; whether it was reused.

    Args:
        said: warnings of this run, which need not be said again; whoever hears them adds to it.
    """
    stage = step.stage
    if not isinstance(stage, Evaluate):
        job.loaded.release()
    if not stage.is_whole(job, artifact) or step.forced:
        log.info("%s: %s", stage.name, "continues" if artifact.partial.exists() and not step.forced else "starts")
    started = time.monotonic()
    with _out_of_memory_explained(stage, job):
        record, was_reused = artifact.produce(
            functools.partial(stage.run, job, results, tracker=tracker),
            is_whole=lambda: stage.is_whole(job, artifact),
            force=step.forced,
        )
    if was_reused:
        _say([*_made_otherwise(stage, record, job), *record.get("warnings", [])], said)
        log.info("%s: reused, %s", stage.name, from_here(artifact.path))
    else:
        log.info("%s: done in %.1f s, %s", stage.name, time.monotonic() - started, from_here(artifact.path))
        if not isinstance(stage, Evaluate):  # it leaves a model for the next
            memory.free()  # looks at every object there is: not after a stage that made none
    return was_reused


def _say(lines: Sequence[str], said: Sequence[str]) -> None:
    """Warn of what is known of a result that is reused, unless this run has said so."""
    for line in lines:
        if line not in said:
            log.warning("%s", line)


@contextmanager
def _out_of_memory_explained(stage: Stage, job: Job) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        torch = sys.modules.get("torch")
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the latter is torch's, on a CPU
            where = "memory"
        elif torch is not None and isinstance(error, torch.OutOfMemoryError):
            where = f"GPU memory ({torch.cuda.mem_get_info()[1] / 1e9:.0f} GB in all)"
        else:
            raise
        raise UserError(f"{stage.name} ran out of {where}: {smaller_than_tried(stage, job)}") from error


def _made_otherwise(stage: Stage, record: Mapping[str, Any], job: Job) -> list[str]:
    """What differs between a result that is reused and one that would be made here and now, in words."""
    made, now = record["provenance"], provenance.collect()
    mine, theirs = now["versions"], made["versions"]
    found = []
    if theirs.get("slm_pipeline") != mine["slm_pipeline"]:
        found.append(f"reused a result of slm_pipeline {theirs.get('slm_pipeline')}")
    elif made["git_commit"] != now["git_commit"]:
        found.append(f"reused a result of commit {(made['git_commit'] or 'unknown')[:12]}")
    for name in _PACKAGES:
        if theirs.get(name) != mine.get(name):
            found.append(f"reused a result of {name} {theirs.get(name)}; here is {mine.get(name)}")
    there, here = record["result"].get("device"), gpus.in_words(job.config.model.device)
    if there is not None and there != here:
        found.append(f"reused a result measured on {there}; model.device={job.config.model.device} is {here} here")
    return [f"{stage.stage}: {line}" for line in found]


def _link(link: Path, target: Path) -> None:
    """For people to find their way; not every file system has links."""
    with only_warned_about(f"no link {link}"):
        link.parent.mkdir(exist_ok=True)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def _write_failure(run_dir: Path, failure: dict[str, Any]) -> None:
    try:
        write_json(run_dir / "failure.json", failure)
    except OSError as error:  # the disk may be full: the first error is the one to show
        log.warning("cannot write %s: %s", run_dir / "failure.json", error)
