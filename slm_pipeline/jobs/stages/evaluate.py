"""Evaluate: one measure of one part, a task or a text, on one model. Each is a result of its own in the store."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_pipeline.config import plugins
from slm_pipeline.data.overlap import RUN, overlaps
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.measure import Measure
from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.loaded import ScoredModel
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.stages.merge import load_pruned
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.machine import gpus, together
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.results.number import Number
from slm_pipeline.store.artifact import Artifact

log = logging.getLogger(__name__)

VERSION = 3  # 3: a result for each measure and part
_MADE_BY = {"pruned": "merge", "repaired": "repair", "recovered": "recover"}


class Evaluate(Stage):
    """Scores ``target`` (dense, pruned, repaired or recovered) by one measure; what it returned is in stage.json."""

    stage = "evaluate"

    def __init__(self, target: str, measure: Measure, part: str):
        self.target, self.measure, self.part = target, measure, part
        self.name = f"evaluate_{target}/{measure.label(part)}"
        self.needs = () if target == "dense" else (_MADE_BY[target],)

    @property
    def folder(self) -> str:
        """A file's whole path may be part of a label."""
        return f"evaluate_{self.target}/{self.measure.label(self.part).replace('/', '_')}"

    @property
    def looks_at(self) -> str:
        return self.measure.label(self.part)

    def identity(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any] | None:
        """None until the checkpoint is known: a checkpoint is scored once, whichever job made it."""
        checkpoint = self._checkpoint(job, results)
        if checkpoint is None:
            return None
        return {
            "version": [VERSION, self.measure.version],
            "checkpoint": checkpoint,
            **({"dense": job.source.fingerprint} if self.measure.reads_dense else {}),
            "measure": self.measure.name,
            **({"plugins": code} if (code := plugins.code_of(type(self.measure))) else {}),
            "of": job.evaluation.identity()[self.measure.label(self.part)],
        }

    def _checkpoint(self, job: Job, results: Mapping[str, Artifact]) -> str | None:
        if self.target == "dense":
            return job.source.fingerprint
        if self.target in ("pruned", "repaired"):
            plan = results.get(_MADE_BY[self.target])
            return plan.record()["result"]["checkpoint"] if plan is not None and plan.done else None
        return f"recovered:{results['recover'].key}" if "recover" in results else None

    def preflight(self, job: Job) -> None:
        """The part has what the measure needs of it; see `Measure.preflight`."""
        self.measure.preflight(self.part, job.dense_tokenizer, job)

    def memory(self, job: Job, sizes: Sizes) -> int | None:
        scored = sizes if self.target == "dense" else sizes.with_layers(job.num_layers)
        beside = self.measure.memory(self.part, scored)
        return None if beside is None else scored.weights + self.measure.reads_dense * sizes.weights + beside

    def smaller(self, job: Job) -> Iterator[tuple[str, Stage, Job]]:
        for words, measure, part in self.measure.smaller(self.part):
            yield words, Evaluate(self.target, measure, part), job

    def run(self, job: Job, results: Mapping[str, Artifact], out: Path, tracker: Tracker) -> dict[str, Any]:
        if self.measure.shares_samples:
            found = together.run(measured, self, job, dict(results))
        else:
            found = measured(self, job, results)
        numbers = {number.key: number.to_json() for number in self._finite(self.measure.numbers(self.part, found))}
        overlap = self._overlap(job, results)
        result = {
            "measure": self.measure.name,
            "label": self.measure.label(self.part),  # for people: another job may call the part otherwise
            "found": found,
            "numbers": numbers,
            "device": gpus.in_words(job.config.model.device),
        }
        return {**result, **({"overlap": overlap} if overlap else {})}

    def _finite(self, numbers: Sequence[Number]) -> Sequence[Number]:
        """The numbers; `UserError` for one that no table could compare, which is then no result."""
        for number in numbers:
            if not math.isfinite(number.value):
                name = number.below(self.target, self.measure.label(self.part)).key
                raise UserError(f"{name} is {number.value}, not a finite number; try model.dtype=float32")
        return numbers

    def scored(self, job: Job, results: Mapping[str, Artifact]) -> ScoredModel:
        """The model that is scored, to be loaded into this process."""
        from slm_pipeline.models.loading import load_dense

        return ScoredModel(
            target=self.target,
            loaded=job.loaded,
            load=lambda: self._load(job, results),
            load_dense=lambda: load_dense(job.source),
            reads_dense=self.measure.reads_dense,
        )

    def _overlap(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, int] | None:
        """How many of the documents are found in the recovery's training data; see `overlaps`."""
        if self.target != "recovered" or not isinstance(job.recovery, FineTuning):
            return None
        texts = self.measure.texts(self.part, self.scored(job, results).tokenizer, job)
        train, _ = job.recovery.examples(job.data_dir) if texts else ([], None)
        return overlaps({self.part: texts}, train).get(self.part)

    def publish(self, artifact: Artifact, tracker: Tracker, *, reused: bool) -> None:
        tracker.numbers(self.numbers(artifact), stage=self.name)
        if found := artifact.record()["result"].get("overlap"):
            log.warning(
                "%s: %d of %d documents share %d words in a row with the recovery's training data",
                self.measure.label(self.part), found["documents"], found["of"], RUN,
            )  # fmt: skip

    def numbers(self, artifact: Artifact) -> list[Number]:
        """The finished result's numbers under their whole keys: how this job calls its texts may not be how the job did
        that measured them."""
        label = self.measure.label(self.part)
        measured = {"measure": self.measure.name, "part": self.part}
        return [
            Number.from_json(key, {**said, "measured": {**measured, **said["measured"]}}).below(self.target, label)
            for key, said in artifact.record()["result"]["numbers"].items()
        ]

    def _load(self, job: Job, results: Mapping[str, Artifact]) -> tuple[Any, Any]:
        from slm_pipeline.models.loading import load_checkpoint, load_dense, load_tokenizer

        if self.target == "dense":
            return load_dense(job.source)
        if self.target in ("pruned", "repaired"):
            return load_pruned(job, results[_MADE_BY[self.target]])
        folder = results["recover"].path / "model"
        return load_checkpoint(folder, job.config.model), load_tokenizer(folder)


def measured(evaluation: Evaluate, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any]:
    """What the measure finds of its part; shared out where several processes do it."""
    return evaluation.measure.run(evaluation.part, evaluation.scored(job, results), job)
