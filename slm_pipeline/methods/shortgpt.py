"""ShortGPT: remove the layers that change the residual stream least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from slm_pipeline.methods.base import CalibrationSize, LayerRemoval, PruningProblem
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.surgery.plan import Plan


@dataclass(kw_only=True)
class ShortGPT(LayerRemoval):
    """Block influence, arXiv 2403.03853, equation 1: BI_i = mean over tokens of 1 - cos(h_i, h_i+1), lowest first.

    Departures from the published code: the last layer is scored on its true output, not on the final-normed one; no
    tokens x tokens matrix; the configuration says how many layers are left. The published calibration text is 50
    whole books of PG19 in windows of 256 tokens; the size here is ours.

    Scores in the plan: block_influence of every layer, and the order of removal.
    """

    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(64, 256))

    name: ClassVar[str] = "shortgpt"
    streams: ClassVar[bool] = True
    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)
    removes_by_order: ClassVar[bool] = True

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        influence = (1 - problem.statistics.cosine.diagonal(1)).tolist()
        return self.removal_plan(problem, self.lowest_first(problem, influence), {"block_influence": influence})
