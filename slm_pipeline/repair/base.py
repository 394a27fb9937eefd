"""What a repair is: a dataclass of options whose ``repair`` looks at both models and extends the plan.

A new repair is one file beside this one and one YAML in conf/repair/ that names its class; nothing else. No gradients:
what trains is a recovery. Repairs are imported for ``slm dry_run=true``, so they import torch, and the engine, inside
``repair``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config import CalibrationConfig, plugins, ranges
from slm_pipeline.data.calibration import Calibration
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.context import Context
    from slm_pipeline.models.view import ModelView


@dataclass(frozen=True)
class RepairProblem:
    """All that a repair gets.

    Attributes:
        view: the dense model, which must be left as it is.
        plan: any method's.
        input_ids: [num_samples, seq_len] int64 tokens of the repair's own calibration text.
        out: where finished pieces may be kept, so that a killed repair goes on.
        note_complete: to be called with the names of files in ``out`` that are whole.
    """

    view: ModelView
    plan: Plan
    input_ids: Tensor
    out: Path
    note_complete: Callable[..., None]


@dataclass(kw_only=True)
class Repair(ABC):
    """Base of all repairs.

    Attributes:
        name: as in conf/repair/<name>.yaml.
        calibration: the text that it looks at; that of the method, unless something else is said, but more of it.
    """

    name: ClassVar[str]

    calibration: CalibrationConfig

    def __post_init__(self) -> None:
        ranges.check(self, "repair.")

    def options(self) -> dict[str, Any]:
        """What the repaired plan depends on beside the text, as JSON; it goes into the artefact's key."""
        values = asdict(self)
        del values["calibration"]
        return values

    def text(self, data_dir: Path | None) -> Calibration:
        """Where `calibration` leads."""
        return Calibration(self.calibration, data_dir)

    def identity(self, data_dir: Path | None) -> dict[str, Any]:
        """The repair's part of the artefact's key, as JSON; cheap, without torch.

        Raises:
            UserError: the text is missing or too short.
        """
        code = plugins.code_of(type(self))
        return {
            "repair": self.name,
            "options": self.options(),
            "calibration": self.text(data_dir).identity(),
            **({"plugins": code} if code else {}),
        }

    def check(self, context: Context) -> None:
        """Raise `UserError` if it cannot work on this model, or its text is missing; called before anything
        expensive."""
        self.text(context.data_dir).identity()

    @abstractmethod
    def repair(self, problem: RepairProblem) -> Plan:
        """The plan with operations that repair what it left, or the same plan where nothing helps; what was measured
        stands in its ``scores["repair"]``.

        Raises:
            UserError: the model's numbers are not finite.
        """


def extended(plan: Plan, **changes: Any) -> Plan:
    """The plan with other ``ops``, ``tensors`` or ``scores``, checked."""
    found = Plan(**{**vars(plan), **changes})
    found.check("the repaired plan")
    return found
