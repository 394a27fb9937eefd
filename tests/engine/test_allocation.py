"""Which units go, by hand."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from slm_pipeline.engine.allocation import Units, cheapest, evenly, lowest
from slm_pipeline.errors import UserError


def units(*scores, size=10, bias=0, fixed=(), step=1):
    mask = torch.tensor([index in fixed for index in range(len(scores))])
    return Units(torch.tensor(scores), size, bias, mask, step)


def left(parts, numbers):
    return [of.after(number).tolist() for of, number in zip(parts, numbers, strict=True)]


def test_the_lowest_go_first_by_hand():
    parts = [units(1.0, 5.0, 3.0), units(2.0, 0.0, 4.0, size=4, bias=3, fixed=(1,))]
    kept = {remove: left(parts, lowest(parts, remove)) for remove in (1, 10, 11, 12, 21, 25)}
    assert kept[1] == kept[10] == [[1, 2], [0, 1, 2]]
    assert kept[11] == [[1, 2], [1, 2]]  # 10 and 4 - 3
    assert kept[12] == kept[21] == [[1], [1, 2]]
    assert kept[25] == [[1], [1]]
    with pytest.raises(UserError, match="26 parameters cannot go: .* have 25"):
        lowest(parts, 26)


def test_evenly_by_hand():
    heads = [units(1.0, 2.0, 3.0, 4.0, size=100), units(4.0, 3.0, 2.0, 1.0, size=100)]
    neurons = [units(*map(float, range(10)), size=10), units(*map(float, range(10, 0, -1)), size=10, fixed=(9,))]

    def kept(remove, allows=lambda left: True):
        numbers = evenly(heads, neurons, remove, allows)
        return [left(part, [number] * 2) for part, number in zip((heads, neurons), numbers, strict=True)]

    # of 1000 parameters 300 are 0.3: one of four heads in each layer, and 5 neurons of each for the other 100
    assert kept(300) == [[[1, 2, 3], [0, 1, 2]], [[5, 6, 7, 8, 9], [0, 1, 2, 3, 9]]]
    assert kept(180) == [[[0, 1, 2, 3]] * 2, [[9], [9]]]  # less than a head: neurons make up for it
    all_neurons = [list(range(10))] * 2
    assert kept(181) == [[[1, 2, 3], [0, 1, 2]], all_neurons]  # there is no tenth that may go
    assert kept(300, lambda left: left != 3) == [[[2, 3], [0, 1]], all_neurons]
    assert len(kept(180, lambda left: left != 3)[1][0]) == 1
    assert kept(401, lambda left: left != 1) == [
        [[2, 3], [0, 1]],
        [[1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 9]],
    ]


def test_neurons_go_by_steps_so_that_a_multiple_stays():
    of = units(*map(float, range(10)), step=4)
    assert of.numbers() == [2, 6]  # 8 or 4 of 10 stay, and never none
    assert units(*map(float, range(8)), step=4).numbers() == [4]
    assert units(*map(float, range(8)), step=8).numbers() == []
    assert units(*map(float, range(8)), fixed=(1, 2, 3), step=2).numbers() == [2, 4]
    # The first step is 0.5, the second (2 + 3 + 4 + 5) / 4 = 3.5; of the other 0, 1, 2, 3.4, 3.6
    parts = [of, units(0.0, 1.0, 2.0, 3.4, 3.6, 9.0)]
    found = {remove: lowest(parts, remove) for remove in (30, 60, 70, 100, 110)}
    assert found == {30: [2, 1], 60: [2, 4], 70: [6, 4], 100: [6, 4], 110: [6, 5]}
    with pytest.raises(UserError, match="111 parameters cannot go: .* have 110"):
        lowest(parts, 111)
    assert evenly([], [of, of], 1, lambda left: True) == (0, 2)
    assert evenly([], [of, of], 41, lambda left: True) == (0, 6)


def test_levels_are_a_few_numbers_around_the_share_that_is_to_go():
    of = units(*map(float, range(21)))
    assert of.levels(0.2) == [2, 4, 8, 20]
    assert of.levels(0.9) == [9, 18, 20]  # no more than may go
    assert of.levels(0.001) == [1, 20]
    assert units(1.0, 2.0, 3.0).levels(0.2) == [1, 2]
    assert units(*map(float, range(16)), step=6).levels(0.2) == [4, 10]
    assert units(1.0).levels(0.2) == []


def test_the_cheapest_by_hand():
    parts = [units(*[0.0] * 9), units(*[0.0] * 9, size=20, bias=15)]
    damages = [{2: 0.2, 4: 0.9, 8: 1.0}, {4: 0.13, 8: 2.0}]
    # Damage a parameter: 0.2 / 20 and (1 - 0.2) / 60, which passes below 0.9; 0.13 / 65 and 1.87 / 80.
    assert cheapest(parts, damages, 65) == [0, 4]
    assert cheapest(parts, damages, 1) == [0, 1]  # 20 - 15
    assert cheapest(parts, damages, 6) == [0, 2]
    assert cheapest(parts, damages, 66) == [1, 4]
    assert cheapest(parts, damages, 86) == [3, 4]
    assert cheapest(parts, damages, 146) == [8, 5]
    assert cheapest(parts, damages, 225) == [8, 8]
    with pytest.raises(UserError, match="226 parameters cannot go: .* have 225"):
        cheapest(parts, damages, 226)
    assert cheapest(parts, [{8: float("inf")}, damages[1]], 145) == [0, 8]
    with pytest.raises(UserError, match="have 145"):
        cheapest(parts, [{8: float("inf")}, damages[1]], 146)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_removes_as_much_is_cheaper_where_damages_are_convex(seed):
    draw = random.Random(seed)
    parts = [units(*[0.0] * 5, size=draw.choice([3, 10])) for _ in range(4)]
    rises = [sorted(draw.uniform(0, 1) for _ in range(4)) for _ in parts]
    damages = [dict(enumerate(itertools.accumulate(of), start=1)) for of in rises]

    def cost(numbers):
        return sum({0: 0.0, **of}[number] for of, number in zip(damages, numbers, strict=True))

    def removed(numbers):
        return sum(of.gain(number) for of, number in zip(parts, numbers, strict=True))

    for remove in (5, 20, 40, 60):
        numbers = cheapest(parts, damages, remove)
        assert remove <= removed(numbers) < remove + 10
        others = (n for n in itertools.product(range(5), repeat=4) if removed(n) >= removed(numbers))
        assert cost(numbers) == pytest.approx(min(map(cost, others)))
