"""Base of the width methods that may scale what they keep, by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_pipeline.config.ranges import Positive
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.width_removal import WidthRemoval
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.ops.replace import Replace
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.allocation import Units
    from slm_pipeline.surgery.ops import LayerSize


@dataclass(kw_only=True)
class MaskTuning(WidthRemoval):
    """Scales the units that stay in the candidate layers, as Kwon et al., arXiv 2204.00656, section 4.3, and folds the
    scales into the columns of the last projections. Memory: residual streams of all calibration tokens, twice.

    Departures from the published code:
        - normal equations in float64 with a ridge in units of their own size; there LSMR with a damping of 1;
        - the teacher is the dense model; there, for high ratios, one that is narrowed less;
        - scales beyond 10 leave that sublayer as it is; there, all that come after it too;
        - attention of the first layer is tuned like the others;
        - where a norm follows the projection (Gemma 2 and 3, OLMo 2), its own output is the target.

    Scores in the plan, besides: untuned, [layer, sublayer] of those whose scales were not believed.
    """

    tuning: bool = True  # false: what stays, stays as it is
    damping: Positive = 0.01  # draws scales to 1; relative to the mean square of a unit's share

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tuning:
            self.refuse_unused("with method.tuning=false", "damping")

    def width_plan(
        self,
        problem: PruningProblem,
        sizes: Sequence[LayerSize],
        units: Mapping[str, list[Units]],
        chosen: Mapping[str, list[Tensor]],
    ) -> Plan:
        plan = super().width_plan(problem, sizes, units, chosen)
        if self.tuning:
            self._tune(problem, plan, chosen)
        return plan

    def _tune(self, problem: PruningProblem, plan: Plan, chosen: Mapping[str, list[Tensor]]) -> None:
        """Append to ``plan`` what gives the units that stay their scales."""
        from slm_pipeline.engine.mask_tuning import scaled, tune

        view, layers = problem.view, self.candidates(problem.view.num_layers)
        kept = {part: dict(zip(layers, chosen.get(part, []), strict=False)) for part in SUBLAYERS}
        scales, untuned = tune(view, problem.input_ids, kept, self.damping)
        for layer in layers:
            found = tuple(part for part in SUBLAYERS if (layer, part) in scales)
            if not found:
                continue
            name = f"replace.{layer}"
            for part in found:
                weight, stay = view.output(layer, part).weight.detach(), kept[part][layer].to(view.device)
                columns = weight.unflatten(1, (view.num_units(layer, part), -1))[:, stay.to(weight.device)].flatten(1)
                factors = scales[layer, part].repeat_interleave(columns.shape[1] // len(stay))
                plan.tensors[f"{name}.{part}"] = scaled(columns, factors).float().cpu().numpy()
            plan.ops.append(Replace((layer,), found, name))
        plan.scores["untuned"] = [[layer, part] for layer, part in untuned]
        plan.check(f"the plan of method={self.name}")
