"""Make one layer of several neighbours, by one of the merge rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from slm_pipeline.errors import UserError
from slm_pipeline.show.marks import Mark
from slm_pipeline.surgery.concatenate import concatenate
from slm_pipeline.surgery.merge_rules import RULES, merge, weighted
from slm_pipeline.surgery.ops.base import (
    Layer,
    LayerSize,
    Op,
    Tensors,
    Widths,
    check_keys,
    check_nothing_lost,
    check_whole,
    read_choice,
    read_layers,
    read_tensor,
    register,
)
from slm_pipeline.surgery.untrusted import is_share, short

if TYPE_CHECKING:
    from slm_pipeline.models.source import ModelSource
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.block import Block

SHARING_RULES = ("concatenate", "weighted")  # they take a share for each part; no options of slm and laco
_UNITS = ("heads", "neurons")
_OF_HIGHEST = ("official", "keep_highest")  # the projections of the highest layer, as they are


@register
@dataclass(frozen=True)
class Merge(Op):
    """``layers`` become one.

    Attributes:
        rule: one of `RULES` (`slm_pipeline.surgery.merge_rules`), weighted, or concatenate
            (`slm_pipeline.surgery.concatenate`).
        shares: of weighted and concatenate, one for each layer of the stack that goes in, lowest first; they sum to 1.
        official_gqa, fold_norm: of concatenate; None is False.
        tensors: of concatenate: ``<tensors>.heads.<part>`` and ``<tensors>.neurons.<part>`` are the key-value groups
            and neurons that each part gives, int64, ascending.
    """

    name: ClassVar[str] = "merge"
    takes_whole: ClassVar[bool] = True

    rule: str
    shares: tuple[float, ...] | None = None
    official_gqa: bool | None = None
    fold_norm: bool | None = None
    tensors: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Tensors, where: str) -> Merge:
        layers = read_layers(values, where)
        rule = read_choice(values, "rule", (*RULES, *SHARING_RULES), where)
        more: dict[str, Any] = {}
        if rule == "concatenate":
            check_keys(values, where, "rule", "shares", "tensors", "official_gqa", "fold_norm")
            for option in ("official_gqa", "fold_norm"):
                if type(values.get(option, False)) is not bool:
                    raise UserError(f"{where}: {option}={short(values[option])} must be true or false")
                more[option] = values.get(option)
            more["tensors"] = values.get("tensors")
            shares = values.get("shares")
            for kind in _UNITS:
                parts = range(len(shares) if isinstance(shares, list) and shares else 1)
                _check_units(tensors, [f"{more['tensors']}.{kind}.{part}" for part in parts], kind, where)
        else:
            check_keys(values, where, "rule", *(("shares",) if rule in SHARING_RULES else ()))
        if rule in SHARING_RULES and "shares" in values:
            more["shares"] = _read_shares(values["shares"], where)
        return cls(layers, rule, **more)

    def tensor_names(self) -> list[str]:
        return [name for kind in _UNITS for name in self._names(kind)]

    def _names(self, kind: str) -> list[str]:
        parts = len(self.shares or ()) if self.rule == "concatenate" else 0
        return [f"{self.tensors}.{kind}.{part}" for part in range(parts)]

    def check(self, members: Sequence[Layer], where: str) -> Layer:
        check_nothing_lost(self, members, where)
        check_whole(self, members, where)
        if self.rule in SHARING_RULES and len(self.shares or ()) != len(members):
            raise UserError(f"{where} needs one share for each of its {len(members)} parts")
        whole = members[-1] if self.rule in _OF_HIGHEST else members[0]
        if any(member.resized for member in members) and self.rule not in (*_OF_HIGHEST, "keep_lowest"):
            raise UserError(
                f"{where}: layers={short([*self.layers])} have lost heads or neurons, so rule={self.rule} cannot mix"
                " them"
            )
        return replace(members[0], originals=tuple(self.layers), resized=whole.resized)

    def check_model(self, source: ModelSource, where: str) -> None:
        if self.official_gqa and source.architecture.fuses_queries:
            raise UserError(
                f"{where} has official_gqa=true, which does nothing in {source.name}, a {source.model_type} model,"
                " whose queries, keys and values are one projection"
            )
        if self.fold_norm and not source.architecture.input_rms_norms:
            raise UserError(
                f"{where} has fold_norm=true; {source.name} is a {source.model_type} model, which has no RMS norms"
                " right before the projections"
            )

    def check_sizes(self, tensors: Tensors, widths: Widths, where: str) -> None:
        for kind in _UNITS if self.rule == "concatenate" else ():
            found, wanted = sum(tensors[name].size for name in self._names(kind)), getattr(widths, kind)
            if found != wanted:
                raise UserError(f"{where} makes a layer of {found} {kind}; the model's have {wanted}")

    def count(self, members: Sequence[LayerSize]) -> LayerSize:
        return members[-1] if self.rule in _OF_HIGHEST else members[0]

    def apply(self, view: ModelView, members: Sequence[Block], tensors: Tensors) -> Block:
        if self.rule == "concatenate":
            import torch

            return concatenate(
                view,
                members,
                heads=[torch.from_numpy(tensors[name]) for name in self._names("heads")],
                neurons=[torch.from_numpy(tensors[name]) for name in self._names("neurons")],
                shares=self.shares or (),
                official_gqa=bool(self.official_gqa),
                fold_norm=bool(self.fold_norm),
            )
        if self.rule == "weighted":
            return weighted(view, members, self.shares or ())
        return merge(view, members, self.rule)

    @classmethod
    def lines(cls, ops: Sequence[Op], parameters: int) -> list[str]:
        """Nothing: whoever shows a plan shows which layers became one."""
        return []

    @classmethod
    def marks(cls, ops: Sequence[Op]) -> list[Mark]:
        return []


def _read_shares(shares: Any, where: str) -> tuple[float, ...]:
    if not isinstance(shares, list) or not all(map(is_share, shares)) or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"{where}: shares={short(shares)} must be numbers in [0, 1] that sum to 1")
    return tuple(shares)


def _check_units(tensors: Tensors, names: Sequence[str], kind: str, where: str) -> None:
    """Raise `UserError` unless each part's heads or neurons are units of a layer that has as many as all give."""
    parts = [read_tensor(tensors, name, where) for name in names]
    num_units = sum(part.size for part in parts)
    for name, part in zip(names, parts, strict=True):
        ascending = part.ndim == 1 and part.dtype == np.int64 and bool((np.diff(part) > 0).all())
        if not ascending or (part.size and not 0 <= part[0] <= part[-1] < num_units):
            raise UserError(
                f"{where}: the tensor {name} ({part.dtype}, {list(part.shape)}) must be int64 indices, ascending,"
                f" from 0 to {num_units - 1}: as many in all parts as a layer has {kind}"
            )
