"""What a width method leaves of sublayers, and the operations of a plan that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_pipeline.surgery.ops.base import SUBLAYERS, Op
from slm_pipeline.surgery.ops.replace import Replace, written
from slm_pipeline.surgery.ops.resize import Resize, resize

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.block import Block

Place = tuple[int, str]  # a layer, and its sublayer: attention | mlp


@dataclass(frozen=True)
class Narrowed:
    """What is left of a sublayer.

    Attributes:
        kept: [kept] int64 units that stay, ascending; on the CPU. With new weights it may be all.
        constant: [d] that its last projection adds, None for none.
        weight: [d, n] new weights of the last projection for the kept units; None: those that they have.
    """

    kept: Tensor
    constant: Tensor | None = None
    weight: Tensor | None = None

    def put(self, view: ModelView, block: Block, part: str) -> Block:
        """``block`` with this in the place of its sublayer ``part``; as the plan's operations do it."""
        kept = {"heads": None, "neurons": None, ("heads" if part == "attention" else "neurons"): self.kept}
        block = resize(view, block, **kept, biases={} if self.constant is None else {part: self.constant})
        if self.weight is None:
            return block
        return written(view, block, {f"{view.output_name(part)}.weight": self.weight})


def operations(narrowed: Mapping[Place, Narrowed], units: Mapping[Place, int]) -> tuple[list[Op], dict[str, Any]]:
    """The operations that leave this, layer by layer, and their tensors by name.

    Args:
        units: how many units each sublayer has.
    """
    ops: list[Op] = []
    tensors: dict[str, Any] = {}
    names = {"attention": "heads", "mlp": "neurons"}
    for layer in sorted({layer for layer, _ in narrowed}):
        found = {part: narrowed[layer, part] for part in SUBLAYERS if (layer, part) in narrowed}
        fewer = {part: of for part, of in found.items() if len(of.kept) < units[layer, part]}
        biases = tuple(part for part, of in fewer.items() if of.constant is not None)
        new = {part: of.weight for part, of in found.items() if of.weight is not None}
        for part, of in fewer.items():
            tensors[f"resize.{layer}.{names[part]}"] = of.kept.numpy()
            if of.constant is not None:
                tensors[f"resize.{layer}.{part}_bias"] = of.constant.cpu().numpy()
        for part, weight in new.items():
            tensors[f"replace.{layer}.{part}"] = weight.float().cpu().numpy()
        if fewer:
            left = {names[part]: len(of.kept) for part, of in fewer.items()}
            ops.append(Resize((layer,), f"resize.{layer}", **left, biases=biases or None))
        if new:
            ops.append(Replace((layer,), tuple(new), f"replace.{layer}"))
    return ops, tensors
