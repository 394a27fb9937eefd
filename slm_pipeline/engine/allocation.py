"""Which heads and neurons of which layers go, by their scores, so that a number of parameters is reached.

`evenly` takes as many from every layer, `lowest` those with the lowest scores of the whole model. Each sublayer keeps
at least one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slm_pipeline.errors import UserError


@dataclass(frozen=True)
class Units:
    """The key-value groups of a layer's attention, or the neurons of its feed-forward network.

    Attributes:
        scores: [n] float32; the lowest go first.
        size: parameters in one unit.
        bias: parameters that the sublayer gets when it loses units.
        fixed: [n] bool: those that stay whatever their score.
    """

    scores: Tensor
    size: int
    bias: int
    fixed: Tensor

    def in_order(self) -> Tensor:
        """Those that may go, the lowest score first; ties by index."""
        free = ~self.fixed
        if free.all():
            free[self.scores.argmax()] = False
        order = self.scores.argsort(stable=True)
        return order[free[order]]

    def without(self, gone: Tensor) -> Tensor:
        """[kept] int64 indices of those that stay, ascending."""
        kept = torch.ones(len(self.scores), dtype=torch.bool)
        kept[gone] = False
        return kept.nonzero().flatten()


def lowest(units: Sequence[Units], remove: int) -> list[Tensor]:
    """Kept indices of each of ``units`` when the lowest scores of all go until at least ``remove`` parameters are gone,
    and less than one unit more.

    Raises:
        UserError: so many cannot go.
    """
    orders = [of.in_order() for of in units]
    owner = torch.cat([torch.full_like(order, index) for index, order in enumerate(orders)])
    scores = torch.cat([of.scores[order] for of, order in zip(units, orders, strict=True)])
    owner = owner[scores.argsort(stable=True)]
    gains = torch.tensor([of.size for of in units])[owner]
    firsts = torch.from_numpy(np.unique(owner.numpy(), return_index=True)[1])
    gains[firsts] -= torch.tensor([of.bias for of in units])[owner[firsts]]
    total = gains.cumsum(dim=0)
    most = int(total[-1]) if len(total) else 0
    if remove > most:
        raise too_many(remove, most)
    taken = owner[: int(torch.searchsorted(total, remove)) + 1].bincount(minlength=len(units)).tolist()
    return [of.without(order[:number]) for of, order, number in zip(units, orders, taken, strict=True)]


def evenly(
    heads: Sequence[Units], neurons: Sequence[Units], remove: int, allows: Callable[[int], bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """Kept indices of the layers' heads and neurons when every layer loses as many, at least ``remove`` parameters in
    all, and less than one neuron of every layer more.

    Attention and feed-forward networks lose the same share, rounded down to heads that ``allows`` leaves; neurons make
    up for it.

    Args:
        heads, neurons: one for each layer; either may be empty.
        allows: whether layers may have so many heads.

    Raises:
        UserError: so many cannot go.
    """
    num_heads = len(heads[0].scores) if heads else 0
    share = remove / sum(len(of.scores) * of.size for of in (*heads, *neurons))
    allowed = [gone for gone in range(num_heads) if allows(num_heads - gone)] or [0]
    floor = max(gone for gone in allowed if gone <= int(share * num_heads))
    most_neurons = min((len(of.in_order()) for of in neurons), default=0)
    most = 0
    for gone in (floor, *(gone for gone in allowed if gone > floor)):
        of_heads = sum(gone * of.size - of.bias for of in heads) if gone else 0
        bias, of_neurons = sum(of.bias for of in neurons), sum(of.size for of in neurons)
        number = -(-(remove - of_heads + bias) // of_neurons) if neurons and remove > of_heads else 0
        if number <= most_neurons and of_heads + number * of_neurons - (bias if number else 0) >= remove:
            return (
                [of.without(of.in_order()[:gone]) for of in heads],
                [of.without(of.in_order()[:number]) for of in neurons],
            )
        most = max(most, of_heads + most_neurons * of_neurons - bias)
    raise too_many(remove, most)


def too_many(remove: int, most: int) -> UserError:
    return UserError(
        f"{remove} parameters cannot go: heads and neurons that may be removed have {max(0, most)}, as every sublayer"
        " keeps one; ask for a lower pruning_ratio"
    )
