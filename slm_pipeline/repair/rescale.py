"""Prune&Comp: make up for the growth of the residual stream that went with the layers that were cut out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.repair.base import Repair, RepairProblem, extended
from slm_pipeline.surgery.ops.scale import Scale
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes


@dataclass(kw_only=True)
class Rescale(Repair):
    """Prune&Comp, arXiv 2507.18212: one scalar for each place where layers went.

    Let h_s be the dense stream that enters the layers that went, h_e the one that leaves them. The stream below the cut
    is to be s times as large, with s the mean over channels c of E|h_e,c| / E|h_s,c| over all tokens. Layers read it
    through norms that know no scale, so it is the same to divide by s what all layers above the cut write. That is what
    is done: embeddings and a head that is tied to them stay as they are, where the published code scales both.

    Departures from the published code: the ratios are those of the dense model; there a layer goes, the model is
    rescaled and measured again. Refused where norms do not make layers blind to the scale of the stream, or stand
    behind the last projections: Gemma 2 and 3, OLMo 2.

    Where a plan has put a linear map in the place of the layers that went (`replaceme`), nothing is to be made up for.

    Scores in the plan: repair, with num_tokens and cuts: for each the first layer above it, and s.
    """

    name: ClassVar[str] = "rescale"
    streams: ClassVar[bool] = True

    def check(self, context: Context) -> None:
        super().check(context)
        if context.source.architecture.output_norms:
            raise UserError(
                f"repair=rescale multiplies what projections put out; in {context.source.name}, a"
                f" {context.source.model_type} model, a norm follows them; use repair=refit"
            )

    def memory(self, sizes: Sizes) -> int:
        return sizes.passing(2048) + sizes.running(sizes.batch_tokens(2048))

    def repair(self, problem: RepairProblem) -> Plan:
        import torch

        from slm_pipeline.engine.blocks import batches, dense_passes
        from slm_pipeline.engine.statistics import MAX_BATCH_TOKENS, check_finite

        view, plan = problem.view, problem.plan
        layers, groups = plan.layers(), plan.layer_groups
        below = [-1, *(group[-1] for group in groups[:-1])]
        folded = [False, *(layer.folded for layer in layers[:-1])]
        cuts: list[tuple[int, int]] = []
        stood_for: list[tuple[int, int]] = []
        for low, group, is_folded in zip(below, groups, folded, strict=True):
            if group[0] > low + 1:
                (stood_for if is_folded else cuts).append((low + 1, group[0]))
        sizes = torch.zeros(view.num_layers + 1, view.config.hidden_size, dtype=torch.float64)
        for runner in dense_passes(view, batches(problem.input_ids, MAX_BATCH_TOKENS) if cuts else []):
            states = runner.states
            check_finite(states)
            for layer in {layer for cut in cuts for layer in cut}:
                sizes[layer] += states[layer].float().abs().sum(dim=(0, 1), dtype=torch.float64).cpu()
        factors = {end: float((sizes[end] / sizes[start].clamp_min(1e-12)).mean()) for start, end in cuts}
        ops, total = [], 1.0
        for group in groups:
            total *= factors.get(group[0], 1.0)
            if total != 1.0:
                ops.append(Scale((group[0],), 1 / total))
        found = {
            "name": self.name,
            "num_tokens": problem.input_ids.numel() if cuts else 0,
            "cuts": [{"layer": layer, "factor": factor} for layer, factor in factors.items()],
        }
        lines = [
            f"repair=rescale: a linear map stands for layers {start} to {end - 1}, which went: the stream has grown"
            " by what they did; it is not rescaled there"
            for start, end in stood_for
        ]
        if not ops and not lines:
            lines = ["repair=rescale: no whole layers went below one that stays, so there is nothing to rescale"]
        scores = {**plan.scores, "repair": found}
        if lines:
            scores["warnings"] = [*plan.scores.get("warnings", []), *lines]
        return extended(plan, ops=[*plan.ops, *ops], scores=scores)
