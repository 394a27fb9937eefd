"""Replay a plan that any method wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config.ranges import FilePath
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, Method, PruningProblem
from slm_pipeline.methods.target import NoTarget
from slm_pipeline.surgery.mergekit import Passthrough, read_passthrough
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.models.context import Context


@dataclass(kw_only=True)
class FromPlan(Method):
    """The decision of ``path`` on this model. Takes no pruning ratio, and reads no calibration text: the plan's
    ``calibration`` is null, what the original looked at is in its scores.

    ``path`` is a plan.json, or mergekit's passthrough YAML (.yml, .yaml) that keeps some layers. The model must have
    the depth that the plan was made for; another model of that depth is allowed, with a warning.

    Scores in the plan: replayed, with the method, the calibration and the scores of the plan.json.
    """

    path: FilePath
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 128))

    name: ClassVar[str] = "from_plan"
    streams: ClassVar[bool] = True
    targets: ClassVar[tuple[type, ...]] = (NoTarget,)

    @property
    def reads_calibration(self) -> bool:
        return False

    @cached_property
    def original(self) -> Plan | Passthrough:
        path = Path(os.path.expanduser(self.path))  # Path's own ends in a RuntimeError where nobody has that home
        return read_passthrough(path) if path.suffix in (".yml", ".yaml") else Plan.read(path)

    def options(self) -> dict[str, Any]:
        """The whole file counts, not its edits alone: what it measured goes into the new plan."""
        if isinstance(self.original, Passthrough):
            return {"kept": self.original.kept}
        return {"plan": self.original.fingerprint(), "method": self.original.method}

    def check(self, context: Context) -> None:
        super().check(context)
        source = context.source
        if isinstance(self.original, Plan):
            self.original.check_model(source, self.path)
            return
        highest, dtype = self.original.kept[-1], self.original.dtype
        if source.num_layers is not None and highest >= source.num_layers:
            raise UserError(f"{self.path} keeps layer {highest}; {source.name} has {source.num_layers} layers")
        if dtype not in (None, source.config.dtype):
            raise UserError(
                f"{self.path} asks for dtype={dtype[:40]!r}, the model is in model.dtype={source.config.dtype}; a plan"
                " changes no type"
            )

    def plan(self, problem: PruningProblem) -> Plan:
        if isinstance(self.original, Passthrough):
            kept = self.original.kept
            dropped = sorted(set(range(problem.view.num_layers)).difference(kept))
            return self.new_plan(problem, ops=[Drop(tuple(dropped))] if dropped else [])
        original = self.original
        replayed = {"method": original.method, "calibration": original.calibration, "scores": original.scores}
        return self.new_plan(
            problem,
            threshold=original.threshold,
            ops=original.ops,
            tensors=original.tensors,
            # Of a replay of a replay the first plan is what counts.
            scores=original.scores if "replayed" in original.scores else {"replayed": replayed},
        )
