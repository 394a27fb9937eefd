"""Merge: let the method make its plan, apply it, and keep a checkpoint that plain transformers loads."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.engine.window_memo import WindowMemos
from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.stages.calibrate import load_samples, load_statistics
from slm_pipeline.jobs.stages.time_blocks import load_block_times
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.machine import together
from slm_pipeline.methods.latency import plan_for_speedup
from slm_pipeline.methods.target import ParameterCounts, Speedup
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.results.of_run import of_pruning
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.checksums import digest
from slm_pipeline.store.files import write_text
from slm_pipeline.store.unfinished import note_complete
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.mergekit import can_name, to_mergekit
from slm_pipeline.surgery.plan import Plan, file_of, format_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slm_pipeline.models.view import ModelView

log = logging.getLogger(__name__)

# 2: checkpoints that transformers 4 reads alike; CoMe keeps the q/k gains of OLMo 2 with their rows; the plan of a
# method that reads no calibration text names none; replaceme holds samples out of its fit
# 3: allocation=sensitivity measures at other widths
# 4: joint fits to the own output too, keeps a model of equal widths as a candidate and protected layers whole
# 5: joint fits to the own output with all tokens alike too
# 6: and to the dense stream; its widths by layer begin with the best of one width
VERSION = 7


class Merge(Stage):
    """Leaves plan.json, for a plan that only removes layers mergekit.yml, and with ``keep=model`` the pruned model
    in model/."""

    name = stage = "merge"
    leaves = ("plan.json",)

    def __init__(self, *needs: str):
        self.needs = needs

    def identity(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": job.source.fingerprint,
            "calibration": results["calibrate"].key if job.method.reads_calibration else None,
            **job.method.identity(),
            **job.threshold.identity(),
            # With a floor of its own the method does not look at the ratio.
            "pruning_ratio": job.pruning_ratio.identity() if job.threshold.floor is None else None,
            **({"block_times": results["time_blocks"].key} if "time_blocks" in self.needs else {}),
        }

    def memory(self, job: Job, sizes: Sizes) -> int:
        """The search. What is saved and loaded again is smaller than the dense model, which has gone by then."""
        return sizes.weights + job.method.memory(sizes)

    def host_memory(self, job: Job, sizes: Sizes) -> int:
        return job.method.host_memory(sizes)

    def run(self, job: Job, results: Mapping[str, Artifact], out: Path, tracker: Tracker) -> dict[str, Any]:
        from slm_pipeline.models.loading import found_by_others, load_dense
        from slm_pipeline.models.view import ModelView
        from slm_pipeline.surgery.apply import layer_sizes

        # Otherwise it was decided by an attempt that was interrupted, or that kept no weights.
        if not (out / "plan.json").is_file():
            found, view, tokenizer = self._search(job, results)
            found.write(out / "plan.json")
            note_complete(out, "plan.json", "plan.safetensors")
        else:
            model, tokenizer = load_dense(job.source)
            view = ModelView(model)
        counts = ParameterCounts.of(view)
        plan = Plan.read(out / "plan.json")
        if plan.ops and all(op.only_removes for op in plan.ops):
            model_name = found_by_others(job.source)
            kept = [layer for group in plan.layer_groups for layer in group]
            if can_name(model_name):
                write_text(out / "mergekit.yml", to_mergekit(kept, model_name, job.config.model.dtype))
            else:
                log.warning("no mergekit.yml: mergekit takes the + or @ in %s for an adapter or a revision", model_name)
        dense_sizes = layer_sizes(view)
        sizes, changes = measure_changes(plan, dense_sizes)
        outside_layers = counts.total - sum(size.whole for size in dense_sizes)
        if job.config.keep == "model":
            save_pruned(plan, view.model, tokenizer, out / "model", job)
        return {
            "checkpoint": checkpoint_id(job, plan),
            "threshold": plan.threshold,
            "num_layers": {"dense": plan.model["num_layers"], "pruned": plan.num_layers},
            "parameters": {"dense": counts.total, "pruned": outside_layers + sum(size.whole for size in sizes)},
            "layers": format_groups(plan.layer_groups),
            "changes": changes.to_json(),
            **{name: plan.scores[name] for name in ("latency", "held_out") if name in plan.scores},
        }

    def is_whole(self, job: Job, artifact: Artifact) -> bool:
        return super().is_whole(job, artifact) and (job.config.keep == "plan" or (artifact.path / "model").is_dir())

    def publish(self, artifact: Artifact, tracker: Tracker, *, reused: bool) -> None:
        scores = load_plan(artifact).scores
        for line in scores.get("warnings", []):  # said again where the result is reused
            log.warning("%s", line)
        for step, row in enumerate(scores.get("steps", [])):
            tracker.log(
                {"similarity": row["similarity"], "accepted": float(row["accepted"])}, stage=self.name, step=step
            )
        result = artifact.record()["result"]
        if result["threshold"] is not None and result["num_layers"]["pruned"] == result["num_layers"]["dense"]:
            log.warning(
                "threshold %s: no merge is that similar, the pruned model is the dense one", result["threshold"]
            )
        tracker.numbers(of_pruning(result), stage=self.name)

    def _search(self, job: Job, results: Mapping[str, Artifact]) -> tuple[Plan, ModelView, Any]:
        windows = WindowMemos(results["calibrate"].path, afresh="merge" in job.config.force)
        if job.method.shares_samples:
            return together.run(search, job, dict(results), windows=windows)
        return search(job, results, windows)


def search(
    job: Job, results: Mapping[str, Artifact], windows: WindowMemos | None = None
) -> tuple[Plan, ModelView, PreTrainedTokenizerBase]:
    """The method's plan, the dense model that it was made on, and its tokenizer.

    Args:
        results: those of the stages that the merge needs.
        windows: what is known of merged windows; None: nothing, and nothing is kept.
    """
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView

    model, tokenizer = load_dense(job.source)
    view = ModelView(model)
    input_ids, identity = load_samples(results["calibrate"])
    problem = job.pruning_problem(view, input_ids, load_statistics(results["calibrate"]), identity, windows)
    started = time.monotonic()
    if isinstance(problem.target, Speedup):
        plan = plan_for_speedup(job.method, problem, load_block_times(results["time_blocks"]))
    else:
        plan = job.method.plan(problem)
    plan.scores["seconds"] = round(time.monotonic() - started, 3)
    return plan, view, tokenizer


def checkpoint_id(job: Job, plan: Plan) -> str:
    """What the pruned weights are: the dense model's own fingerprint when the plan changes nothing."""
    return digest([job.source.fingerprint, plan.content()]) if plan.ops else job.source.fingerprint


def load_plan(artifact: Artifact) -> Plan:
    return Plan.read(artifact.path / "plan.json")


def load_pruned(job: Job, artifact: Artifact) -> tuple[Any, Any]:
    """The model of a finished merge or repair, and its tokenizer; rebuilt from the plan when no weights were kept."""
    from slm_pipeline.models.loading import load_checkpoint, load_dense, load_tokenizer
    from slm_pipeline.surgery.apply import apply

    if (artifact.path / "model").is_dir():
        folder = artifact.path / "model"
        return load_checkpoint(folder, job.config.model), load_tokenizer(folder)
    model, tokenizer = load_dense(job.source)
    return apply(load_plan(artifact), model), tokenizer


def save_pruned(plan: Plan, model: Any, tokenizer: Any, folder: Path, job: Job) -> None:
    """Apply ``plan`` to ``model`` and keep the result in ``folder``, verified; ``model`` is used up."""
    from slm_pipeline.export import model_card
    from slm_pipeline.models import checkpoint
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.apply import apply, layer_sizes

    _, changes = measure_changes(plan, layer_sizes(ModelView(model)))
    card = model_card.text(
        title=f"{plan.model['name']}, {plan.num_layers} layers ({plan.method})",
        base=model_card.Base.of(asdict(job.config.model)),
        paragraphs=[model_card.in_words(plan, changes.lines), model_card.REPLAY],
        command=job.command,
    )
    checkpoint.save(apply(plan, model), tokenizer, folder, card=card, config=job.config.model)
    plan.write(file_of(folder))
