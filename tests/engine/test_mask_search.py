"""The search over numbers of heads against brute force, and the rearrangement against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from slm_pipeline.engine.allocation import Units
from slm_pipeline.engine.mask_search import rearrange, search
from slm_pipeline.errors import UserError


def units(scores, size, fixed=(), step=1):
    is_fixed = torch.zeros(len(scores), dtype=torch.bool)
    is_fixed[list(fixed)] = True
    return Units(torch.tensor(scores), size, 0, is_fixed, step)


def found_by(heads, neurons, remove):
    """For each layer the heads, and for each the neurons, that stay."""
    numbers = search(heads, neurons, remove)
    return [
        [of.after(number) for of, number in zip(groups, found, strict=True)]
        for groups, found in zip((heads, neurons), numbers, strict=True)
    ]


def cost(kept, groups):
    gone = [set(range(len(of.scores))) - set(stay.tolist()) for stay, of in zip(kept, groups, strict=True)]
    scores = sum(float(of.scores[index]) for of, lost in zip(groups, gone, strict=True) for index in lost)
    return scores, sum(of.size * len(lost) for of, lost in zip(groups, gone, strict=True))


def brute_force(heads, neurons, remove):
    """The least cost over every number of heads of all layers, and of neurons, that go in the order of their scores."""
    orders = []
    for groups in (heads, neurons):
        free = []
        for of in groups:
            last = max(range(len(of.scores)), key=lambda i, of=of: float(of.scores[i]))
            spared = set() if of.fixed.any() else {last}
            free += [
                (float(of.scores[i]), of.size) for i in range(len(of.scores)) if not of.fixed[i] and i not in spared
            ]
        orders.append(sorted(free))
    return min(
        sum(score for score, _ in (*orders[0][:a], *orders[1][:b]))
        for a, b in itertools.product(range(len(orders[0]) + 1), range(len(orders[1]) + 1))
        if sum(size for _, size in (*orders[0][:a], *orders[1][:b])) >= remove
    )


@pytest.mark.parametrize("remove", [1, 9, 30, 55, 80])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_is_brute_force_over_all_numbers_of_heads(seed, remove):
    generator = torch.Generator().manual_seed(seed)
    heads = [units(torch.rand(4, generator=generator).tolist(), 8) for _ in range(3)]
    neurons = [units((torch.rand(6, generator=generator) / 3).tolist(), 3, [0] if i else []) for i in range(3)]
    of_heads, of_neurons = found_by(heads, neurons, remove)
    found, gone = cost([*of_heads, *of_neurons], [*heads, *neurons])
    assert gone >= remove
    assert found == pytest.approx(brute_force(heads, neurons, remove))
    assert all(len(kept) for kept in (*of_heads, *of_neurons))
    assert all(0 in kept for kept in of_neurons[1:])


def test_heads_go_only_where_neurons_cost_more():
    heads, dear, cheap = [units([0.1, 9.0], 10)], [units([0.3] * 20, 1)], [units([0.001] * 19 + [1.0], 1)]
    assert search(heads, dear, 10) == ([1], [0])
    assert search(heads, cheap, 10) == ([0], [10])
    assert search([], cheap, 5) == ([], [5])
    assert search(heads, [], 5) == ([1], [])


def test_neurons_go_by_steps_at_the_mean_of_their_scores():
    heads = [units([0.5, 9.0], 4)]
    # Steps of two neurons: 0.1 + 0.2, 0.3 + 0.4; of the other 1 first, so that 4 of 5 stay: 0.25, then 0.3 + 0.9.
    neurons = [units([0.4, 0.1, 0.3, 0.2, 8.0, 8.0], 2, step=2), units([0.25, 0.3, 0.9, 7.0, 7.0], 2, step=2)]
    assert search(heads, neurons, 4) == ([0], [2, 0])  # 0.3, not the head's 0.5
    assert search(heads, neurons, 5) == ([0], [2, 1])  # 0.55 < 0.8, head and first step
    assert search(heads, neurons, 7) == ([1], [2, 0])  # 0.8 < 1.25
    assert search(heads, neurons, 10) == ([1], [2, 1])  # 1.05 < 1.25
    assert search([units([0.2, 9.0], 4)], neurons, 4) == ([1], [0, 0])  # 0.2 < 0.3, though the mean is less


def test_too_much_is_an_error():
    with pytest.raises(UserError, match="40 parameters cannot go: .* have 29"):
        search([units([0.1, 9.0], 10)], [units([0.3] * 20, 1)], 40)


def together(gone, gradients):
    """Sum over samples of (the sum of the masks' gradients) squared."""
    return sum(sum(float(row[index]) for index in gone) ** 2 for row in gradients)


def test_what_cancels_goes_together():
    gradients = torch.tensor([[1.0, 2.0, -2.0, 1.1], [1.0, 3.0, -3.0, 1.1]])
    none, third = torch.zeros(4, dtype=torch.bool), torch.tensor([False, False, True, False])
    # Alone 0 and 3 cost least, together 2.1^2 + 2.1^2; 2 and 3 cost 0.9^2 + 1.9^2.
    assert rearrange(torch.tensor([1, 2]), gradients, none).tolist() == [0, 1]
    assert rearrange(torch.tensor([1, 2]), gradients, third).tolist() == [1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_the_rearrangement_is_its_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(4, 9, generator=generator)
    fixed = torch.tensor([False] * 8 + [True])
    fisher = gradients.square().sum(dim=0)
    order = sorted(range(8), key=lambda index: float(fisher[index]))
    gone = order[:4]
    for unit in order[4:]:
        offered = [*gone, unit]
        gone = min(([u for u in offered if u != back] for back in offered), key=lambda left: together(left, gradients))
    kept = torch.tensor(sorted({*range(9)} - {*order[:4]}))
    found = rearrange(kept, gradients, fixed)
    assert found.tolist() == sorted({*range(9)} - {*gone})
    assert together(gone, gradients) <= together(order[:4], gradients)
