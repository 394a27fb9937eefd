"""Remove key-value groups of a layer's attention, with their query heads, and neurons of its feed-forward network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from slm_pipeline.errors import UserError
from slm_pipeline.show.marks import Mark
from slm_pipeline.show.numerals import count
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import (
    SUBLAYERS,
    Layer,
    LayerSize,
    Op,
    Tensors,
    Widths,
    check_keys,
    read_layer,
    read_tensor,
    register,
)
from slm_pipeline.surgery.untrusted import short

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView, Slice

_UNITS = {"attention": "heads", "mlp": "neurons"}
_NAMES = {"heads": "key-value groups", "neurons": "neurons"}
NARROWER = "narrower"  # label of the marks


@register
@dataclass(frozen=True)
class Resize(Op):
    """One layer keeps some of its key-value groups and neurons. It loses heads once and neurons once.

    Attributes:
        heads, neurons: how many key-value groups and how many neurons stay; None: all, and nothing is said of which.
        biases: the resized sublayers (attention, mlp) whose last projection adds a constant for what is gone.
        tensors: ``<tensors>.heads`` and ``<tensors>.neurons`` are the units that stay, int64, ascending;
            ``<tensors>.attention_bias`` and ``<tensors>.mlp_bias`` the constants, finite floats, as wide as the states.
    """

    name: ClassVar[str] = "resize"

    tensors: str
    heads: int | None = None
    neurons: int | None = None
    biases: tuple[str, ...] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> Resize:
        layers = read_layer(values, where)
        check_keys(values, where, "tensors", "heads", "neurons", "biases")
        prefix, biases = values.get("tensors"), values.get("biases")
        kept = {unit: values.get(unit) for unit in _UNITS.values()}
        for unit, number in kept.items():
            if number is not None:
                _check_kept(tensors, f"{prefix}.{unit}", unit, number, where)
        changed = [sublayer for sublayer in SUBLAYERS if kept[_UNITS[sublayer]] is not None]
        if not changed:
            raise UserError(f"{where} says neither how many heads nor how many neurons stay")
        if biases is not None:
            if not isinstance(biases, list) or biases not in (changed, *([sublayer] for sublayer in changed)):
                raise UserError(f"{where}: biases={short(biases)} must be one or all of {', '.join(changed)}")
            for sublayer in biases:
                _check_bias(tensors, f"{prefix}.{sublayer}_bias", where)
        return cls(layers, str(prefix), **kept, biases=None if biases is None else tuple(biases))

    @property
    def sublayers(self) -> frozenset[str]:
        """Those that it changes."""
        return frozenset(sublayer for sublayer, unit in _UNITS.items() if getattr(self, unit) is not None)

    def tensor_names(self) -> list[str]:
        units = [unit for unit in _UNITS.values() if getattr(self, unit) is not None]
        return [f"{self.tensors}.{name}" for name in (*units, *(f"{part}_bias" for part in self.biases or ()))]

    def check(self, members: Sequence[Layer], where: str) -> Layer:
        if len(members) != 1:
            raise UserError(f"{where}: layers={short([*self.layers])} is not one layer of the model at that point")
        layer = members[0]
        if lost := self.sublayers & layer.missing:
            raise UserError(f"{where}: layers={short([*self.layers])} has lost its {min(lost)}: nothing is left to cut")
        if again := self.sublayers & layer.resized:
            raise UserError(f"{where}: layers={short([*self.layers])}: its {min(again)} is resized a second time")
        return replace(layer, resized=layer.resized | self.sublayers)

    def check_sizes(self, tensors: Tensors, widths: Widths, where: str) -> None:
        for unit in _UNITS.values():
            if getattr(self, unit) is not None:
                last, most = int(tensors[f"{self.tensors}.{unit}"][-1]), getattr(widths, unit)
                if last >= most:
                    raise UserError(f"{where} keeps number {last} of a layer's {_NAMES[unit]}; the model's have {most}")
        for sublayer in self.biases or ():
            if (size := tensors[f"{self.tensors}.{sublayer}_bias"].size) != widths.states:
                raise UserError(f"{where}: the bias of its {sublayer} is {size}, the states {widths.states} wide")

    def count(self, members: Sequence[LayerSize]) -> LayerSize:
        size = members[0]
        if self.heads is not None:
            lost = (size.heads - self.heads) * size.per_head
            size = replace(size, attention=size.attention - lost, heads=self.heads)
        if self.neurons is not None:
            lost = (size.neurons - self.neurons) * size.per_neuron
            size = replace(size, mlp=size.mlp - lost, neurons=self.neurons)
        if "attention" in (self.biases or ()):
            size = replace(size, attention=size.attention + size.attention_bias, attention_bias=0)
        if "mlp" in (self.biases or ()):
            size = replace(size, mlp=size.mlp + size.mlp_bias, mlp_bias=0)
        return size

    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> Block:
        import torch

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(tensors[f"{self.tensors}.{name}"])

        return resize(
            view,
            members[0],
            heads=None if self.heads is None else tensor("heads"),
            neurons=None if self.neurons is None else tensor("neurons"),
            biases={sublayer: tensor(f"{sublayer}_bias") for sublayer in self.biases or ()},
        )

    @classmethod
    def lines(cls, ops: Sequence[Op], parameters: int) -> list[str]:
        """How many units stay, and in which layers."""
        words = []
        for unit, name in _NAMES.items():
            resized = [op for op in ops if isinstance(op, Resize) and getattr(op, unit) is not None]
            if resized:
                kept = [getattr(op, unit) for op in resized]
                number = str(min(kept)) if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
                words.append(f"{number} {name} left in layers {_spans(op.layers[0] for op in resized)}")
        biases = any(isinstance(op, Resize) and op.biases for op in ops)
        constant = ", with a constant for what is gone" if biases else ""
        return [f"narrower: {'; '.join(words)}{constant}: {count(parameters)} parameters less"]

    @classmethod
    def marks(cls, ops: Sequence[Op]) -> list[Mark]:
        return [Mark(NARROWER, sorted({op.layers[0] for op in ops}))]


def resize(
    view: ModelView,
    block: Block,
    *,
    heads: Tensor | None,
    neurons: Tensor | None,
    biases: Mapping[str, Tensor],
) -> Block:
    """The block with these units only; None: with all. Nothing in the model changes.

    Where queries and keys are divided by their root mean square over all heads (OLMo 2), that is of the heads that are
    left.

    Args:
        heads: [kept] int64 key-value groups, ascending: each with its keys, values, query heads and output columns.
        neurons: [kept] int64, ascending.
        biases: sublayer (attention, mlp) -> [d] constant that its last projection adds.
    """
    replaced = dict(block.replaced)
    for slices, kept in ((view.attention_slices(block.body), heads), (view.mlp_slices(block.body), neurons)):
        if kept is not None:
            replaced |= {
                piece.parameter: _kept(block.parameter(view, piece.parameter), piece, kept) for piece in slices
            }
    outputs = {"attention": view.architecture.attention_output, "mlp": view.architecture.mlp_output}
    for sublayer, constant in biases.items():
        name, weight = f"{outputs[sublayer]}.bias", block.parameter(view, f"{outputs[sublayer]}.weight")
        constant = constant.to(weight.device).float()
        if name in block.replaced or view.layers[block.body].get_submodule(outputs[sublayer]).bias is not None:
            constant = constant + block.parameter(view, name).to(weight.device).float()
        replaced[name] = constant.to(weight.dtype)
    return replace(block, replaced=replaced)


def _kept(parameter: Tensor, piece: Slice, kept: Tensor) -> Tensor:
    """The rows or columns of the kept units, in each of the parts that the parameter is made of."""
    import torch

    rows = torch.cat([units[kept].flatten() for units in piece.units])
    return parameter.index_select(piece.dim, rows.to(parameter.device))


def _check_kept(tensors: Tensors, name: str, unit: str, number: Any, where: str) -> None:
    """Raise `UserError` unless the tensor of that name says which units stay, and they are so many."""
    if type(number) is not int or number < 1:
        raise UserError(f"{where}: {unit}={short(number)} must be a whole number, at least 1, of units that stay")
    kept = read_tensor(tensors, name, where)
    ascending = kept.ndim == 1 and kept.dtype == np.int64 and bool((kept[1:] > kept[:-1]).all())
    if not ascending or len(kept) != number or kept[0] < 0:
        raise UserError(
            f"{where}: the tensor {name} ({kept.dtype}, {list(kept.shape)}) must be the int64 indices of the"
            f" {short(number)} {unit} that stay, ascending, from 0"
        )


def _check_bias(tensors: Tensors, name: str, where: str) -> None:
    bias = read_tensor(tensors, name, where)
    if bias.dtype.kind != "f" or bias.ndim != 1 or not np.isfinite(bias).all():
        raise UserError(f"{where}: the tensor {name} ({bias.dtype}, {list(bias.shape)}) must be a row of finite floats")


def _spans(layers: Iterable[int]) -> str:
    """0-3, 5, 7-9"""
    ordered = sorted(set(layers))
    starts = [ordered[0], *(high for low, high in pairwise(ordered) if high > low + 1)]
    ends = [*(low for low, high in pairwise(ordered) if high > low + 1), ordered[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
