"""Give a layer new weights in the projections with which it writes to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

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
    read_tensor,
    register,
)
from slm_pipeline.surgery.untrusted import short

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView


@register
@dataclass(frozen=True)
class Replace(Op):
    """The last projections of a layer's sublayers are others, of the same shapes.

    Attributes:
        sublayers: attention, mlp or both: whose last projection is replaced.
        biases: those of them whose bias is replaced too, or that get one.
        tensors: ``<tensors>.attention`` and ``<tensors>.mlp`` are the weights, [d, n] as `torch.nn.Linear` has them,
            with n what the sublayer has at that point; ``<tensors>.attention_bias`` and ``<tensors>.mlp_bias``, [d];
            ``<tensors>.attention_norm`` and ``<tensors>.mlp_norm``, [d], as the model holds them. Finite floats.
        norms: those of them behind whose last projection stands a norm (Gemma 2 and 3, OLMo 2) that gets other gains.
    """

    name: ClassVar[str] = "replace"

    sublayers: tuple[str, ...]
    tensors: str
    biases: tuple[str, ...] | None = None
    norms: tuple[str, ...] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> Replace:
        layers = read_layer(values, where)
        check_keys(values, where, "sublayers", "tensors", "biases", "norms")
        prefix = values.get("tensors")
        sublayers: Any = values.get("sublayers")
        check_some(sublayers, SUBLAYERS, "sublayers", where)
        for sublayer in sublayers:
            check_floats(tensors, f"{prefix}.{sublayer}", 2, where)
        rows: dict[str, tuple[str, ...] | None] = {}
        for key, suffix in (("biases", "bias"), ("norms", "norm")):
            some: Any = values.get(key)
            if some is not None:
                check_some(some, sublayers, key, where)
                for sublayer in some:
                    check_floats(tensors, f"{prefix}.{sublayer}_{suffix}", 1, where)
            rows[key] = None if some is None else tuple(some)
        return cls(layers, tuple(sublayers), str(prefix), **rows)

    def tensor_names(self) -> list[str]:
        rows = [f"{part}_bias" for part in self.biases or ()] + [f"{part}_norm" for part in self.norms or ()]
        return [f"{self.tensors}.{name}" for name in (*self.sublayers, *rows)]

    def check(self, members: Sequence[Layer], where: str) -> Layer:
        if len(members) != 1:
            raise UserError(f"{where}: layers={short([*self.layers])} is not one layer of the model at that point")
        if lost := members[0].missing.intersection(self.sublayers):
            raise UserError(f"{where}: layers={short([*self.layers])} has lost its {min(lost)}: it writes nothing")
        return members[0]

    def check_sizes(self, tensors: Tensors, widths: Widths, where: str) -> None:
        for name in self.tensor_names():
            if (size := len(tensors[name])) != widths.states:
                raise UserError(f"{where}: the tensor {name} has {size} rows, the states are {widths.states} wide")

    def count(self, members: Sequence[LayerSize]) -> LayerSize:
        size = members[0]
        if "attention" in (self.biases or ()):
            size = replace(size, attention=size.attention + size.attention_bias, attention_bias=0)
        if "mlp" in (self.biases or ()):
            size = replace(size, mlp=size.mlp + size.mlp_bias, mlp_bias=0)
        return size

    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> Block:
        import torch

        outputs = {"attention": view.architecture.attention_output, "mlp": view.architecture.mlp_output}
        found = {f"{outputs[part]}.weight": f"{self.tensors}.{part}" for part in self.sublayers}
        found |= {f"{outputs[part]}.bias": f"{self.tensors}.{part}_bias" for part in self.biases or ()}
        for part in self.norms or ():
            norm = view.output_norm(members[0].body, part)
            if norm is None:
                raise UserError(f"layer {members[0].body} has no norm behind its {part} that could get other gains")
            found[f"{norm[0]}.weight"] = f"{self.tensors}.{part}_norm"
        return written(view, members[0], {name: torch.from_numpy(tensors[tensor]) for name, tensor in found.items()})

    @classmethod
    def lines(cls, ops: Sequence[Op], parameters: int) -> list[str]:
        return [f"new weights in the last projections of {listed(ops)}"]

    @classmethod
    def marks(cls, ops: Sequence[Op]) -> list[Mark]:
        return [Mark("new weights", sorted({op.layers[0] for op in ops}))]


def written(view: ModelView, block: Block, parameters: Mapping[str, Tensor]) -> Block:
    """The block with these in the place of its own (name within the block -> tensor, float); kept in the dtype of the
    layer's parameters. Nothing in the model changes.

    Raises:
        UserError: the shape of a weight is another.
    """
    replaced = dict(block.replaced)
    for name, value in parameters.items():
        weight = block.parameter(view, f"{name.rpartition('.')[0]}.weight")
        shape = weight.shape if name.endswith(".weight") else weight.shape[:1]
        if value.shape != shape:
            raise UserError(f"the new {name} of layer {block.body} is {[*value.shape]}, the model's is {[*shape]}")
        replaced[name] = value.to(weight.device, weight.dtype)
    return replace(block, replaced=replaced)


def check_some(values: Any, allowed: Sequence[str], key: str, where: str) -> None:
    """Raise `UserError` unless it is a list of some of ``allowed``, in their order, each once."""
    if not isinstance(values, list) or not values or values != [value for value in allowed if value in values]:
        raise UserError(f"{where}: {key}={short(values)} must be one or all of {', '.join(allowed)}, in this order")


def check_floats(tensors: Tensors, name: str, ndim: int, where: str) -> None:
    """Raise `UserError` unless the tensor of this name is a matrix (``ndim`` 2) or a row (1) of finite floats."""
    tensor = read_tensor(tensors, name, where)
    if tensor.dtype.kind != "f" or tensor.ndim != ndim or not np.isfinite(tensor).all():
        what = "a matrix" if ndim == 2 else "a row"
        raise UserError(
            f"{where}: the tensor {name} ({tensor.dtype}, {list(tensor.shape)}) must be {what} of finite floats"
        )
