"""Patches of maps whose boundaries are known, and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from slm_pipeline.analysis.patches import agreement, contrast, patches, windows_in_patches


def blocks(*sizes: int, inside: float = 0.9, outside: float = 0.4) -> torch.Tensor:
    depth = sum(sizes)
    values = torch.full((depth, depth), outside, dtype=torch.float64)
    start = 0
    for size in sizes:
        values[start : start + size, start : start + size] = inside
        start += size
    return values.fill_diagonal_(1)


def by_distance(depth: int) -> torch.Tensor:
    """Similarity that falls off with the layers' distance and with nothing else."""
    layers = torch.arange(depth, dtype=torch.float64)
    return torch.exp(-(layers[:, None] - layers).abs() / 8)


@pytest.mark.parametrize("sizes", [(3, 5, 4), (1, 4, 1, 6), (2, 2, 2), (10, 20), (7,)])
def test_blocks_are_found(sizes):
    ends = list(itertools.accumulate(sizes))
    expected = [(end - size, end - 1) for size, end in zip(sizes, ends, strict=True)]
    assert patches(blocks(*sizes)) == expected
    noise = 0.03 * torch.randn(ends[-1], ends[-1], generator=torch.Generator().manual_seed(0))
    if len(sizes) > 1:
        assert patches(blocks(*sizes) + noise + noise.T) == expected
        assert patches(blocks(*sizes), len(sizes)) == expected


@pytest.mark.parametrize("num_patches", [None, 1, 2, 3, 8])
def test_best_of_all_cuts(num_patches):
    values = torch.rand(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = (blocks(3, 5) + values + values.T).fill_diagonal_(1)
    mean = float((values.sum() - 8) / 56)

    def cost(cuts: tuple[int, ...]) -> float:
        total = 0.0
        for start, end in itertools.pairwise((0, *cuts, 8)):
            total += end - start - float(values[start:end, start:end].sum()) / (end - start)
        return total + (1 - mean) * (len(cuts) + 1)

    sizes = range(8) if num_patches is None else [num_patches - 1]
    best = min((cuts for size in sizes for cuts in itertools.combinations(range(1, 8), size)), key=cost)
    assert patches(values, num_patches) == [(a, b - 1) for a, b in itertools.pairwise((0, *best, 8))]


def test_what_is_undefined_counts_as_no_similarity():
    values = blocks(3, 5)
    values[0] = values[:, 0] = math.nan
    assert patches(values) == [(0, 0), (1, 2), (3, 7)]
    assert contrast(values, [(0, 0), (1, 2), (3, 7)])["outside"] == pytest.approx(0.4)


@pytest.mark.parametrize("number", [0, 6])
def test_impossible_number_of_patches(number):
    with pytest.raises(ValueError, match=rf"num_patches={number} is not in 1\.\.5"):
        patches(torch.eye(5), number)


def test_contrast_by_hand():
    found = contrast(blocks(1, 3), [(0, 0), (1, 3)])
    # distance 1: 0.4, 0.9, 0.9; distance 2: 0.4, 0.9; inside are two pairs of the one, one of the other
    expected = (2 * (0.9 - 2.2 / 3) + (0.9 - 0.65)) / 3
    assert found == pytest.approx({"inside": 0.9, "outside": 0.4, "beyond_distance": expected})


def test_a_map_of_distances_alone_has_patches_but_nothing_beyond_distance():
    runs = patches(by_distance(30))
    found = contrast(by_distance(30), runs)
    assert len(runs) > 3
    assert found["inside"] > found["outside"] + 0.3
    assert found["beyond_distance"] == pytest.approx(0, abs=1e-12)


def test_contrast_of_one_patch_has_no_outside():
    found = contrast(blocks(4), [(0, 3)])
    assert found["inside"] == pytest.approx(0.9)
    assert math.isnan(found["outside"])


def test_agreement_is_correlation_over_pairs():
    first = torch.tensor([[1, 0.1, 0.2], [0.1, 1, 0.6], [0.2, 0.6, 1]])
    second = torch.tensor([[9, 0.3, 0.1], [0.3, 9, 0.2], [0.1, 0.2, 9]])  # the diagonal does not count
    expected = torch.corrcoef(torch.tensor([[0.1, 0.2, 0.6], [0.3, 0.1, 0.2]]).double())
    found = agreement([first, second, torch.ones(3, 3)])
    torch.testing.assert_close(found[:2, :2], expected)
    assert found[2].isnan().all()


def test_windows_in_patches_and_by_chance():
    runs = [(0, 1), (2, 5)]
    assert windows_in_patches([(2, 3), (1, 2), (3, 5)], runs)[0] == 2
    # two layers: 4 of 5 places lie within a patch; three layers: 2 of 4
    assert windows_in_patches([(2, 3), (1, 2), (3, 5)], runs)[1] == pytest.approx(2 * 4 / 5 + 2 / 4)
    assert windows_in_patches([], runs) == (0, 0.0)
