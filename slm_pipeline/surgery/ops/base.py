"""What an operation of a plan is, and how a list of them is folded over what there is for each layer. No torch.

An operation turns some layers of the stack, as the ones before it have left it, into one layer or none. It says so in
one form three times: of the layers' history (`Op.check`), of their parameters (`Op.count`) and of their blocks
(`Op.apply`). `walk` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from slm_pipeline.errors import UserError
from slm_pipeline.show.marks import Mark
from slm_pipeline.surgery.untrusted import is_layers, short

if TYPE_CHECKING:
    from typing_extensions import Self

    from slm_pipeline.models.source import ModelSource
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.block import Block

SUBLAYERS = ("attention", "mlp")
Tensors = Mapping[str, np.ndarray]  # of plan.safetensors, by name
T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """A layer of the stack at some point, by its history.

    Attributes:
        originals: the dense model's layers that it was made of, ascending.
        zeroed: its sublayers (attention, mlp) that are there and do nothing: their last projections are zero.
        absent: its sublayers that are not there; the model needs a class of its own.
        folded: a linear map in it stands for the layers that went above it.
        resized: its sublayers (attention, mlp) that have lost heads or neurons.
    """

    originals: tuple[int, ...]
    zeroed: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    folded: bool = False
    resized: frozenset[str] = frozenset()

    @property
    def missing(self) -> frozenset[str]:
        return self.zeroed | self.absent


@dataclass(frozen=True)
class LayerSize:
    """Parameters of a layer that a checkpoint holds, by what they are in.

    Attributes:
        attention, mlp: in the sublayers, their norms included.
        other: in neither.
        idle: those among all these that do nothing.
        heads, neurons: key-value groups of its attention, hidden neurons of its feed-forward network.
        per_head, per_neuron: parameters in one of them.
        attention_bias, mlp_bias: that a bias at the end of the sublayer would add: 0 if there is one.
    """

    attention: int
    mlp: int
    other: int = 0
    idle: int = 0
    heads: int = 0
    neurons: int = 0
    per_head: int = 0
    per_neuron: int = 0
    attention_bias: int = 0
    mlp_bias: int = 0

    @property
    def whole(self) -> int:
        return self.attention + self.mlp + self.other

    @property
    def at_work(self) -> int:
        return self.whole - self.idle


@dataclass(frozen=True)
class Widths:
    """Sizes that all layers of a dense model have.

    Attributes:
        heads: key-value groups of an attention layer.
        neurons: hidden neurons of a feed-forward network.
        states: of the residual stream.
    """

    heads: int
    neurons: int
    states: int


@dataclass(frozen=True)
class Op(ABC):
    """An operation; one file beside this one, with `register` above its class.

    Its fields are what plan.json says of it; a field that is None does not stand there.

    Attributes:
        name: as in plan.json.
        only_removes: whether the layers that it leaves are as they were, so that mergekit's passthrough can say it.
        takes_whole: whether it is about whole layers, not about something within one.
        layers: original layers that it is about, ascending; a merged layer goes by all of them, or by its lowest where
            the operation is about something within one layer.
    """

    name: ClassVar[str]
    only_removes: ClassVar[bool] = False
    takes_whole: ClassVar[bool] = False

    layers: tuple[int, ...]

    @classmethod
    @abstractmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> Self:
        """Read it.

        Args:
            values: its mapping in plan.json, about which nothing is known but that ``op`` is `name`.
            tensors: the plan's.
            where: what an error message begins with.

        Raises:
            UserError: a key is missing or unknown, a value of the wrong type or out of its range, or a tensor is
                missing or of the wrong shape, dtype or content. Nothing else is ever raised.
        """

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        found = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
        return {"op": self.name, **found}

    def tensor_names(self) -> list[str]:
        """Names of the tensors that it reads."""
        return []

    def moved(self, stack: Sequence[Layer], prefix: str) -> Self:
        """The same operation, planned for the model that other operations leave, as one that comes after these.

        Args:
            stack: what they leave; the operation's layer i is ``stack[i]``.
            prefix: what the names of its tensors are to begin with.
        """
        found = [stack[layer].originals for layer in self.layers]
        layers = [layer for originals in found for layer in (originals if self.takes_whole else originals[:1])]
        names = {field.name: getattr(self, field.name) for field in fields(self) if field.name in ("tensor", "tensors")}
        renamed = {field: prefix + name for field, name in names.items() if name is not None}
        return replace(self, layers=tuple(sorted(layers)), **renamed)

    @abstractmethod
    def check(self, members: Sequence[Layer], where: str) -> Layer | None:
        """The layer that it leaves, None for none.

        Args:
            members: the layers of the stack at that point that it is about, lowest first.

        Raises:
            UserError: that stack does not allow it.
        """

    def check_model(self, source: ModelSource, where: str) -> None:  # noqa: B027  # most can be done to any model
        """Raise `UserError` if it cannot be done to this model."""

    def check_sizes(self, tensors: Tensors, widths: Widths, where: str) -> None:  # noqa: B027  # most have no tensors
        """Raise `UserError` if its tensors are for a model of other sizes."""

    @abstractmethod
    def count(self, members: Sequence[LayerSize]) -> LayerSize | None:
        """Parameters of the layer that it leaves."""

    @abstractmethod
    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> Block | None:
        """The block that it leaves; nothing in the model changes."""

    @classmethod  # noqa: B027  # most can stand beside any other
    def check_together(cls, ops: Sequence[Self], where: str) -> None:
        """Raise `UserError` if operations of this kind contradict each other."""

    @classmethod
    def facts(cls, ops: Sequence[Self], parameters: int) -> dict[str, Any]:
        """What a merge's result and summary.json say of a plan's operations of this kind, beside `lines`.

        Args:
            parameters: that do no work any more because of them.
        """
        return {}

    @classmethod
    def lines(cls, ops: Sequence[Self], parameters: int) -> list[str]:
        """What they did, for people: in reports and model cards."""
        return [f"{cls.name} of {listed(ops)}"]

    @classmethod
    def marks(cls, ops: Sequence[Self]) -> list[Mark]:
        """What they did, in pictures of the plan."""
        return [Mark(cls.name, sorted({op.layers[0] for op in ops}))]


OPS: dict[str, type[Op]] = {}


def register(op: type[Op]) -> type[Op]:
    """Make an operation known to plans, by its name.

    Raises:
        ValueError: another one has that name.
    """
    if OPS.setdefault(op.name, op) is not op:
        raise ValueError(f"two operations have the name {op.name}: {OPS[op.name]} and {op}")
    return op


def walk(ops: Sequence[Op], stack: Sequence[T], step: Callable[[Op, list[T]], T | None]) -> list[T]:
    """Fold ``ops`` over what there is for each layer of the dense model.

    Args:
        stack: for each layer, input side first.
        step: an operation and what there is for the layers that it is about -> what there is for the layer that it
            leaves, None for none.

    Returns:
        What is left, input side first.
    """
    left = dict(enumerate(stack))  # by the lowest original layer of each
    for op in ops:
        members = [left.pop(layer) for layer in op.layers if layer in left]
        if (made := step(op, members)) is not None:
            left[op.layers[0]] = made
    return [left[layer] for layer in sorted(left)]


def read_layers(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """``layers`` of an operation on whole layers."""
    layers = values.get("layers")
    if not layers or not is_layers(layers):
        raise UserError(f"{where}: layers={short(layers)} must be a list of layers, ascending")
    return tuple(layers)


def read_layer(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """``layers`` of an operation on something within one layer."""
    layers = read_layers(values, where)
    if len(layers) != 1:
        raise _not_one(layers, where)
    return layers


def read_choice(values: Mapping[str, Any], key: str, choices: Sequence[str], where: str) -> str:
    """A key's value, one of ``choices``."""
    value = values.get(key)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{where}: {key}={short(value)} is not one of {', '.join(choices)}")
    return value


def read_tensor(tensors: Tensors, name: Any, where: str) -> np.ndarray:
    """The tensor of that name."""
    if not isinstance(name, str) or name not in tensors:
        raise UserError(f"{where} needs the tensor {short(name)}, which plan.safetensors does not hold")
    return tensors[name]


def check_keys(values: Mapping[str, Any], where: str, *more: str) -> None:
    """Raise `UserError` for a key that an operation has no use for: it may be meant to change weights."""
    if unknown := [key for key in values if key not in ("op", "layers", *more)]:
        known = ", ".join(("op", "layers", *more))
        raise UserError(f"{where}: {values['op']} has no {short(unknown[0])}; it has {known}")


def check_whole(op: Op, members: Sequence[Layer], where: str) -> None:
    """Raise `UserError` unless ``members`` are all that ``op`` names, whole."""
    if sorted(layer for member in members for layer in member.originals) != [*op.layers]:
        raise UserError(f"{where}: layers={short([*op.layers])} are not whole layers of the model at that point")


def check_one(op: Op, members: Sequence[Layer], where: str) -> Layer:
    """The one layer within which ``op`` works, which has lost nothing.

    Raises:
        UserError: it is none, or has.
    """
    check_nothing_lost(op, members, where)
    if len(op.layers) != 1 or not members:
        raise _not_one(op.layers, where)
    return members[0]


def check_nothing_lost(op: Op, members: Sequence[Layer], where: str) -> None:
    """Raise `UserError` if one of ``members`` lacks a sublayer, of which ``op`` would have to make something."""
    if any(member.missing for member in members):
        raise UserError(
            f"{where}: layers={short([*op.layers])} have lost a sublayer already, after which a layer can"
            " only become narrower or go"
        )


def _not_one(layers: Sequence[int], where: str) -> UserError:
    return UserError(f"{where}: layers={short([*layers])} is not one layer of the model at that point")


def listed(ops: Sequence[Op]) -> str:
    """The layers that operations are about, in words."""
    return ", ".join(map(str, sorted({layer for op in ops for layer in op.layers})))
