"""Remove from the output side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from slm_pipeline.methods.base import CalibrationSize, LayerRemoval, PruningProblem
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.surgery.plan import Plan


@dataclass(kw_only=True)
class ReverseOrder(LayerRemoval):
    """Removes the last layers, looking at nothing (Reassessing Layer Pruning, arXiv 2411.15558, which pairs it with
    partial-layer fine-tuning). ``protect_last=1`` keeps the very last layer and removes those below it.
    """

    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 128))

    name: ClassVar[str] = "reverse"
    streams: ClassVar[bool] = True
    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)
    removes_by_order: ClassVar[bool] = True

    @property
    def reads_calibration(self) -> bool:
        return False

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        removed = self.first_of(self.candidates(problem.view.num_layers)[::-1], problem)
        return self.removal_plan(problem, removed, scores={})
