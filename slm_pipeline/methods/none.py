"""No pruning: the dense model, as a baseline row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from slm_pipeline.methods.base import CalibrationSize, Method, PruningProblem
from slm_pipeline.methods.target import NoTarget
from slm_pipeline.surgery.plan import Plan


@dataclass(kw_only=True)
class NoPruning(Method):
    """Leaves every layer as it is. Takes no pruning ratio."""

    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 128))

    name: ClassVar[str] = "none"
    streams: ClassVar[bool] = True
    targets: ClassVar[tuple[type, ...]] = (NoTarget,)

    @property
    def reads_calibration(self) -> bool:
        return False

    def plan(self, problem: PruningProblem) -> Plan:
        return self.new_plan(problem, ops=[])
