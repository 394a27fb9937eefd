"""Calibrate: cut the calibration samples and look at the dense model on them, once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.machine import together
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.analysis.similarity import TokenAlignment
    from slm_pipeline.engine.statistics import Statistics
    from slm_pipeline.models.source import ModelSource

VERSION = 2  # 2: CKA and patches in similarity.json


class Calibrate(Stage):
    """Leaves samples.safetensors (``input_ids`` [N, length] int64), samples.json, statistics.safetensors
    (`slm_pipeline.engine.statistics.Statistics`) and similarity.json for the picture: ``cosine`` and ``cka``
    [L + 1, L + 1] (null where undefined), their ``patches`` and CKA's ``settings``."""

    name = stage = "calibrate"
    leaves = ("samples.safetensors", "samples.json", "statistics.safetensors", "similarity.json")

    def identity(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any]:
        return {"version": VERSION, "model": job.source.fingerprint, "calibration": job.calibration.identity()}

    def memory(self, job: Job, sizes: Sizes) -> int:
        """The states behind all layers, of a batch of `MAX_BATCH_TOKENS` in float32 too, twice; [L + 1, L + 1]
        similarities of each of its tokens, and Gram matrices for CKA."""
        tokens, states = sizes.batch_tokens(2048), sizes.layers + 1
        reduced = 4 * tokens * (2 * states * sizes.hidden + 3 * states**2) + 3 * 8 * states * 256**2
        return sizes.weights + sizes.passing(2048) + max(reduced, sizes.running(tokens))

    def run(self, job: Job, results: Mapping[str, Artifact], out: Path, tracker: Tracker) -> dict[str, Any]:
        from safetensors.torch import save_file

        from slm_pipeline.analysis.similarity import map_summary
        from slm_pipeline.models.loading import load_dense_tokenizer

        # before the weights: a text that is too short needs no model to be found so
        samples = job.calibration.sample(load_dense_tokenizer(job.source))
        save_file({"input_ids": samples.input_ids}, out / "samples.safetensors")
        write_json(
            out / "samples.json", {"mode": samples.mode, "fingerprint": samples.fingerprint, "samples": samples.ids}
        )
        statistics, alignment = together.run(look, job.source, samples.input_ids)
        statistics.save(out / "statistics.safetensors")
        maps = {"cosine": map_summary(statistics.cosine), "cka": map_summary(alignment.result())}
        write_json(
            out / "similarity.json",
            {
                **{metric: values["matrix"] for metric, values in maps.items()},
                "patches": {metric: values["patches"] for metric, values in maps.items()},
                "settings": alignment.settings(),
            },
        )
        return {
            "source": job.config.calibration.source,
            "mode": samples.mode,
            "num_samples": len(samples.input_ids),
            "seq_len": samples.input_ids.shape[1],
            "num_tokens": samples.input_ids.numel(),
            "fingerprint": samples.fingerprint,
        }

    def publish(self, artifact: Artifact, tracker: Tracker, *, reused: bool) -> None:
        result = artifact.record()["result"]
        tracker.log({key: result[key] for key in ("num_samples", "seq_len", "num_tokens")}, stage=self.name)


def look(source: ModelSource, input_ids: Tensor) -> tuple[Statistics, TokenAlignment]:
    """What the dense model shows on the samples, [N, length] int64; shared out where several processes do it."""
    from slm_pipeline.analysis.similarity import TokenAlignment
    from slm_pipeline.engine.statistics import collect
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView

    model, _ = load_dense(source)
    alignment = TokenAlignment()
    statistics = collect(ModelView(model), input_ids, alignment)
    return statistics, alignment


def load_statistics(artifact: Artifact) -> Statistics:
    """What the dense model showed on the samples of a finished calibration."""
    from slm_pipeline.engine.statistics import Statistics

    return Statistics.load(artifact.path / "statistics.safetensors")


def load_samples(artifact: Artifact) -> tuple[Tensor, dict[str, Any]]:
    """Token ids [N, length] int64 of a finished calibration, and fingerprint and num_tokens for the plan."""
    from safetensors.torch import load_file

    input_ids = load_file(artifact.path / "samples.safetensors")["input_ids"]
    info = json.loads((artifact.path / "samples.json").read_text(encoding="utf-8"))
    return input_ids, {"fingerprint": info["fingerprint"], "num_tokens": input_ids.numel()}
