"""The contiguous block whose two ends are most alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.config.ranges import NumLayersOrZero
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, LayerRemoval, PruningProblem
from slm_pipeline.methods.target import Layers
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class AngularDistance(LayerRemoval):
    """The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887, equation 7 (PruneMe).

    Removes layers l .. l + n - 1 with the smallest angular distance d(l, n) = arccos(cos(h_l, h_l+n)) / pi, taken at
    each sample's last token and averaged over samples. As in PruneMe, layer 0 is never removed.

    Departures from the published code: a block that ends at the last layer is scored on that layer's true output,
    not on the final-normed one; no samples are lost to an incomplete batch; all block sizes come from one pass. The
    calibration size is ours; PruneMe takes 4000 samples of at most 1024 tokens.

    Scores in the plan: distances[l] = d(l, n) for every allowed start l (null elsewhere).
    """

    protect_first: NumLayersOrZero = 1
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(128, 1024))

    name: ClassVar[str] = "angular"
    streams: ClassVar[bool] = True

    def plan(self, problem: PruningProblem[Layers]) -> Plan:
        removed, distances = self.closest_ends(problem.statistics.angle_last, problem.target.remove)
        return self.removal_plan(problem, removed, {"distances": distances})

    def closest_ends(self, distance: Tensor, size: int) -> tuple[list[int], list[float | None]]:
        """The block of ``size`` layers with the smallest ``distance`` ([L + 1, L + 1]) between its two ends."""
        num_layers = len(distance) - 1
        allowed = range(self.protect_first, num_layers - self.protect_last - size + 1)
        distances = [float(distance[start, start + size]) if start in allowed else None for start in range(num_layers)]
        if not all(math.isfinite(distances[start] or 0.0) for start in allowed):
            raise UserError(f"method={self.name}: the states are not finite; try model.dtype=float32")
        best = min(allowed, key=lambda start: distances[start] or 0.0)
        return list(range(best, best + size)), distances
