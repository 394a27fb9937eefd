"""Remove whole layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.show.marks import Mark
from slm_pipeline.surgery.ops.base import (
    Layer,
    LayerSize,
    Op,
    Tensors,
    check_keys,
    check_whole,
    read_layers,
    register,
)

if TYPE_CHECKING:
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.block import Block


@register
@dataclass(frozen=True)
class Drop(Op):
    """``layers`` go, and what was merged into them."""

    name: ClassVar[str] = "drop"
    only_removes: ClassVar[bool] = True
    takes_whole: ClassVar[bool] = True

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> Drop:
        layers = read_layers(values, where)
        check_keys(values, where)
        return cls(layers)

    def check(self, members: Sequence[Layer], where: str) -> None:
        check_whole(self, members, where)

    def count(self, members: Sequence[LayerSize]) -> None:
        return None

    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> None:
        return None

    @classmethod
    def lines(cls, ops: Sequence[Op], parameters: int) -> list[str]:
        """Nothing: whoever shows a plan shows which layers it leaves."""
        return []

    @classmethod
    def marks(cls, ops: Sequence[Op]) -> list[Mark]:
        return []
