"""What a job has to do: its steps, each with the result that it makes or reuses, as far as that is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slm_pipeline.errors import UserError
from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.needs import need
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.stages.calibrate import Calibrate
from slm_pipeline.jobs.stages.evaluate import Evaluate
from slm_pipeline.jobs.stages.merge import Merge
from slm_pipeline.jobs.stages.recover import Recover
from slm_pipeline.jobs.stages.repair import Repair
from slm_pipeline.jobs.stages.time_blocks import TimeBlocks
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.files import from_here


@dataclass(frozen=True)
class Step:
    """A stage of this job: to be run if selected, else only read if another needs it and it is there."""

    stage: Stage
    selected: bool
    forced: bool


def steps(job: Job) -> list[Step]:
    """The job's stages in order. A forced stage forces those that read its result."""
    stages: list[Stage] = [Calibrate()]
    if job.pruning_ratio.of_latency:
        stages.append(TimeBlocks())
    stages.append(Merge("calibrate", *(["time_blocks"] if job.pruning_ratio.of_latency else [])))
    if job.repair is not None:
        stages.append(Repair())
    if job.recovery is not None:
        stages.append(Recover("merge" if job.repair is None else "repair"))
    if "evaluate" in job.config.stages:
        for target in job.evaluation.of:
            if {"repaired": job.repair, "recovered": job.recovery}.get(target, True) is not None:
                stages += [Evaluate(target, measure, part) for measure, part in job.evaluation.parts(target)]
    forced: set[str] = set()
    result = []
    for stage in stages:
        if stage.stage in job.config.force or forced.intersection(stage.needs):
            forced.add(stage.name)
        result.append(Step(stage, stage.stage in job.config.stages, stage.name in forced))
    return result


def plan(job: Job) -> list[tuple[Step, Artifact | None]]:
    """Each step with its artefact, as far as that is known before anything runs.

    Raises:
        UserError: a selected stage reads the result of one that is neither selected nor done.
    """
    known: dict[str, Artifact] = {}
    planned: list[tuple[Step, Artifact | None]] = []
    will_run: set[str] = set()
    for step in steps(job):
        stage = step.stage
        artifact = artifact_of(stage, job, known)
        if artifact is not None:
            known[stage.name] = artifact
        if step.selected:
            for name in stage.needs:
                if name not in will_run and not (name in known and known[name].done):
                    raise UserError(
                        f"stages={job.config.stages}: {stage.name} needs the result of {name}, which is not there;"
                        f" add {name} to stages"
                    )
            will_run.add(stage.name)
        planned.append((step, artifact))
    return planned


def artifact_of(stage: Stage, job: Job, known: Mapping[str, Artifact]) -> Artifact | None:
    """Where the stage's result belongs; None while that is not known before an earlier stage has run."""
    if not all(name in known for name in stage.needs):
        return None
    identity = stage.identity(job, known)
    return Artifact(job.store, stage.stage, identity) if identity is not None else None


def describe_plan(job: Job, said: dict[Path, str] | None = None) -> str:
    """One line for each selected stage: run or reuse, its folder, and the memory that it will take at the most; then
    what is worth a warning.

    Args:
        said: results that were described before, with what to call the job that has them; their stages are named in one
            line. Not filled.
    """
    lines, warnings = [], [*job.warnings, *too_large(job)]
    planned = [(step, artifact) for step, artifact in plan(job) if step.selected]
    shared: dict[str, list[str]] = {}
    for step, artifact in planned:
        if artifact is not None and artifact.path in (said or {}):
            shared.setdefault((said or {})[artifact.path], []).append(step.stage.name)
    of_others = {name for names in shared.values() for name in names}
    planned = [(step, artifact) for step, artifact in planned if step.stage.name not in of_others]
    lines += [f"as {job_name}: {', '.join(names)}" for job_name, names in shared.items()]
    width = max([20, *(len(step.stage.name) for step, _ in planned)])
    for step, artifact in planned:
        if artifact is None:
            action, where = "run", f"{from_here(job.store / step.stage.stage)}/ (named once the plan is known)"
        else:
            action = "reuse" if step.stage.is_whole(job, artifact) and not step.forced else "run"
            resumed = " (continues an interrupted one)" if action == "run" and artifact.partial.exists() else ""
            where = f"{from_here(artifact.path)}{resumed}"
        if action == "run":
            where = f"{where}  {need(step.stage, job)}".rstrip()
        lines.append(f"{step.stage.name:<{width}} {action:<6} {where}")
    lines += [f"warning: {warning}" for warning in warnings]
    return "\n".join(lines)


def too_large(job: Job) -> list[str]:
    """Which of the stages that are to run take more memory than there is, in words, and what would fit."""
    needs = {step.stage.name: need(step.stage, job) for step in _to_run(job)}
    return [needed.warning(name) for name, needed in needs.items() if needed.advice]


def _to_run(job: Job) -> list[Step]:
    return [
        step
        for step, known in plan(job)
        if step.selected and (step.forced or known is None or not step.stage.is_whole(job, known))
    ]


def preflight(job: Job, looked_at: set[str] | None = None) -> None:
    """Raise `UserError` for what is cheap to know and would end a stage that is to run.

    Args:
        looked_at: stages for which that was done before, so that it is not done again; filled.
    """
    looked_at = set() if looked_at is None else looked_at
    for step in _to_run(job):
        about = step.stage.looks_at
        if about not in looked_at:
            looked_at.add(about)
            step.stage.preflight(job)
