"""What a pruning method is: a dataclass of options whose ``plan`` reads the model and returns a plan.

A new method is one file beside this one and one YAML in conf/method/ that names its class; nothing else. Methods are
imported for ``slm dry_run=true``, so they import torch, and the engine, inside ``plan``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config import plugins, ranges
from slm_pipeline.config.ranges import Count, NumLayersOrZero, Tokens
from slm_pipeline.errors import UserError
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.statistics import Statistics
    from slm_pipeline.models.source import ModelSource
    from slm_pipeline.models.view import ModelView


@dataclass
class CalibrationSize:
    """How much text a method looks at unless the user says otherwise; conf/calibration takes it.

    It is what the method's authors use, or ours where theirs is too much for a first run; conf/method/<name>.yaml says
    which.
    """

    num_samples: Count
    seq_len: Tokens


@dataclass
class PruningProblem:
    """All that a method may look at.

    Attributes:
        view: the dense model, which the method must leave as it is.
        input_ids: [num_samples, seq_len] int64 calibration tokens.
        statistics: what the dense model showed on them, in one pass.
        num_remove: layers to remove; None when the threshold alone decides.
        num_parameters: parameters to remove at least, for methods that do not remove layers of equal size; 0 when
            layers are counted.
        threshold: similarity floor in [0, 1]; None means that the method looks for one, or needs none.
        refine: grid points to try above the best threshold found by halving.
        exhaustive: walk the whole threshold grid instead.
        calibration: fingerprint and num_tokens of ``input_ids``, for the plan.
        memo: folder where searches leave what they measured for those of other jobs; None for none.
        forced: measure it all again.
    """

    source: ModelSource
    view: ModelView
    input_ids: Tensor
    statistics: Statistics
    num_remove: int | None
    threshold: float | None
    refine: int
    exhaustive: bool
    calibration: dict[str, Any]
    num_parameters: int = 0
    memo: Path | None = None
    forced: bool = False


@dataclass(kw_only=True)
class Method(ABC):
    """Base of all methods.

    Attributes:
        name: as in conf/method/<name>.yaml.
        takes_threshold: whether ``threshold`` means anything to it.
        takes_ratio: whether it aims at a pruning ratio.
        reads_calibration: whether its plan depends on the calibration text; else the plan's ``calibration`` is null.
        min_seq_len: tokens that a calibration sample needs; 2 where the next token is predicted.
        num_protected: layers that it never touches; a plan keeps at least one more.
    """

    name: ClassVar[str]
    takes_threshold: ClassVar[bool] = False
    takes_ratio: ClassVar[bool] = True
    min_seq_len: ClassVar[int] = 1

    published_calibration: CalibrationSize

    def __post_init__(self) -> None:
        ranges.check(self, "method.")

    @property
    def reads_calibration(self) -> bool:
        return True

    @property
    def num_protected(self) -> int:
        return 0

    def options(self) -> dict[str, Any]:
        """What the plan depends on, as JSON; it goes into the artefact's key and into plan.json."""
        values = asdict(self)
        del values["published_calibration"]
        return values

    def code(self) -> dict[str, str]:
        """What of its code comes from plugins, see `plugins.code_of`; it goes into the artefact's key."""
        return plugins.code_of(type(self))

    def refuse_unused(self, why: str, *names: str) -> None:
        """Raise `UserError` if one of these options, which do nothing ``why``, is not at its default."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in names and value != option.default:
                raise UserError(f"method.{option.name}={value} does nothing {why}; leave it at {option.default}")

    def check(self, source: ModelSource) -> None:  # noqa: B027  # most methods work on any model
        """Raise `UserError` if the method cannot work on this model; called before anything expensive."""

    @abstractmethod
    def plan(self, problem: PruningProblem) -> Plan:
        """Decide what to do to the model.

        Raises:
            UserError: the target cannot be reached, or the model's numbers are not finite.
        """

    def _new_plan(self, problem: PruningProblem, **decision: Any) -> Plan:
        model = {
            "name": problem.source.name,
            "fingerprint": problem.source.fingerprint,
            "num_layers": problem.view.num_layers,
        }
        calibration = problem.calibration if self.reads_calibration else None
        plan = Plan(model=model, method=self.name, options=self.options(), calibration=calibration, **decision)
        plan.check(f"the plan of method={self.name}")
        return plan


@dataclass(kw_only=True)
class ProtectsEnds(Method):
    """Base of the methods that can be told to leave the ends of the stack alone.

    Options:
        protect_first, protect_last: layers at the input and output side that are never touched.
    """

    protect_first: NumLayersOrZero = 0
    protect_last: NumLayersOrZero = 0

    @property
    def num_protected(self) -> int:
        return self.protect_first + self.protect_last

    def candidates(self, num_layers: int) -> list[int]:
        """Layers that may be touched."""
        return list(range(self.protect_first, num_layers - self.protect_last))


@dataclass(kw_only=True)
class LayerRemoval(ProtectsEnds):
    """Base of the methods that remove whole layers, or merge them by pairs."""

    def removal_plan(self, problem: PruningProblem, removed: list[int], scores: dict[str, Any]) -> Plan:
        """The plan that removes ``removed``, in that order."""
        kept = [[layer] for layer in range(problem.view.num_layers) if layer not in removed]
        ops = [{"op": "drop", "layers": sorted(removed)}]
        return self._new_plan(
            problem, layer_groups=kept, dropped=sorted(removed), ops=ops, scores={"order": removed, **scores}
        )

    def lowest_first(self, problem: PruningProblem, values: list[float]) -> list[int]:
        """The ``num_remove`` unprotected layers with the lowest values, lowest first, ties by index.

        Raises:
            UserError: a value is not finite.
        """
        assert problem.num_remove is not None
        for layer, value in enumerate(values):
            if not math.isfinite(value):
                raise UserError(f"method={self.name}: the score of layer {layer} is {value}; try model.dtype=float32")
        return sorted(self.candidates(len(values)), key=lambda layer: values[layer])[: problem.num_remove]


def num_layers_to_remove(*, ratio: float | None, keep: int | None, num_layers: int, num_protected: int) -> int | None:
    """Layers to remove for ``of: layers``: ``round(ratio * num_layers)`` (ties to even), at least 1.

    Raises:
        UserError: nothing would be removed, or fewer than 1 + num_protected layers would be left.
    """
    if ratio is None and keep is None:
        return None
    if keep is not None:
        if not 1 <= keep < num_layers:
            raise UserError(
                f"pruning_ratio.num_layers={keep} must be at least 1 and below the model's {num_layers} layers"
            )
        remove = num_layers - keep
        asked = f"pruning_ratio.num_layers={keep}"
    else:
        assert ratio is not None
        remove = max(1, round(ratio * num_layers))
        asked = f"pruning_ratio.ratio={ratio} of {num_layers} layers"
    check_layers_left(num_layers - remove, num_protected, asked)
    return remove


def check_layers_left(left: int, num_protected: int, asked: str) -> None:
    """Raise `UserError` when a target leaves fewer layers than the protected ones and one more."""
    if left < 1 + num_protected:
        raise UserError(
            f"{asked} leaves {left} layers; at least {1 + num_protected} must be left"
            f" ({num_protected} protected and one more)"
        )
