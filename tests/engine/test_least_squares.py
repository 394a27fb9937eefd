"""Least squares against numpy's, and the optimal brain surgeon against every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from slm_pipeline.engine.least_squares import (
    Gram,
    best_refit,
    leverage_scores,
    order_by_norm,
    penalty,
    refit,
    regret,
    removal_order,
    solve,
)
from slm_pipeline.errors import UserError


def projection(num_channels=6, num_outputs=4, num_tokens=40, seed=0):
    """[d, n] weights, and [n, tokens] inputs that depend on one another; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_channels, num_channels, generator=generator, dtype=torch.float64)
    inputs = (mix + 2 * torch.eye(num_channels)) @ torch.randn(num_channels, num_tokens, generator=generator).double()
    return torch.randn(num_outputs, num_channels, generator=generator, dtype=torch.float64), inputs


def error(weight, inputs, kept):
    """Squared error of the outputs with the best weights for these channels, by numpy's own least squares."""
    best = np.linalg.lstsq(inputs[kept].T.numpy(), (weight @ inputs).T.numpy(), rcond=None)[0]
    return float((((weight @ inputs).T.numpy() - inputs[kept].T.numpy() @ best) ** 2).sum())


def left_of(order, number):
    return [index for index in range(number) if index not in order.tolist()]


def test_a_gram_matrix_adds_up_whatever_batches_it_gets():
    rows = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    whole, pieces = Gram(3), Gram(3)
    whole.add(rows, weights)
    for piece, of_piece in zip(rows.split(1), weights.split(1), strict=True):
        pieces.add(piece, of_piece)
    flat = rows.flatten(0, 1).double()
    expected = flat.T @ (flat * weights.flatten().double()[:, None])
    for gram in (whole, pieces):
        torch.testing.assert_close(gram.matrix, expected, rtol=1e-6, atol=1e-6)
        assert gram.num_tokens == 10
    plain = Gram(3)
    plain.add(rows.bfloat16())
    rounded = flat.bfloat16().double()
    torch.testing.assert_close(plain.matrix, rounded.T @ rounded, rtol=1e-6, atol=1e-6)


def test_sums_are_more_exact_than_float32():
    gram = Gram(1)
    gram.add(torch.full((1, 1), 3e4))  # 9e8, next to which float32 loses a 1
    for _ in range(100):
        gram.add(torch.ones(1, 1))
    assert float(gram.matrix) == 9e8 + 100


def test_the_solution_is_that_of_the_stacked_problem():
    weight, inputs = projection()
    targets = weight @ inputs + torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
    prior = torch.randn(4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for lam in (0.0, 0.5, 30.0):
        rows = np.concatenate([inputs.T.numpy(), np.sqrt(lam) * np.eye(6)])
        goal = np.concatenate([targets.T.numpy(), np.sqrt(lam) * prior.T.numpy()])
        expected = np.linalg.lstsq(rows, goal, rcond=None)[0].T
        found = solve(inputs @ inputs.T, targets @ inputs.T, prior=prior, penalty=lam)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    shrunk = solve(inputs @ inputs.T, targets @ inputs.T, penalty=1e12)
    assert float(shrunk.abs().max()) < 1e-8  # without a prior: to zero


def test_dependent_inputs_need_a_ridge():
    _, inputs = projection()
    inputs[5] = 0
    gram = inputs @ inputs.T
    with pytest.raises(UserError, match="linearly dependent; use a larger ridge"):
        solve(gram, gram, penalty=0.0)
    with pytest.raises(UserError, match="are not finite"):
        solve(gram * float("nan"), gram, penalty=1.0)
    assert penalty(gram, 0.5) == pytest.approx(0.5 * float((inputs**2).sum()) / 6)
    silent = torch.zeros(2, 2)
    prior = torch.tensor([[3.0, -2.0]])
    torch.testing.assert_close(solve(silent, 0 * prior, prior=prior, penalty=penalty(silent, 0.01)), prior.double())


@pytest.mark.parametrize("seed", range(4))
def test_each_removal_is_the_best_of_all_and_the_refit_is_least_squares(seed):
    weight, inputs = projection(seed=seed)
    gram = inputs @ inputs.T
    order = removal_order(weight, gram, 5, penalty=1e-9)
    gone = []
    for chosen in order.tolist():
        errors = {
            one: error(weight, inputs, [index for index in range(6) if index not in (*gone, one)])
            for one in range(6)
            if one not in gone
        }
        assert chosen == min(errors, key=errors.get)
        gone.append(chosen)
        kept = torch.tensor(left_of(torch.tensor(gone), 6))
        found = refit(weight, gram, kept, penalty=1e-9)
        residual = float((weight @ inputs - found @ inputs[kept]).square().sum())
        assert residual == pytest.approx(errors[chosen], rel=1e-6)
    for number in range(1, 6):
        best = min(error(weight, inputs, list(kept)) for kept in itertools.combinations(range(6), 6 - number))
        assert error(weight, inputs, left_of(order[:number], 6)) >= best * (1 - 1e-9)


def test_the_best_of_two_choices_is_never_worse_than_the_magnitude_choice():
    greedy_lost = 0
    for seed in range(20):
        weight, inputs = projection(seed=seed)
        gram = inputs @ inputs.T
        orders = removal_order(weight, gram, 4, penalty=1e-9), order_by_norm(weight, gram)
        for number in range(1, 5):
            kept = [torch.tensor(left_of(order[:number], 6)) for order in orders]
            errors = [error(weight, inputs, of.tolist()) for of in kept]
            best, found = best_refit(weight, gram, kept, penalty=1e-9)
            residual = float((weight @ inputs - found @ inputs[kept[best]]).square().sum())
            assert residual == pytest.approx(min(errors), rel=1e-6)
            greedy_lost += errors[0] > errors[1] * (1 + 1e-6)
    assert 0 < greedy_lost < 20  # seldom, but greedy removal is no guarantee


@pytest.mark.parametrize("at_a_time", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_exact_updates_are_the_whole_computation_done_anew(size, at_a_time):
    """Costs of each round from scratch: the penalised problem of what is left, with and without each block."""
    weight, inputs = projection(12)
    lam, number = 3.0, 12 // size
    hessian = inputs @ inputs.T + lam * torch.eye(12)

    def objective(kept):  # tr((W - W') H (W - W')') at its least, for W' on these columns
        kept = torch.tensor(kept)
        cross = weight @ hessian[:, kept]
        return float(
            (weight @ hessian * weight).sum() - (cross @ torch.linalg.inv(hessian[kept][:, kept]) * cross).sum()
        )

    def columns(blocks):
        return [block * size + offset for block in blocks for offset in range(size)]

    fixed = torch.zeros(number, dtype=torch.bool)
    fixed[1] = True
    remove = min(4, number - 2)
    order = removal_order(
        weight, inputs @ inputs.T, remove, size=size, penalty=lam, at_a_time=at_a_time, fixed=fixed
    ).tolist()
    expected = []
    while len(expected) < remove:
        left = [block for block in range(number) if block not in expected]
        costs = {one: objective(columns([b for b in left if b != one])) for one in left if one != 1}
        ranked = sorted(costs, key=costs.get)
        expected += ranked[: min(at_a_time, remove - len(expected))]
    assert order == expected
    kept = columns([block for block in range(number) if block not in order])
    found = refit(weight, inputs @ inputs.T, torch.tensor(kept), penalty=lam)
    whole = torch.zeros_like(weight)
    whole[:, kept] = found
    assert float(((weight - whole) @ hessian * (weight - whole)).sum()) == pytest.approx(objective(kept), rel=1e-9)
    found = regret(weight, inputs @ inputs.T, torch.tensor(kept), found, penalty=lam)
    assert found == pytest.approx(objective(kept), rel=1e-9)
    energy = [float((weight[:, columns([one])] @ inputs[columns([one])]).square().sum()) for one in range(number)]
    by_norm = order_by_norm(weight, inputs @ inputs.T, size=size, fixed=fixed).tolist()
    assert by_norm == sorted(set(range(number)) - {1}, key=energy.__getitem__)


def test_the_order_by_hand():
    weight = torch.tensor([[1.0, 1.0, 0.1]])
    inputs = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, -1.0, 0.0, 3.0]])
    inputs = torch.cat([inputs, inputs[:1]])  # the fourth channel is the first again, with three times its weight
    weight = torch.cat([weight, torch.tensor([[3.0]])], dim=1)
    order = removal_order(weight, inputs @ inputs.T, 2, penalty=1e-9)
    assert set(order[:1].tolist()) <= {0, 3}  # either makes up for the other, although their weights are largest
    assert order[1] == 2
    kept = torch.tensor([0, 1, 2])
    found = refit(weight, inputs @ inputs.T, kept, penalty=1e-9)
    torch.testing.assert_close(found, torch.tensor([[4.0, 1.0, 0.1]]).double(), rtol=1e-6, atol=1e-6)


def test_leverage_scores_are_the_diagonal_of_the_hat_matrix():
    _, inputs = projection()
    gram = inputs @ inputs.T
    expected = (gram @ torch.linalg.inv(gram + 5.0 * torch.eye(6))).diagonal()
    torch.testing.assert_close(leverage_scores(gram, penalty=5.0), expected)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_wide_blocks_go_in_order_on_several_threads():
    """Groups of 192 columns, as SmolLM2's heads: MKL's LU of several such matrices at once fails on two threads."""
    size, generator = 192, torch.Generator().manual_seed(0)
    inputs = torch.randn(3 * size, 2000, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 3 * size, generator=generator, dtype=torch.float64)
    for block, factor in enumerate((2.0, 0.1, 1.0)):
        weight[:, block * size : (block + 1) * size] *= factor
    order = removal_order(weight, inputs @ inputs.T, 2, size=size, penalty=1.0)
    assert order.tolist() == [1, 2]


def test_a_block_that_rounding_leaves_no_factor_goes_last(monkeypatch):
    """As twins with a penalty of 1e-13 have it now and then, on some processors: so it is made up."""
    weight, inputs = projection()
    weight[:, :2] *= 1e-6
    asked = {"size": 2, "penalty": 0.1}
    assert removal_order(weight, inputs @ inputs.T, 3, **asked)[0] == 0
    factor = torch.linalg.cholesky_ex

    def fails_on_the_first(matrix, **options):
        found, failed = factor(matrix, **options)
        if matrix.dim() == 3 and not torch.equal(matrix[0], torch.eye(2, dtype=matrix.dtype)):  # it is not gone
            found[0], failed[0] = torch.nan, 1
        return found, failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_on_the_first)
    order = removal_order(weight, inputs @ inputs.T, 3, **asked).tolist()
    assert order[-1] == 0
    assert sorted(order) == [0, 1, 2]


def test_leverage_of_more_channels_than_are_looked_at_at_once(monkeypatch):
    monkeypatch.setattr("slm_pipeline.engine.least_squares._COLUMNS", 4)
    _, inputs = projection(num_channels=10)
    gram = inputs @ inputs.T
    expected = (gram @ torch.linalg.inv(gram + 0.5 * torch.eye(10))).diagonal()
    torch.testing.assert_close(leverage_scores(gram, penalty=0.5), expected)


def test_nothing_that_is_solved_with_changes():
    weight, inputs = projection()
    gram, moment, prior = inputs @ inputs.T, weight @ inputs @ inputs.T, torch.ones_like(weight)
    before = [tensor.clone() for tensor in (gram, moment, prior)]
    for given in (prior, None):
        solve(gram, moment, prior=given, penalty=0.1)
    leverage_scores(gram, penalty=0.1)
    assert all(torch.equal(now, then) for now, then in zip((gram, moment, prior), before, strict=True))
