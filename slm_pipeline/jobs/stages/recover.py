"""Recover: train the pruned model and keep the result."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slm_pipeline.config import plugins
from slm_pipeline.errors import UserError
from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.stages.merge import load_plan, load_pruned
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.machine import memory, ranks, together
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.recovery import workers
from slm_pipeline.recovery.base import Log, Recovery, RecoveryProblem
from slm_pipeline.recovery.collective import Trained
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.files import write_json
from slm_pipeline.store.unfinished import note_complete
from slm_pipeline.surgery.changes import Changes
from slm_pipeline.surgery.plan import file_of

# 2: checkpoints hold what trains alone, zeroed sublayers stay zero; 3: padding on the right; 4: the steps of a training
# in parts add up; 5: losses on logits have names of their own; 6: checkpoints that transformers 4 reads alike;
# 7: a warm-up as long as the training is cut
VERSION = 7
NOT_KEPT = ("checkpoints", "identity.json", "complete.json")


class Recover(Stage):
    """Leaves the recovered model in model/, curve.json, and whatever the recovery keeps (an adapter)."""

    name = stage = "recover"
    leaves = ("model", "curve.json")

    def __init__(self, after: str):
        """``after``: the stage whose model is trained, merge or repair."""
        self.after = after
        self.needs = (after,)

    def identity(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any] | None:
        """None until the plan is known: equal plans share their recovery, whatever search led to them.

        Also None where neither recover nor evaluate is among the job's stages: its data were not looked at.
        """
        if self.after not in results or not results[self.after].done or "recovery" not in job.identities:
            return None
        return {
            "version": VERSION,
            "checkpoint": results[self.after].record()["result"]["checkpoint"],
            **job.identities["recovery"],
            "seed": job.config.seed,
        }

    def memory(self, job: Job, sizes: Sizes) -> int | None:
        assert job.recovery is not None
        return job.recovery.memory(sizes.with_layers(job.num_layers))

    def host_memory(self, job: Job, sizes: Sizes) -> int:
        assert job.recovery is not None
        return job.recovery.host_memory(sizes.with_layers(job.num_layers))

    def smaller(self, job: Job) -> Iterator[tuple[str, Stage, Job]]:
        smaller: Any = job.recovery
        size = getattr(smaller, "micro_batch_size", 1)
        while size % 2 == 0:
            size //= 2
            smaller = replace(smaller, micro_batch_size=size)
            yield f"recovery.micro_batch_size={size}", self, replace(job, recovery=smaller)

    def preflight(self, job: Job) -> None:
        assert job.recovery is not None
        if job.recovery.places_blocks and job.config.keep == "plan":
            raise UserError(
                f"recovery={job.recovery.name} with sharding or quantize reads the weights that {self.after} leaves"
                " from their files, which keep=plan leaves out; use keep=model"
            )
        job.recovery.preflight(job.source, job.data_dir)

    def run(self, job: Job, results: Mapping[str, Artifact], out: Path, tracker: Tracker) -> dict[str, Any]:
        if not (out / "model").is_dir():  # else an attempt was interrupted after its model was safe
            self._train(job, results[self.after], out, tracker)
            load_plan(results[self.after]).write(file_of(out / "model"))
            note_complete(out, *(path.name for path in out.iterdir() if path.name not in NOT_KEPT))
        else:
            self._log_curve(_curve(out), tracker)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        return metrics

    def _train(self, job: Job, pruned: Artifact, out: Path, tracker: Tracker) -> None:
        from slm_pipeline.export import model_card
        from slm_pipeline.models import checkpoint
        from slm_pipeline.surgery.apply import silence_zeroed

        assert job.recovery is not None
        plan = load_plan(pruned)
        changes = Changes.of(pruned.record()["result"])
        make_problem = functools.partial(recovery_problem, job, pruned, out)

        logged: list[dict[str, float]] = []

        def log(metrics: dict[str, float], step: int) -> None:
            logged.append({"step": step, **metrics})
            tracker.log(metrics, stage=self.name, step=step)

        if job.recovery.num_processes > 1:
            workers.train(job.recovery, make_problem, log)
        elif ranks.launched() is not None and isinstance(job.recovery, FineTuning):
            together.run(train_together, job.recovery, make_problem, log=log)
            memory.free()
        problem = make_problem(log)
        result = job.recovery.run(problem)  # what has been trained together is finished: it finds nothing left to train
        self._log_curve([row for row in result.curve if row not in logged], tracker)  # of parts that were finished
        write_json(out / "curve.json", result.curve)
        write_json(out / "metrics.json", result.metrics)
        card = model_card.text(
            title=f"{plan.model['name']}, {plan.num_layers} layers ({plan.method}, {job.recovery.name})",
            base=model_card.Base.of(asdict(job.config.model)),
            paragraphs=[
                model_card.recovered_in_words(plan, changes.lines, job.recovery.name, _numbers(result.metrics)),
                model_card.REPLAY,
            ],
            command=job.command,
        )
        silence_zeroed(plan, result.model)  # whatever trained, what the plan removed stays removed
        model: Any = result.model
        placed = job.config.model
        if job.recovery.places_blocks:  # it may be larger than a GPU
            model, placed = model.to("cpu"), replace(placed, device="cpu")
        checkpoint.save(model, problem.tokenizer, out / "model", card=card, config=placed)

    def publish(self, artifact: Artifact, tracker: Tracker, *, reused: bool) -> None:
        if reused:  # a curve that is being trained was logged as it went
            self._log_curve(_curve(artifact.path), tracker)
        tracker.log(_numbers(artifact.record()["result"]), stage=self.name)

    def _log_curve(self, rows: list[dict[str, float]], tracker: Tracker) -> None:
        for row in rows:
            metrics = {name: value for name, value in row.items() if name != "step"}
            tracker.log(metrics, stage=self.name, step=int(row["step"]))


def train_together(
    recovery: Recovery, make_problem: Callable[[Log], RecoveryProblem], log: Log = lambda metrics, step: None
) -> None:
    """One process's part of a training, which ends when the finished checkpoints lie in ``out``."""
    with suppress(Trained):
        recovery.run(make_problem(log))


def recovery_problem(job: Job, pruned: Artifact, out: Path, log: Log) -> RecoveryProblem:
    """What the job's recovery gets; ``pruned`` is the finished merge or repair, ``out`` where it may write."""
    from slm_pipeline.models.loading import load_dense, load_mapped, load_tokenizer

    plugins.use(job.config.plugins)  # a training process of its own has not imported them
    if job.recovery is not None and job.recovery.places_blocks:
        folder = pruned.path / "model"
        model, tokenizer = load_mapped(folder, job.config.model), load_tokenizer(folder)
    else:
        model, tokenizer = load_pruned(job, pruned)
    return RecoveryProblem(
        teacher=lambda: load_dense(job.source)[0],
        model=model,
        tokenizer=tokenizer,
        plan=load_plan(pruned),
        out=out,
        base_path=str(pruned.path / "model"),
        seed=job.config.seed,
        data_dir=job.data_dir,
        log=log,
    )


def _curve(folder: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    return rows


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
