"""Multiply what a layer writes to the residual stream (the compensation of Prune&Comp, arXiv 2507.18212)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.show.marks import Mark
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import SUBLAYERS, Layer, LayerSize, Op, Tensors, check_keys, read_layer, register
from slm_pipeline.surgery.ops.replace import written
from slm_pipeline.surgery.untrusted import short

if TYPE_CHECKING:
    from slm_pipeline.models.source import ModelSource
    from slm_pipeline.models.view import ModelView


@register
@dataclass(frozen=True)
class Scale(Op):
    """What the sublayers of one layer add to the residual stream is multiplied.

    Attributes:
        factor: above 0, finite.
    """

    name: ClassVar[str] = "scale"

    factor: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> Scale:
        layers = read_layer(values, where)
        check_keys(values, where, "factor")
        factor: Any = values.get("factor")
        if type(factor) not in (int, float) or not (math.isfinite(factor) and factor > 0):
            raise UserError(f"{where}: factor={short(factor)} must be a number above 0")
        return cls(layers, factor)

    def check(self, members: Sequence[Layer], where: str) -> Layer:
        if len(members) != 1:
            raise UserError(f"{where}: layers={short([*self.layers])} is not one layer of the model at that point")
        return members[0]

    def check_model(self, source: ModelSource, where: str) -> None:
        if source.architecture.output_norms:
            raise UserError(
                f"{where} multiplies what a projection puts out; in {source.name}, a {source.model_type} model, a norm"
                " follows it"
            )

    def count(self, members: Sequence[LayerSize]) -> LayerSize:
        return members[0]

    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> Block:
        return scale(view, members[0], self.factor)

    @classmethod
    def lines(cls, ops: Sequence[Op], parameters: int) -> list[str]:
        factors = sorted({op.factor for op in ops if isinstance(op, Scale)})
        return [f"what {len(ops)} layers write is multiplied by {', '.join(f'{factor:.3g}' for factor in factors)}"]

    @classmethod
    def marks(cls, ops: Sequence[Op]) -> list[Mark]:
        return [Mark("rescaled", sorted({op.layers[0] for op in ops}))]


def scale(view: ModelView, block: Block, factor: float) -> Block:
    """The block whose last projections, with their biases, are ``factor`` times as large; computed in float32."""
    scaled = {}
    for output in (view.output_name(part) for part in SUBLAYERS if not view.lacks(block.body, part)):
        has_bias = (
            f"{output}.bias" in block.replaced
            or getattr(view.layers[block.body].get_submodule(output), "bias", None) is not None
        )
        for kind in ("weight", *(["bias"] if has_bias else [])):
            scaled[f"{output}.{kind}"] = block.parameter(view, f"{output}.{kind}").float() * factor
    return written(view, block, scaled)
