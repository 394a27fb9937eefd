"""What a pruning method is: a dataclass of options whose ``plan`` reads the model and returns a plan.

A new method is one file beside this one and one YAML in conf/method/ that names its class; nothing else. Methods are
imported for ``slm dry_run=true``, so they import torch, and the engine, inside ``plan``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from slm_pipeline.config import plugins, ranges
from slm_pipeline.config.ranges import Count, NumLayersOrZero, Tokens
from slm_pipeline.engine.window_memo import WindowMemos
from slm_pipeline.errors import UserError
from slm_pipeline.methods.target import Floor, Layers, Parameters, Target
from slm_pipeline.show.numerals import counts
from slm_pipeline.surgery.ops import LayerSize, Op
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.statistics import Statistics
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.source import ModelSource
    from slm_pipeline.models.view import ModelView

TargetT = TypeVar("TargetT", bound=Target)


@dataclass
class CalibrationSize:
    """How much text a method looks at unless the user says otherwise; conf/calibration takes it.

    It is what the method's authors use, or ours where theirs is too much for a first run; conf/method/<name>.yaml says
    which.
    """

    num_samples: Count
    seq_len: Tokens


@dataclass(kw_only=True)
class PruningProblem(Generic[TargetT]):
    """All that a method may look at.

    Attributes:
        view: the dense model, which the method must leave as it is.
        input_ids: [num_samples, seq_len] int64 calibration tokens.
        statistics: what the dense model showed on them, in one pass.
        target: how much to remove, one of the method's ``targets``; `Layers` for most.
        calibration: fingerprint and num_tokens of ``input_ids``, for the plan.
        refine: to reach a target by a floor: grid points to try above the best threshold found by halving.
        exhaustive: walk the whole threshold grid instead.
        windows: what searches on this model and text have measured of merged windows, and keep there.
        prices: for a method that takes prices what the parts of each layer cost, in the units of a `Parameters` target;
            None: parameters.
    """

    source: ModelSource
    view: ModelView
    input_ids: Tensor
    statistics: Statistics
    target: TargetT
    calibration: dict[str, Any]
    refine: int = 5
    exhaustive: bool = False
    windows: WindowMemos = field(default_factory=WindowMemos)
    prices: Sequence[LayerSize] | None = None


@dataclass(kw_only=True)
class Method(ABC):
    """Base of all methods.

    Attributes:
        name: as in conf/method/<name>.yaml.
        targets: what it can aim at. For one that knows no `Parameters` these are turned into layers.
        reads_calibration: whether its plan depends on the calibration text; else the plan's ``calibration`` is null.
        min_seq_len: tokens that a calibration sample needs; 2 where the next token is predicted.
        removes_by_order: whether it puts whole layers in an order and removes the first of them, so that it can stop at
            any of them; of layers of one size it is told a number.
        streams: whether it lets all text through a layer before it goes on to the next, without gradients, so that
            it works on a model whose layers stay on disk (``model.device=stream``).
        shares_samples: whether processes that a launcher started share out its text; what it decides comes from sums
            over all of it. Else the first process plans alone.
        takes_prices: whether it counts by `PruningProblem.prices` where there are some.
        num_protected: layers that it never touches; a plan keeps at least one more.
    """

    name: ClassVar[str]
    targets: ClassVar[tuple[type, ...]] = (Layers,)
    removes_by_order: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    shares_samples: ClassVar[bool] = False
    takes_prices: ClassVar[bool] = False
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

    def check(self, context: Context) -> None:
        """Raise `UserError` if the method cannot work on this model, or with what other groups say; called before
        anything expensive."""
        seq_len = context.config.calibration.seq_len
        if self.reads_calibration and seq_len < self.min_seq_len:
            raise UserError(
                f"calibration.seq_len={seq_len} must be at least {self.min_seq_len} for method={self.name}, which"
                " predicts the next token"
            )
        if self.mixes_layers and context.source.layers_differ:
            raise UserError(
                f"method={self.name} mixes the weights of layers, and those of {context.source.name} differ in heads,"
                " neurons or sublayers; take a method that removes or narrows layers, or slm with"
                " method.merge_rule=official"
            )

    def identity(self) -> dict[str, Any]:
        code = self.code()
        return {"method": self.name, "options": self.options(), **({"plugins": code} if code else {})}

    @property
    def looks_for_floor(self) -> bool:
        """Whether it reaches a target by a floor that it has to look for."""
        return Floor in self.targets

    @property
    def mixes_layers(self) -> bool:
        """Whether it makes weights of those of several layers, so that these must be of one size."""
        return False

    def layers_left(self, num_layers: int, target: Layers) -> int | None:
        """Layers that the plan leaves of so many; None where only the plan tells."""
        return num_layers - target.remove

    def fewest_left(self, num_layers: int) -> tuple[int, str]:
        """Fewest layers that a plan can leave of so many, whatever the method measures, and why no fewer."""
        return 1 + self.num_protected, f"{self.num_protected} protected and one more"

    def memory(self, sizes: Sizes) -> int:
        """Bytes at the most beside the weights, while it plans; 0 for what looks at one matrix at a time."""
        return 0

    def host_memory(self, sizes: Sizes) -> int:
        """Bytes at the most in main memory, wherever the model lies."""
        return 0

    @abstractmethod
    def plan(self, problem: PruningProblem) -> Plan:
        """Decide what to do to the model.

        Raises:
            UserError: the target cannot be reached, or the model's numbers are not finite.
        """

    def new_plan(self, problem: PruningProblem, *, ops: Sequence[Op], **decision: Any) -> Plan:
        """The plan of ``ops``; ``decision`` is what else of a plan is not known here."""
        model = {
            "name": problem.source.name,
            "fingerprint": problem.source.fingerprint,
            "num_layers": problem.view.num_layers,
        }
        calibration = problem.calibration if self.reads_calibration else None
        options = self.options()
        plan = Plan(model=model, method=self.name, options=options, calibration=calibration, ops=[*ops], **decision)
        plan.check(f"the plan of method={self.name}")
        return plan


@dataclass(kw_only=True)
class ProtectsEnds(Method):
    """Base of the methods that can be told to leave the ends of the stack alone."""

    protect_first: NumLayersOrZero = 0  # layers at the input side that are never touched
    protect_last: NumLayersOrZero = 0  # layers at the output side that are never touched

    @property
    def num_protected(self) -> int:
        return self.protect_first + self.protect_last

    def candidates(self, num_layers: int) -> list[int]:
        """Layers that may be touched."""
        return list(range(self.protect_first, num_layers - self.protect_last))


@dataclass(kw_only=True)
class LayerRemoval(ProtectsEnds):
    """Base of the methods that remove whole layers, or merge them by pairs."""

    def removal_plan(self, problem: PruningProblem[Any], removed: list[int], scores: dict[str, Any]) -> Plan:
        """The plan that removes ``removed``, in that order."""
        drop = Drop(tuple(sorted(removed)))
        return self.new_plan(problem, ops=[drop], scores={"order": removed, **scores})

    def first_of(self, order: Sequence[int], problem: PruningProblem[Layers | Parameters]) -> list[int]:
        """The first layers of ``order`` that reach the target.

        Raises:
            UserError: all of them do not.
        """
        if isinstance(problem.target, Layers):
            return [*order[: problem.target.remove]]
        left, removed = problem.target.remove, list[int]()
        for layer in order:
            if left <= 0:
                break
            removed.append(layer)
            left -= problem.view.block_parameters(layer)
        if left > 0:
            asked, there = counts(problem.target.remove, problem.target.remove - left)
            raise UserError(
                f"method={self.name} cannot remove {asked} parameters: the {len(removed)} layers that may go have"
                f" {there}"
            )
        return removed

    def lowest_first(self, problem: PruningProblem[Layers | Parameters], values: list[float]) -> list[int]:
        """The unprotected layers with the lowest values, lowest first, ties by index, as many as the target says.

        Raises:
            UserError: a value is not finite, or the target cannot be reached.
        """
        for layer, value in enumerate(values):
            if not math.isfinite(value):
                raise UserError(f"method={self.name}: the score of layer {layer} is {value}; try model.dtype=float32")
        return self.first_of(sorted(self.candidates(len(values)), key=lambda layer: values[layer]), problem)
