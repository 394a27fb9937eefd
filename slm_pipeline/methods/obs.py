"""Optimal brain surgeon: remove the heads and neurons that the others can best make up for, and let them do it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.config.ranges import Count
from slm_pipeline.methods.base import CalibrationSize
from slm_pipeline.methods.layerwise import LayerwiseRemoval

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.allocation import Units


@dataclass(kw_only=True)
class OptimalBrainSurgeon(LayerwiseRemoval):
    """The optimal brain surgeon on whole units, as in ZipLM (arXiv 2302.04089), OSSCAR (2403.12983) and SlimGPT
    (2412.18110): with H = X X' + lam I, removing the columns P of the last projection W costs
    tr(W_P ([H^-1]_PP)^-1 W_P') if all other columns change as is best. The cheapest go, ``at_a_time`` neurons or one
    head in a round; W and H^-1 are updated exactly after each. What is left is solved for once more in the end.

    Departures from the published codes:
        - the unit of attention is a key-value group, with the output columns of all its query heads; there a query
          head, which leaves keys and values where they are (or ragged) with grouped queries;
        - W' is drawn to W by the penalty of the scores, so that the last solution is the optimum of what they measure;
        - the choice by |W_P X_P| alone is solved for too, and taken where its error is lower: greedy removal is no
          guarantee;
        - OSSCAR's exchange of removed units for kept ones is left out, as are ZipLM's search by measured latency and
          SlimGPT's ratio that rises with depth: every layer loses the same, or ``allocation=sensitivity``;
        - neurons that make massive activations stay (``massive``), by the dense model's statistics; the papers say
          nothing of them. On SmolLM2-135M this choice, whose tokens all count alike, keeps them anyway: at a fifth of
          the layers the loss is the same without the option.
    """

    at_a_time: Count = 32  # neurons removed between two updates: 1 is ZipLM's
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(128, 256))

    name: ClassVar[str] = "obs"
    streams: ClassVar[bool] = True

    def choices(self, weight: Tensor, gram: Tensor, penalty: float, units: Units, remove: int) -> list[Tensor]:
        from slm_pipeline.engine.least_squares import order_by_norm, removal_order

        size = len(gram) // len(units.scores)
        at_a_time = 1 if size > 1 else self.at_a_time
        order = removal_order(weight, gram, remove, size=size, penalty=penalty, at_a_time=at_a_time, fixed=units.fixed)
        return [order, order_by_norm(weight, gram, size=size, fixed=units.fixed)]
