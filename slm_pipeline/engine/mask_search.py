"""Which masks to set to zero by their Fisher information (Kwon et al., arXiv 2204.00656, sections 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slm_pipeline.engine.allocation import Units, too_many


def search(heads: Sequence[Units], neurons: Sequence[Units], remove: int) -> tuple[list[Tensor], list[Tensor]]:
    """Kept indices of the layers' heads and neurons when the sum of the scores that go is least, while at least
    ``remove`` parameters go.

    For every number of heads that may go, those with the lowest scores of all layers, and the fewest neurons with the
    lowest scores that make up for the rest. `Units.bias` is not counted. Each sublayer keeps at least one unit.

    Raises:
        UserError: so many cannot go.
    """
    orders = [_in_order(heads), _in_order(neurons)]
    (_, head_sizes, head_scores), (_, neuron_sizes, neuron_scores) = orders
    most = int(head_sizes[-1] + neuron_sizes[-1])
    if remove > most:
        raise too_many(remove, most)
    rest = (remove - head_sizes).clamp_min(0)  # for each number of heads
    num_neurons = torch.searchsorted(neuron_sizes, rest)
    reached = num_neurons < len(neuron_sizes)
    lost = head_scores + neuron_scores[num_neurons.clamp_max(len(neuron_sizes) - 1)]
    num_heads = int(lost.where(reached, torch.inf).argmin())
    numbers = [num_heads, int(num_neurons[num_heads])]
    found = [
        _without(of, order[0][:number]) for of, order, number in zip((heads, neurons), orders, numbers, strict=True)
    ]
    return found[0], found[1]


def _in_order(units: Sequence[Units]) -> tuple[Tensor, Tensor, Tensor]:
    """The units of all layers that may go, the lowest score first: [n, 2] layer and index; [n + 1] parameters and
    [n + 1] float64 scores of the first so many."""
    orders = [of.in_order() for of in units]
    pairs = [torch.stack([torch.full_like(order, layer), order], dim=1) for layer, order in enumerate(orders)]
    found = torch.cat([torch.zeros(0, 2, dtype=torch.int64), *pairs])
    scores = torch.cat([torch.zeros(0), *(of.scores[order] for of, order in zip(units, orders, strict=True))])
    found = found[by_score := scores.argsort(stable=True)]
    sizes = torch.tensor([of.size for of in units], dtype=torch.int64)[found[:, 0]]
    zero = torch.zeros(1)
    return (
        found,
        torch.cat([zero.long(), sizes]).cumsum(dim=0),
        torch.cat([zero, scores[by_score]]).cumsum(dim=0, dtype=torch.float64),
    )


def _without(units: Sequence[Units], gone: Tensor) -> list[Tensor]:
    return [of.without(gone[gone[:, 0] == layer, 1]) for layer, of in enumerate(units)]


def rearrange(kept: Tensor, gradients: Tensor, fixed: Tensor) -> Tensor:
    """As many units of one sublayer, chosen so that those that go cost less together.

    What goes costs the sum over samples of (the sum of their gradients) squared: Fisher information with all products
    within the sublayer. Units are offered to what goes one by one, the lowest Fisher information first; each time the
    one goes back without which the rest costs least.

    Args:
        kept: [kept] int64.
        gradients: [N, units] of each sample's loss with respect to the masks.
        fixed: [units] bool: those that stay.

    Returns:
        [kept] int64, ascending.
    """
    columns = gradients.double().T
    squares = columns.square().sum(dim=1)
    is_kept = torch.zeros(len(columns), dtype=torch.bool)
    is_kept[kept] = True
    gone: list[int] = (~is_kept).nonzero().flatten().tolist()
    total = columns[gone].sum(dim=0)
    offered = (is_kept & ~fixed).nonzero().flatten()
    for unit in offered[squares[offered].argsort(stable=True)].tolist():
        gone.append(unit)
        total = total + columns[unit]
        costs = squares[gone] - 2 * (columns[gone] @ total)  # of the others, less that of all
        back = gone.pop(int(costs.argmin()))
        total = total - columns[back]
    is_kept[:] = True
    is_kept[gone] = False
    return is_kept.nonzero().flatten()
