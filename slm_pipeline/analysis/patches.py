"""Patches: runs of neighbouring layers that are alike, the bright squares along the diagonal of a similarity map.

Every map of a residual network is bright near its diagonal, and any map can be cut into runs. So beside the patches
themselves stands how much more alike their layers are than any two layers at the same distance: `contrast`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Run = tuple[int, int]  # first and last layer, both inclusive


def patches(similarity: Tensor, num_patches: int | None = None) -> list[Run]:
    """Cut the layers into runs, the best cut of all, by dynamic programming.

    Kernel change-point detection (Harchaoui and Cappe 2007; Arlot, Celisse and Harchaoui, JMLR 20 (2019)): a run of m
    layers costs sum_i S_ii - (sum_ij S_ij) / m over its layers, which is (m - 1)(1 - s) if the diagonal is 1 and s is
    the mean similarity of two different layers of the run. Without ``num_patches`` each run costs 1 - the mean
    similarity of any two different layers of the map besides: so a run holds together if its layers are more alike
    than layers are on the whole, and is best taken apart if not. A map of perfect blocks is cut into its blocks; a
    constant one is a single run.

    Args:
        similarity: [L, L], symmetric, of layers only; entries that are not finite count as no similarity (0).
        num_patches: how many runs; None: as many as are cheapest, of equally cheap cuts the one with fewest.

    Returns:
        The runs in order; together they are 0 ... L - 1.

    Raises:
        ValueError: ``num_patches`` is not in 1 ... L.
    """
    depth = len(similarity)
    if num_patches is not None and not 1 <= num_patches <= depth:
        raise ValueError(f"num_patches={num_patches} is not in 1..{depth}")
    values = similarity.double().nan_to_num(0.0, 0.0, 0.0)
    corner = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
    corner[1:, 1:] = values.cumsum(dim=0).cumsum(dim=1)  # sums of all rectangles from (0, 0)
    sums: list[list[float]] = corner.tolist()
    trace: list[float] = [0.0, *values.diagonal().cumsum(dim=0).tolist()]

    def cost(start: int, end: int) -> float:
        total = sums[end][end] - sums[start][end] - sums[end][start] + sums[start][start]
        return trace[end] - trace[start] - total / (end - start)

    best = [[math.inf] * (depth + 1) for _ in range(depth + 1)]  # [runs][end]
    cut = [[0] * (depth + 1) for _ in range(depth + 1)]
    best[0][0] = 0.0
    for count in range(1, depth + 1):
        for end in range(count, depth + 1):
            costs = [best[count - 1][start] + cost(start, end) for start in range(count - 1, end)]
            best[count][end] = min(costs)
            cut[count][end] = count - 1 + costs.index(best[count][end])
    if num_patches is None:
        penalty = 1 - mean_similarity(values)
        totals = [best[count][depth] + penalty * count for count in range(1, depth + 1)]
        least = min(totals)
        num_patches = 1 + next(i for i, total in enumerate(totals) if total <= least + 1e-9)
    runs: list[Run] = []
    end = depth
    for count in range(num_patches, 0, -1):
        runs.append((cut[count][end], end - 1))
        end = cut[count][end]
    return runs[::-1]


def mean_similarity(similarity: Tensor) -> float:
    """Mean of two different layers of a symmetric [L, L] map; 1 for a single layer."""
    depth = len(similarity)
    if depth < 2:
        return 1.0
    return float((similarity.sum() - similarity.trace()) / (depth * (depth - 1)))


def contrast(similarity: Tensor, runs: Sequence[Run]) -> dict[str, float]:
    """How alike the layers of one patch are, and of different ones; entries that are not finite are left out.

    Args:
        similarity: [L, L], symmetric.
        runs: of `patches`.

    Returns:
        ``inside``, ``outside``: mean similarity of two different layers of one patch, of two patches.
        ``beyond_distance``: mean, over the pairs inside, of their similarity minus the mean of all pairs of layers that
        are as far apart. 0 for a map that only depends on that distance: then there is nothing to a patch but that
        neighbours are alike. The patches were chosen on the same map, which makes it somewhat larger than 0.
        NaN where there is no such pair.
    """
    depth = len(similarity)
    values = similarity.double().clone()
    number = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor([last - first + 1 for first, last in runs]))
    first, second = torch.triu_indices(depth, depth, offset=1)
    finite = values[first, second].isfinite()
    first, second = first[finite], second[finite]
    pairs, distance, inside = values[first, second], second - first, number[first] == number[second]
    count = torch.zeros(depth, dtype=torch.float64).index_add_(0, distance, torch.ones_like(pairs))
    at_distance = torch.zeros(depth, dtype=torch.float64).index_add_(0, distance, pairs) / count
    return {
        "inside": float(pairs[inside].mean()),
        "outside": float(pairs[~inside].mean()),
        "beyond_distance": float((pairs - at_distance[distance])[inside].mean()),
    }


def agreement(maps: Sequence[Tensor]) -> Tensor:
    """Pearson correlation, over all pairs of different layers, of every two maps: [maps, maps] float64.

    NaN where it is undefined. High between any two maps that fall off with distance.
    """
    first, second = torch.triu_indices(len(maps[0]), len(maps[0]), offset=1)
    rows = torch.stack([similarity.double()[first, second] for similarity in maps])
    rows = rows[:, rows.isfinite().all(dim=0)]
    rows = rows - rows.mean(dim=1, keepdim=True)
    norms = rows.norm(dim=1)
    norms = torch.where(norms > 1e-12, norms, torch.nan)
    return rows @ rows.T / (norms[:, None] * norms)


def windows_in_patches(windows: Sequence[Run], runs: Sequence[Run]) -> tuple[int, float]:
    """How many of a plan's merged windows lie within one patch, and how many would if they lay anywhere.

    Args:
        windows: of merged layers.
        runs: of `patches`.

    Returns:
        The number, and its mean over all places in the stack for each window, each by itself.
    """
    depth = runs[-1][1] + 1

    def within(first: int, last: int) -> bool:
        return any(start <= first and last <= end for start, end in runs)

    expected = 0.0
    for first, last in windows:
        size = last - first + 1
        expected += sum(within(start, start + size - 1) for start in range(depth - size + 1)) / (depth - size + 1)
    return sum(within(first, last) for first, last in windows), expected
