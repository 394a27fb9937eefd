"""Repair: extend the plan by what makes up for its damage, and keep the checkpoint that it leads to."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.stages.merge import checkpoint_id, load_plan, save_pruned
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.machine import together
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.repair.base import RepairProblem
from slm_pipeline.results.of_run import of_repair
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.unfinished import forget, note_complete
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slm_pipeline.models.view import ModelView

log = logging.getLogger(__name__)

# 2: errors in the stream, gains of norms; 3: least_gain; 4: own output first; divergence of what stays
# 5: fits to the own output with all tokens alike; 6: to the dense stream too
VERSION = 7


class Repair(Stage):
    """Leaves plan.json, the method's plan with operations that repair what it left, and with ``keep=model`` the
    repaired model in model/."""

    name = stage = "repair"
    needs = ("merge",)
    leaves = ("plan.json",)

    def identity(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any] | None:
        """None until the plan is known: equal plans share their repair, whatever search led to them.

        Also None where nothing that reads a repair is among the job's stages: its text was not looked at.
        """
        if not results["merge"].done or "repair" not in job.identities:
            return None
        return {
            "version": VERSION,
            "model": job.source.fingerprint,
            "checkpoint": results["merge"].record()["result"]["checkpoint"],
            **job.identities["repair"],
        }

    def memory(self, job: Job, sizes: Sizes) -> int | None:
        assert job.repair is not None
        text = job.repair.calibration
        beside = job.repair.memory(replace(sizes, num_samples=text.num_samples, seq_len=text.seq_len))
        return None if beside is None else sizes.weights + beside

    def host_memory(self, job: Job, sizes: Sizes) -> int:
        assert job.repair is not None
        return job.repair.host_memory(sizes)

    def run(self, job: Job, results: Mapping[str, Artifact], out: Path, tracker: Tracker) -> dict[str, Any]:
        from slm_pipeline.models.loading import load_dense
        from slm_pipeline.models.view import ModelView
        from slm_pipeline.surgery.apply import layer_sizes

        assert job.repair is not None
        if not (out / "plan.json").is_file():  # else an attempt was interrupted after it was found
            if job.repair.shares_samples:
                plan, view, tokenizer = together.run(repaired, job, results["merge"], out)
            else:
                plan, view, tokenizer = repaired(job, results["merge"], out)
            plan.write(out / "plan.json")
            note_complete(out, *(name for name in ("plan.json", "plan.safetensors") if (out / name).exists()))
        else:
            model, tokenizer = load_dense(job.source)
            view = ModelView(model)
        forget(out, "layers")  # plan.safetensors has them
        plan = Plan.read(out / "plan.json")
        _, changes = measure_changes(plan, layer_sizes(view))
        if job.config.keep == "model":
            save_pruned(plan, view.model, tokenizer, out / "model", job)
        return {
            "checkpoint": checkpoint_id(job, plan),
            "changes": changes.to_json(),
            **plan.scores["repair"],
        }

    def is_whole(self, job: Job, artifact: Artifact) -> bool:
        return super().is_whole(job, artifact) and (job.config.keep == "plan" or (artifact.path / "model").is_dir())

    def publish(self, artifact: Artifact, tracker: Tracker, *, reused: bool) -> None:
        for line in load_plan(artifact).scores.get("warnings", []):  # said again where the result is reused
            log.warning("%s", line)
        tracker.numbers(of_repair(artifact.record()["result"]), stage=self.name)


def repaired(job: Job, merge: Artifact, out: Path) -> tuple[Plan, ModelView, PreTrainedTokenizerBase]:
    """The plan of a finished merge with what repairs it, the dense model that it was found on, and its tokenizer.

    Args:
        out: where the first process keeps what a next attempt may go on from.
    """
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView

    assert job.repair is not None
    model, tokenizer = load_dense(job.source)
    view = ModelView(model)
    started = time.monotonic()
    samples = job.repair.samples(tokenizer, job.data_dir)
    problem = RepairProblem(
        view=view,
        plan=load_plan(merge),
        input_ids=samples.input_ids,
        out=out,
        note_complete=functools.partial(note_complete, out),
        places=samples.ids,
    )
    plan = job.repair.repair(problem)
    plan.scores.setdefault("repair", {"name": job.repair.name})["seconds"] = round(time.monotonic() - started, 3)
    return plan, view, tokenizer
