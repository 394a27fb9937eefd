"""Time the dense model's blocks on the device at hand, for a plan that aims at a speedup."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm_pipeline.evaluation.block_times import NARROWED, NEW, BlockTimes, measure
from slm_pipeline.evaluation.efficiency import check_machine, machine
from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.machine import gpus
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.files import write_json

VERSION = 1


class TimeBlocks(Stage):
    """Leaves block_times.json (`slm_pipeline.evaluation.block_times.BlockTimes`). Part of ``calibrate``: like that it
    looks at the dense model alone, once."""

    name = "time_blocks"
    stage = "calibrate"
    leaves = ("block_times.json",)

    def identity(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any]:
        device = job.config.model.device
        return {
            "version": VERSION,
            "model": job.source.fingerprint,
            "block_times": {**self._settings(job), "machine": machine(device)},
        }

    def _settings(self, job: Job) -> dict[str, Any]:
        asked = job.config.pruning_ratio
        return {"mode": asked.mode, "batch_size": asked.batch_size, "context": asked.context}

    def memory(self, job: Job, sizes: Sizes) -> int:
        """The model, a few of its blocks narrower beside it, keys and values of both, and what is read in a block."""
        asked = job.config.pruning_ratio
        tokens = asked.batch_size * (asked.context + NEW)
        narrower = NARROWED * sizes.item_bytes * sizes.block_parameters
        kept = 2 * tokens * 2 * sizes.keys * sizes.item_bytes * sizes.layers
        return sizes.weights + narrower + kept + sizes.running(asked.batch_size * asked.context)

    def preflight(self, job: Job) -> None:
        check_machine("pruning_ratio.mode", job.config.pruning_ratio.mode, job.config.model.device)

    def run(self, job: Job, results: Mapping[str, Artifact], out: Path, tracker: Tracker) -> dict[str, Any]:
        from slm_pipeline.models.loading import load_dense
        from slm_pipeline.models.view import ModelView

        model, _ = load_dense(job.source)
        times = measure(ModelView(model), **self._settings(job))
        write_json(out / "block_times.json", times.to_json())
        return {"seconds_per_token": times.seconds, "device": gpus.in_words(job.config.model.device)}

    def publish(self, artifact: Artifact, tracker: Tracker, *, reused: bool) -> None:
        tracker.log({"seconds_per_token": artifact.record()["result"]["seconds_per_token"]}, stage=self.name)


def load_block_times(artifact: Artifact) -> BlockTimes:
    return BlockTimes.from_json(json.loads((artifact.path / "block_times.json").read_text(encoding="utf-8")))
