"""Which heads and neurons of which layers go, so that a number of parameters is reached.

`evenly` takes as many from every layer, `lowest` those with the lowest scores of the whole model, `cheapest` as many as
do least damage by what was measured. Each sublayer keeps at least one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slm_pipeline.errors import UserError
from slm_pipeline.show.numerals import counts

# Times the share that is to go of all that may: how much of a sublayer is gone when its damage is measured, and all of
# it once. What is taken of most lies between these.
_LEVELS = (1 / 2, 1, 2)


@dataclass(frozen=True)
class Units:
    """The key-value groups of a layer's attention, or the neurons of its feed-forward network.

    Attributes:
        scores: [n] float32; the lowest go first.
        size: parameters in one unit.
        bias: parameters that the sublayer gets when it loses units.
        fixed: [n] bool: those that stay whatever their score.
        step: when units go, a multiple of it stays.
    """

    scores: Tensor
    size: int
    bias: int
    fixed: Tensor
    step: int = 1

    def in_order(self) -> Tensor:
        """Those that may go, the lowest score first; ties by index."""
        free = ~self.fixed
        if free.all():
            free[self.scores.argmax()] = False
        order = self.scores.argsort(stable=True)
        return order[free[order]]

    def numbers(self) -> list[int]:
        """How many may go, ascending, 0 left out."""
        return list(range(len(self.scores) % self.step or self.step, len(self.in_order()) + 1, self.step))

    def levels(self, share: float) -> list[int]:
        """A few of `numbers`, ascending, around the ``share`` in (0, 1] of those that may go, and the highest."""
        numbers = self.numbers()
        most = max(numbers, default=0)
        around = (min(numbers, key=lambda n: abs(n - times * share * most)) for times in _LEVELS if numbers)
        return sorted({*around, *numbers[-1:]})

    def gain(self, number: int) -> int:
        """Parameters that are gone when so many units are."""
        return number * self.size - self.bias if number else 0

    def most(self) -> int:
        """Parameters that can go."""
        return max(self.gain(number) for number in (0, *self.numbers()))

    def without(self, gone: Tensor) -> Tensor:
        """[kept] int64 indices of those that stay, ascending."""
        kept = torch.ones(len(self.scores), dtype=torch.bool)
        kept[gone] = False
        return kept.nonzero().flatten()

    def after(self, number: int) -> Tensor:
        """[kept] int64 indices of those that stay when so many go, ascending."""
        return self.without(self.in_order()[:number])


def lowest(units: Sequence[Units], remove: int) -> list[int]:
    """How many of each of ``units`` go when the lowest scores of all go until at least ``remove`` parameters are gone,
    and less than one step more.

    Raises:
        UserError: so many cannot go.
    """
    steps = Steps.of(units)
    total = steps.gains.cumsum(dim=0)
    most = int(total[-1]) if len(total) else 0
    if remove > most:
        raise too_many(remove, most)
    return steps.numbers(units, int(torch.searchsorted(total, remove)) + 1)


class Steps(NamedTuple):
    """All steps of several sublayers, in the order in which they go.

    Attributes:
        owner: [n] int64 whose step it is, by index.
        scores: [n] float32 mean score of the units in it, ascending.
        counts, gains: [n] int64 units and parameters in it.
    """

    owner: Tensor
    scores: Tensor
    counts: Tensor
    gains: Tensor

    @classmethod
    def of(cls, units: Sequence[Units]) -> Steps:
        none = torch.zeros(0, dtype=torch.int64)
        found = [(none, torch.zeros(0), none, none)]
        for index, of in enumerate(units):
            scores, counts, gains = _steps(of)
            found.append((torch.full_like(counts, index), scores, counts, gains))
        owner, scores, counts, gains = (torch.cat(list(column)) for column in zip(*found, strict=True))
        order = scores.argsort(stable=True)
        return cls(owner[order], scores[order], counts[order], gains[order])

    def numbers(self, units: Sequence[Units], first: int) -> list[int]:
        """How many of each of ``units`` go with so many steps."""
        taken = self.owner[:first].bincount(minlength=len(units)).tolist()
        return [[0, *of.numbers()][number] for of, number in zip(units, taken, strict=True)]


def _steps(of: Units) -> tuple[Tensor, Tensor, Tensor]:
    """Of each next of `Units.numbers`: the mean score of the units that it adds, ascending, their number and their
    parameters."""
    numbers = [0, *of.numbers()]
    counts, gains = (torch.tensor(found, dtype=torch.int64).diff() for found in (numbers, [*map(of.gain, numbers)]))
    if not len(gains):
        return torch.zeros(0), counts, gains
    scores = of.scores[of.in_order()[: numbers[-1]]]
    first = scores[: numbers[1]].mean(dim=0, keepdim=True)
    others = scores[numbers[1] :].view(-1, of.step).mean(dim=1)
    ascending = torch.cat([first, others]).cummax(dim=0).values  # means of equal scores may differ by their rounding
    return ascending, counts, gains


def evenly(
    heads: Sequence[Units], neurons: Sequence[Units], remove: int, allows: Callable[[int], bool]
) -> tuple[int, int]:
    """How many heads and how many neurons every layer loses, so that at least ``remove`` parameters go in all, and less
    than one step of the neurons of every layer more.

    Attention and feed-forward networks lose the same share, rounded down to heads that ``allows`` leaves; neurons make
    up for it.

    Args:
        heads, neurons: one for each layer, of equal sizes; either may be empty.
        allows: whether layers may have so many heads.

    Raises:
        UserError: so many cannot go.
    """
    num_heads = min((len(of.scores) for of in heads), default=0)
    share = remove / sum(len(of.scores) * of.size for of in (*heads, *neurons))
    allowed = [gone for gone in range(num_heads) if allows(num_heads - gone)] or [0]
    floor = max(gone for gone in allowed if gone <= int(share * num_heads))
    numbers = [0, *min((of.numbers() for of in neurons), key=len, default=[])]
    most = 0
    for gone in (floor, *(gone for gone in allowed if gone > floor)):
        of_heads = sum(of.gain(gone) for of in heads)
        for number in numbers:
            if of_heads + sum(of.gain(number) for of in neurons) >= remove:
                return gone, number
        most = max(most, of_heads + sum(of.gain(numbers[-1]) for of in neurons))
    raise too_many(remove, most)


def cheapest(units: Sequence[Units], damages: Sequence[Mapping[int, float]], remove: int) -> list[int]:
    """How many of each of ``units`` go when at least ``remove`` parameters are to go, and less than one step more, for
    the least sum of damages.

    What is not measured lies on the lower convex hull of what is. There a Lagrange multiplier on parameters finds the
    optimum: stretches of all hulls go by their damage per parameter, the lowest first, and the last in part.

    Args:
        damages: for each, number of units gone -> damage, at any of its `Units.numbers`; 0 units do none.

    Raises:
        UserError: so many cannot go.
    """
    stretches = [
        (slope, index, low, high)
        for index, (of, measured) in enumerate(zip(units, damages, strict=True))
        for slope, low, high in lower_hull((of.gain(number), number, damage) for number, damage in measured.items())
    ]
    taken, missing = [0] * len(units), remove
    for _, index, low, high in sorted(stretches):
        of = units[index]
        enough = (n for n in of.numbers() if low < n <= high and of.gain(n) - of.gain(low) >= missing)
        taken[index] = next(enough, high)
        missing -= of.gain(taken[index]) - of.gain(low)
        if missing <= 0:
            return taken
    raise too_many(remove, remove - missing)


def lower_hull(
    points: Iterable[tuple[int, int, float]], start: tuple[int, int] = (0, 0)
) -> list[tuple[float, int, int]]:
    """Stretches of the lower convex hull of damage over parameters gone.

    Args:
        points: parameters gone, the number of units that says so, and the damage; one that is not finite is none.
        start: where there is no damage yet: parameters gone, and the number of units.

    Returns:
        Ascending: damage per parameter, and the numbers before and after.
    """
    found = sorted(point for point in points if math.isfinite(point[2]))
    stretches, at, least = [], (*start, 0.0), -math.inf
    while ahead := [point for point in found if point[0] > at[0]]:
        slopes = [(damage - at[2]) / (gain - at[0]) for gain, _, damage in ahead]
        end = ahead[slopes.index(min(slopes))]
        least = max(least, min(slopes))  # stretches of one line may differ by their rounding
        stretches.append((least, at[1], end[1]))
        at = end
    return stretches


class TooMany(UserError):
    """More is to go than may; ``most`` is what may, in parameters."""

    most = 0


def too_many(remove: int, most: int) -> TooMany:
    asked, there = counts(remove, max(0, most))
    error = TooMany(
        f"{asked} parameters cannot go: heads and neurons that may be removed have {there}, as every sublayer keeps"
        " one, or method.multiple_of neurons; ask for a lower pruning_ratio"
    )
    error.most = max(0, most)
    return error
