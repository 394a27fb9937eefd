"""Fold a linear map of a feed-forward network's output into its last projection (ReplaceMe, arXiv 2505.02819)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from slm_pipeline.errors import UserError
from slm_pipeline.show.marks import Mark
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import (
    Layer,
    LayerSize,
    Op,
    Tensors,
    Widths,
    check_keys,
    check_one,
    listed,
    read_layer,
    read_tensor,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.source import ModelSource
    from slm_pipeline.models.view import ModelView


@register
@dataclass(frozen=True)
class Fold(Op):
    """The feed-forward output m (a row) of one layer becomes m @ T, in the place of layers that went above it.

    Attributes:
        tensor: the name of T, a square matrix of finite floats.
    """

    name: ClassVar[str] = "fold"

    tensor: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> Fold:
        layers = read_layer(values, where)
        check_keys(values, where, "tensor")
        name = values.get("tensor")
        matrix = read_tensor(tensors, name, where)
        square = matrix.ndim == 2 and len(matrix) == matrix.shape[1] > 0
        if matrix.dtype.kind != "f" or not square or not np.isfinite(matrix).all():
            raise UserError(
                f"{where}: the tensor {name} ({matrix.dtype}, {list(matrix.shape)}) must be a square matrix of finite"
                " floats"
            )
        return cls(layers, str(name))

    def tensor_names(self) -> list[str]:
        return [self.tensor]

    def check(self, members: Sequence[Layer], where: str) -> Layer:
        return replace(check_one(self, members, where), folded=True)

    def check_model(self, source: ModelSource, where: str) -> None:
        if source.architecture.output_norms:
            raise UserError(
                f"{where} folds a linear map into a projection; in {source.name}, a {source.model_type} model, a norm"
                " follows it"
            )

    def check_sizes(self, tensors: Tensors, widths: Widths, where: str) -> None:
        shape = list(tensors[self.tensor].shape)
        if shape[0] != widths.states:
            raise UserError(f"{where}: the linear map is {shape}, the states are {widths.states} wide")

    def count(self, members: Sequence[LayerSize]) -> LayerSize:
        return members[0]

    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> Block:
        import torch

        return fold(view, members[0], torch.from_numpy(tensors[self.tensor]))

    @classmethod
    def lines(cls, ops: Sequence[Op], parameters: int) -> list[str]:
        return [f"linear map folded into the feed-forward network of {listed(ops)}"]

    @classmethod
    def marks(cls, ops: Sequence[Op]) -> list[Mark]:
        return [Mark("linear map folded in", sorted({op.layers[0] for op in ops}))]


def fold(view: ModelView, block: Block, transform: Tensor) -> Block:
    """The block whose feed-forward output m (a row) is m @ ``transform``. Nothing in the model changes.

    Args:
        transform: [d, d] float; computed with in float32, kept in the parameters' own dtype.

    Raises:
        UserError: a norm stands between the projection and the residual stream, or the width is another.
    """
    name = view.architecture.mlp_output
    if view.architecture.output_norms:
        raise UserError(
            f"a linear map cannot be folded into layer {block.body}: in a {view.config.model_type} model a norm follows"
            " the last projection"
        )
    weight = block.parameter(view, f"{name}.weight")
    if transform.shape != (len(weight), len(weight)):
        raise UserError(
            f"the linear map for layer {block.body} is {tuple(transform.shape)}, the states {len(weight)} wide"
        )
    transform = transform.to(weight.device).float()
    replaced = {**block.replaced, f"{name}.weight": (transform.T @ weight.float()).to(weight.dtype)}
    if f"{name}.bias" in block.replaced or view.mlp_output(block.body).bias is not None:
        bias = block.parameter(view, f"{name}.bias")
        replaced[f"{name}.bias"] = (bias.float() @ transform).to(bias.dtype)
    return Block(block.body, replaced, block.without)
