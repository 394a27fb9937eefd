"""LLM-Streamline's choice of layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from slm_pipeline.config.ranges import NumLayersOrZero
from slm_pipeline.methods.angular import AngularDistance
from slm_pipeline.methods.base import CalibrationSize, PruningProblem
from slm_pipeline.methods.target import Layers
from slm_pipeline.surgery.plan import Plan


@dataclass(kw_only=True)
class Streamline(AngularDistance):
    """LLM-Streamline, arXiv 2403.19135, "layer pruning only": the contiguous block of layers with the largest cosine
    between what enters and what leaves it, averaged over all tokens.

    Departures from the published code: a block that ends at the last layer is scored on its true output; no tokens x
    tokens matrix; any architecture.

    The paper then puts one trained layer where the block was. With ``replacement=true`` the block is one layer longer
    and its first layer stays, to become that layer (``recovery=block_mse``); as many layers go either way.

    Scores in the plan: distances[l] = 1 - mean cosine for every allowed start l (null elsewhere).
    """

    protect_first: NumLayersOrZero = 0
    replacement: bool = False  # keep one layer more, the first of the block, for `recovery=block_mse`
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(50, 2048))

    name: ClassVar[str] = "streamline"

    def plan(self, problem: PruningProblem[Layers]) -> Plan:
        kept = int(self.replacement)
        block, distances = self.closest_ends(1 - problem.statistics.cosine, problem.target.remove + kept)
        return self.removal_plan(problem, block[kept:], {"distances": distances})
