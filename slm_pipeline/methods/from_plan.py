"""Replay a plan that any method wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, Method, PruningProblem
from slm_pipeline.surgery.mergekit import kept_layers
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.models.source import ModelSource


@dataclass(kw_only=True)
class FromPlan(Method):
    """The decision of ``path`` on this model. Takes no pruning ratio.

    ``path`` is a plan.json, or mergekit's passthrough YAML (.yml, .yaml) that keeps some layers. The model must have
    the depth that the plan was made for; another model of that depth is allowed, with a warning.
    """

    path: str
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 128))

    name: ClassVar[str] = "from_plan"
    takes_ratio: ClassVar[bool] = False
    reads_calibration: ClassVar[bool] = False

    @cached_property
    def original(self) -> Plan | None:
        """None for a mergekit file, which does not know the model's depth."""
        path = Path(self.path).expanduser()
        return None if path.suffix in (".yml", ".yaml") else Plan.read(path)

    def options(self) -> dict[str, Any]:
        if self.original is None:
            return {"kept": kept_layers(Path(self.path).expanduser())}
        return {"plan": self.original.decision(), "method": self.original.method}

    def check(self, source: ModelSource) -> None:
        if self.original is None:
            kept = kept_layers(Path(self.path).expanduser())
            if source.num_layers is not None and kept and kept[-1] >= source.num_layers:
                raise UserError(f"{self.path} keeps layer {kept[-1]}; {source.name} has {source.num_layers} layers")
            return
        self.original.check_model(source, self.path)

    def plan(self, problem: PruningProblem) -> Plan:
        if self.original is None:
            kept = kept_layers(Path(self.path).expanduser())
            dropped = [layer for layer in range(problem.view.num_layers) if layer not in kept]
            ops = [{"op": "drop", "layers": dropped}] if dropped else []
            return self._new_plan(problem, layer_groups=[[layer] for layer in kept], dropped=dropped, ops=ops)
        return self._new_plan(
            problem,
            threshold=self.original.threshold,
            layer_groups=self.original.layer_groups,
            dropped=self.original.dropped,
            ops=self.original.ops,
            tensors=self.original.tensors,
            scores={"replayed": {"method": self.original.method, "scores": self.original.scores}},
        )
