"""CKA against sums done by hand, and what tells the estimators apart."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from slm_pipeline.analysis.cka import ESTIMATORS, KERNELS, MinibatchCKA, alignment, cka, gram, hsic
from slm_pipeline.errors import UserError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two representations that share half of what is in them, with a common offset."""
    x = noise(n, 12)
    return x + 3, torch.cat([x[:, :6], noise(n, 9, seed=1)], dim=1) @ noise(15, 15, seed=2) - 1


def naive_gram(rows: torch.Tensor, kernel: str, factor: float) -> list[list[float]]:
    points = rows.tolist()
    pairs = list(itertools.product(range(len(points)), repeat=2))
    if kernel == "linear":
        values = {(i, j): sum(a * b for a, b in zip(points[i], points[j], strict=True)) for i, j in pairs}
    else:
        distances = {(i, j): math.dist(points[i], points[j]) for i, j in pairs}
        ordered = sorted(distances[i, j] for i, j in pairs if i < j)
        bandwidth = factor * ordered[(len(ordered) - 1) // 2]
        values = {pair: math.exp(-(distance**2) / (2 * bandwidth**2)) for pair, distance in distances.items()}
    return [[values[i, j] for j in range(len(points))] for i in range(len(points))]


def naive_hsic(k: list[list[float]], m: list[list[float]], estimator: str) -> float:
    """Song et al. 2012, equation 4, over all quadruples of different samples; Gretton et al. 2005 by loops."""
    n = len(k)
    everything = range(n)

    def centred(values: list[list[float]]) -> list[list[float]]:
        rows = [sum(row) / n for row in values]
        mean = sum(rows) / n
        return [[values[i][j] - rows[i] - rows[j] + mean for j in everything] for i in everything]

    if estimator == "unbiased":
        two, three, four = 0.0, 0.0, 0.0
        for i, j in itertools.permutations(everything, 2):
            two += k[i][j] * m[i][j] / (n * (n - 1))
        for i, j, q in itertools.permutations(everything, 3):
            three += k[i][j] * m[i][q] / (n * (n - 1) * (n - 2))
        for i, j, q, r in itertools.permutations(everything, 4):
            four += k[i][j] * m[q][r] / (n * (n - 1) * (n - 2) * (n - 3))
        return two + four - 2 * three
    k, m = centred(k), centred(m)
    trace = sum(k[i][j] * m[j][i] for i in everything for j in everything)
    return trace / (n - 1) ** 2 if estimator == "biased" else math.trunc(trace / (n * (n - 3)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("kernel", "factor"), [("linear", 1.0), ("rbf", 1.0), ("rbf", 0.4)])
def test_against_loops_over_samples(estimator, kernel, factor):
    x, y = related(7)
    x, y = 10 * x, 10 * y
    naive = [naive_gram(rows, kernel, factor) for rows in (x, y)]
    grams = torch.stack([gram(rows, kernel, factor) for rows in (x, y)])
    torch.testing.assert_close(grams, torch.tensor(naive, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    expected = [[naive_hsic(k, m, estimator) for m in naive] for k in naive]
    found = hsic(grams, estimator)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_independent_noise_has_none_but_the_published_estimator_says_one():
    x, y = noise(16, 20_000), noise(16, 20_000, seed=1)
    assert cka(x, y, "official") == pytest.approx(0.999, abs=1e-3)
    assert cka(x, y, "biased") == pytest.approx(0.999, abs=1e-3)
    assert abs(cka(x, y, "unbiased")) < 0.3  # one draw: a tenth either way
    values = [cka(noise(16, 2000, seed=2 * i), noise(16, 2000, seed=2 * i + 1), "unbiased") for i in range(200)]
    assert abs(sum(values) / len(values)) < 0.02


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_one_with_itself_and_the_same_after_rotation_scaling_and_shift(estimator, kernel):
    x, y = related()
    rotation, _ = torch.linalg.qr(noise(12, 12, seed=3))
    assert cka(x, x, estimator, kernel) == pytest.approx(1)
    found = cka(x, y, estimator, kernel)
    assert 0.1 < found < 0.9
    assert cka(x @ rotation, 1e-3 * y, estimator, kernel) == pytest.approx(found)
    assert cka(x + 100, y, estimator, kernel) == pytest.approx(found)
    assert cka(y, x, estimator, kernel) == pytest.approx(found)
    stretched = x * torch.linspace(0.1, 10, 12, dtype=torch.float64)
    assert cka(stretched, y, estimator, kernel) != pytest.approx(found, abs=1e-2)


def test_published_values_are_cut_to_integers():
    x, y = related()
    small = 0.1 * x / x.norm(dim=1, keepdim=True)
    assert math.isnan(cka(small, y, "official"))  # its HSIC with itself is less than 1: 0 / 0
    assert cka(1000 * x, 1000 * y, "official") == pytest.approx(cka(x, y, "biased"), abs=1e-4)


def test_rows_that_do_not_differ_leave_it_undefined():
    x, y = related()
    for kernel in KERNELS:
        assert math.isnan(cka(torch.ones_like(x), y, "unbiased", kernel))


@pytest.mark.parametrize(("estimator", "least"), [("unbiased", 4), ("official", 4), ("biased", 2)])
def test_fewer_rows_than_the_estimator_needs(estimator, least):
    x, y = noise(least, 5), noise(least, 5, seed=1)
    assert math.isfinite(float(hsic(torch.stack([gram(x), gram(y)]), estimator)[0, 1]))
    with pytest.raises(UserError, match=f"{estimator} estimator of HSIC needs at least {least} rows, not {least - 1}"):
        cka(x[1:], y[1:], estimator)


def test_minibatches_are_summed_before_dividing():
    x, y = related(40)
    parts = [hsic(torch.stack([gram(x[part]), gram(y[part])])) for part in (slice(0, 16), slice(16, 40))]
    accumulated = MinibatchCKA(16)
    for part in (slice(0, 5), slice(5, 6), slice(6, 33), slice(33, 40)):  # however the rows arrive
        accumulated.add([x[part].float(), y[part]])
    torch.testing.assert_close(accumulated.result(), alignment(parts[0] + parts[1]), rtol=1e-5, atol=1e-6)
    assert (accumulated.num_rows, accumulated.num_minibatches) == (40, 2)


@pytest.mark.parametrize(("arriving", "sizes"), [([32], [16, 16]), ([31], [31]), ([9], [9]), ([50, 3], [16, 16, 21])])
def test_every_minibatch_is_full_and_no_row_is_left_out(arriving, sizes, monkeypatch):
    taken = []

    def recorded(grams, estimator):
        taken.append(grams.shape[-1])
        return hsic(grams, estimator)

    monkeypatch.setattr("slm_pipeline.analysis.cka.hsic", recorded)
    accumulated = MinibatchCKA(16)
    for number in arriving:
        accumulated.add([noise(number, 3)])
    accumulated.result()
    assert taken == sizes


@pytest.mark.parametrize("kernel", KERNELS)
def test_minibatches_are_close_to_all_rows_at_once(kernel):
    x, y = related(2048)
    whole = cka(x, y, "unbiased", kernel)
    apart = {}
    for estimator in ("unbiased", "biased"):
        accumulated = MinibatchCKA(64, estimator, kernel)
        accumulated.add([x, y])
        apart[estimator] = float(accumulated.result()[0, 1])
    assert apart["unbiased"] == pytest.approx(whole, abs=0.02)
    assert apart["biased"] > whole + 0.03  # what the bias of a small minibatch adds


def test_no_rows_at_all():
    with pytest.raises(UserError, match="no rows"):
        MinibatchCKA(64).result()
