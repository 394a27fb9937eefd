"""A block of a pruned model, described by the dense model it comes from. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slm_pipeline.models.view import ModelView


@dataclass(frozen=True)
class Block:
    """A block of the dense model, changed in places. Searches run it without copying anything.

    Attributes:
        body: index of the dense block whose module, layer type and remaining parameters it uses.
        replaced: parameter name within the block -> tensor that stands in its place. May share memory with the
            model: copy before writing.
        without: sublayers (attention, mlp) that it lacks: they add nothing to the residual stream.
    """

    body: int
    replaced: dict[str, Tensor] = field(default_factory=dict)
    without: frozenset[str] = frozenset()

    def parameter(self, view: ModelView, name: str) -> Tensor:
        if name in self.replaced:
            return self.replaced[name]
        return view.layers[self.body].get_parameter(name).detach()

    def on(self, device: torch.device) -> Block:
        """The same block with the tensors that it brings on this device, for who runs it more than once."""
        return replace(self, replaced={name: value.to(device) for name, value in self.replaced.items()})

    def lacking(self, sublayer: str) -> Block:
        """The same block without one more sublayer."""
        return replace(self, without=self.without | {sublayer})
