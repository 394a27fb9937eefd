"""Remove the attention or the feed-forward network of a layer (FinerCut, arXiv 2405.18218)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.show.marks import Mark
from slm_pipeline.show.numerals import count
from slm_pipeline.surgery.ops.base import (
    SUBLAYERS,
    Layer,
    LayerSize,
    Op,
    Tensors,
    check_keys,
    check_one,
    read_choice,
    read_layer,
    register,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.block import Block

EXPORTS = ("stock", "custom")
_MARKS = {
    "attention": ("without attention (upper half)", "upper"),
    "mlp": ("without feed-forward (lower half)", "lower"),
}


@register
@dataclass(frozen=True)
class DropSublayer(Op):
    """One layer loses a sublayer; after that it may become narrower in the other, or go.

    Attributes:
        sublayer: attention | mlp.
        export: how a checkpoint says so, the same for all of a plan. stock: the last projection is zero, the class is
            that of the dense model, nothing is faster or smaller. custom: it is not there; the checkpoint brings its
            own modelling file.
    """

    name: ClassVar[str] = "drop_sublayer"

    sublayer: str
    export: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> DropSublayer:
        layers = read_layer(values, where)
        check_keys(values, where, "sublayer", "export")
        sublayer = read_choice(values, "sublayer", SUBLAYERS, where)
        return cls(layers, sublayer, read_choice(values, "export", EXPORTS, where))

    @classmethod
    def check_together(cls, ops: Sequence[Self], where: str) -> None:
        if len(exports := sorted({repr(op.export) for op in ops})) > 1:
            raise UserError(f"{where}: missing sublayers are written in one way, not as {', '.join(exports)}")

    def check(self, members: Sequence[Layer], where: str) -> Layer:
        layer = check_one(self, members, where)
        lost = frozenset({self.sublayer})
        return replace(layer, zeroed=lost) if self.export == "stock" else replace(layer, absent=lost)

    def count(self, members: Sequence[LayerSize]) -> LayerSize:
        size = members[0]
        lost = size.attention if self.sublayer == "attention" else size.mlp
        return replace(size, idle=size.idle + lost) if self.export == "stock" else replace(size, **{self.sublayer: 0})

    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> Block:
        return members[0].lacking(self.sublayer)

    @classmethod
    def facts(cls, ops: Sequence[Self], parameters: int) -> dict[str, Any]:
        lost = {name: sorted(op.layers[0] for op in ops if op.sublayer == name) for name in SUBLAYERS}
        return {"sublayers": {"export": ops[0].export, **lost, "parameters": parameters}}

    @classmethod
    def lines(cls, ops: Sequence[Self], parameters: int) -> list[str]:
        return sublayer_lines(cls.facts(ops, parameters)["sublayers"])

    @classmethod
    def marks(cls, ops: Sequence[Self]) -> list[Mark]:
        return sublayer_marks(cls.facts(ops, 0)["sublayers"])


def sublayer_lines(sublayers: Mapping[str, Any]) -> list[str]:
    """Which sublayers are missing, and how the checkpoint says so.

    Args:
        sublayers: as in a merge's result and in summary.json: export, attention and mlp (original layers), and
            parameters in them.
    """
    names = (("attention", "attention"), ("mlp", "feed-forward"))
    lost = [f"{name} of {', '.join(map(str, sublayers[key]))}" for key, name in names if sublayers[key]]
    number = count(sublayers["parameters"])
    if sublayers["export"] == "stock":
        how = (
            f"the checkpoint has the dense model's class and {number} parameters that do nothing (zeroed projections):"
            " nothing is faster or smaller; method.export=custom leaves them out"
        )
    else:
        how = (
            f"the checkpoint leaves their {number} parameters out; it brings modeling_pruned.py and loads with"
            " trust_remote_code=True only"
        )
    return [f"dropped: {'; '.join(lost)}", how]


def sublayer_marks(sublayers: Mapping[str, Any]) -> list[Mark]:
    """The same for a picture; a list of layers may be missing."""
    return [Mark(label, sublayers[name], part) for name, (label, part) in _MARKS.items() if sublayers.get(name)]


def zeroed_parameters(sublayers: Mapping[str, Any]) -> int:
    """Parameters of the sublayers that are there and do nothing."""
    return int(sublayers["parameters"]) if sublayers.get("export") == "stock" else 0
