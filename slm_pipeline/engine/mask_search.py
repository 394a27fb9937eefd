"""Which masks to set to zero by their Fisher information (Kwon et al., arXiv 2204.00656, sections 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slm_pipeline.engine.allocation import Steps, Units, too_many


@dataclass(frozen=True)
class Masks(Units):
    """Units whose scores are the Fisher information of their masks.

    Attributes:
        gradients: [N, n] of each sample's loss with respect to the masks.
    """

    gradients: Tensor = field(kw_only=True)


def search(heads: Sequence[Units], neurons: Sequence[Units], remove: int) -> tuple[list[int], list[int]]:
    """How many heads and how many neurons each layer loses, so that the sum of the scores that go is least while at
    least ``remove`` parameters go.

    For every number of heads that may go, those with the lowest scores of all layers, and the fewest neurons with the
    lowest scores that make up for the rest; by the mean score of a step where neurons go by several. Each sublayer
    keeps at least one unit.

    Raises:
        UserError: so many cannot go.
    """
    of_heads, of_neurons = Steps.of(heads), Steps.of(neurons)
    (head_gains, head_scores), (neuron_gains, neuron_scores) = _sums(of_heads), _sums(of_neurons)
    most = int(head_gains[-1] + neuron_gains[-1])
    if remove > most:
        raise too_many(remove, most)
    rest = (remove - head_gains).clamp_min(0)  # for each number of heads
    fewest = torch.searchsorted(neuron_gains, rest)
    reached = fewest < len(neuron_gains)
    lost = head_scores + neuron_scores[fewest.clamp_max(len(neuron_gains) - 1)]
    best = int(lost.where(reached, torch.inf).argmin())
    return of_heads.numbers(heads, best), of_neurons.numbers(neurons, int(fewest[best]))


def _sums(steps: Steps) -> tuple[Tensor, Tensor]:
    """[n + 1] parameters and [n + 1] float64 scores of the first so many steps."""
    scores = steps.scores.double() * steps.counts
    gains, lost = (torch.cat([of.new_zeros(1), of.cumsum(dim=0)]) for of in (steps.gains, scores))
    return gains, lost


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
