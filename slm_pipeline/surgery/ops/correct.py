"""Correct what a layer's sublayers read from the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.show.marks import Mark
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import (
    SUBLAYERS,
    Layer,
    LayerSize,
    Op,
    Tensors,
    Widths,
    check_keys,
    listed,
    read_layer,
    register,
)
from slm_pipeline.surgery.ops.replace import check_floats, check_some, written
from slm_pipeline.surgery.untrusted import short

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView


@register
@dataclass(frozen=True)
class Correct(Op):
    """A linear map in front of the projections with which sublayers read, folded into their weights: W' = W M.

    Attributes:
        sublayers: attention, mlp or both.
        tensors: ``<tensors>.attention`` and ``<tensors>.mlp`` are the maps M, [d, d] with d the width of the states,
            behind the norm in front of the sublayer, if there is one. Finite floats.
    """

    name: ClassVar[str] = "correct"

    sublayers: tuple[str, ...]
    tensors: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> Correct:
        layers = read_layer(values, where)
        check_keys(values, where, "sublayers", "tensors")
        prefix = values.get("tensors")
        sublayers: Any = values.get("sublayers")
        check_some(sublayers, SUBLAYERS, "sublayers", where)
        for sublayer in sublayers:
            check_floats(tensors, f"{prefix}.{sublayer}", 2, where)
        return cls(layers, tuple(sublayers), str(prefix))

    def tensor_names(self) -> list[str]:
        return [f"{self.tensors}.{sublayer}" for sublayer in self.sublayers]

    def check(self, members: Sequence[Layer], where: str) -> Layer:
        if len(members) != 1:
            raise UserError(f"{where}: layers={short([*self.layers])} is not one layer of the model at that point")
        if lost := members[0].missing.intersection(self.sublayers):
            raise UserError(f"{where}: layers={short([*self.layers])} has lost its {min(lost)}: it reads nothing")
        return members[0]

    def check_sizes(self, tensors: Tensors, widths: Widths, where: str) -> None:
        for name in self.tensor_names():
            if (shape := tensors[name].shape) != (widths.states, widths.states):
                raise UserError(f"{where}: the tensor {name} is {[*shape]}, the states are {widths.states} wide")

    def count(self, members: Sequence[LayerSize]) -> LayerSize:
        return members[0]

    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> Block:
        import torch

        block = members[0]
        for sublayer in self.sublayers:
            block = corrected(view, block, sublayer, torch.from_numpy(tensors[f"{self.tensors}.{sublayer}"]))
        return block

    @classmethod
    def lines(cls, ops: Sequence[Op], parameters: int) -> list[str]:
        return [f"what {listed(ops)} read is corrected by linear maps"]

    @classmethod
    def marks(cls, ops: Sequence[Op]) -> list[Mark]:
        return [Mark("corrected", sorted({op.layers[0] for op in ops}))]


def corrected(view: ModelView, block: Block, sublayer: str, matrix: Tensor) -> Block:
    """The block with ``matrix`` [d, d] folded into all projections with which a sublayer (attention, mlp) reads;
    computed in float32."""
    names = view.reading_names(block.body, sublayer)
    weights = {name: block.parameter(view, name).float() for name in names}
    return written(view, block, {name: weight @ matrix.to(weight) for name, weight in weights.items()})
