"""Base of the width methods that may scale what they keep, by least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_pipeline.config.ranges import Positive
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.narrowed import Narrowed, Place
from slm_pipeline.methods.width_removal import WidthRemoval

if TYPE_CHECKING:
    from slm_pipeline.engine.allocation import Units
    from slm_pipeline.models.sizes import Sizes


@dataclass(kw_only=True)
class MaskTuning(WidthRemoval):
    """Scales the units that stay in the candidate layers, as Kwon et al., arXiv 2204.00656, section 4.3, and folds the
    scales into the columns of the last projections. ``allocation=sensitivity`` measures what is not scaled yet.

    Memory: residual streams of all calibration tokens, twice, a layer's outputs, and products of neurons.

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

    def memory(self, sizes: Sizes) -> int:
        """States of all tokens, a layer's and those of its sublayers, and the sums of products in float64."""
        if not self.tuning:
            return super().memory(sizes)
        widest = max(sizes.queries, sizes.neurons if self.sublayers != "attention" else 0)
        tuning = sizes.states(sizes.tokens, 6) + sizes.running(2048) + 28 * widest**2
        return max(super().memory(sizes), tuning)

    def narrow(
        self, problem: PruningProblem, units: Mapping[Place, Units], gone: Mapping[Place, int]
    ) -> tuple[dict[Place, Narrowed], dict[str, Any]]:
        from slm_pipeline.engine.mask_tuning import scaled, tune

        found, measured = super().narrow(problem, units, gone)
        if not self.tuning:
            return found, measured
        view = problem.view
        found = {place: found.get(place) or Narrowed(of.after(0)) for place, of in units.items()}
        scales, untuned = tune(view, problem.input_ids, {place: of.kept for place, of in found.items()}, self.damping)
        for place, of_units in scales.items():
            weight, stay = view.output(*place).weight.detach(), found[place].kept
            columns = weight.unflatten(1, (view.num_units(*place), -1))[:, stay.to(weight.device)].flatten(1)
            factors = of_units.repeat_interleave(columns.shape[1] // len(stay))
            found[place] = Narrowed(stay, weight=scaled(columns, factors))
        return found, measured | {"untuned": [list(place) for place in untuned]}
