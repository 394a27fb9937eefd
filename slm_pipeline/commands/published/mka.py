"""MKA as published: the whole model on each sample once for each layer, all entropies anew for each pair of layers.

The published code goes on to merge nothing (`slm_pipeline.methods.mka`); here the pairs are merged that the method
would choose.
Its clouds are those of the method: true outputs, at evenly spaced tokens, the kernel's scale from the cloud.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slm_pipeline.commands.published.one_pass import hidden_states
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.mka import Mka

ENTROPY_NEIGHBORS = 50


def mka(problem: PruningProblem, method: Mka) -> list[tuple[int, int]] | list[int]:
    """First and last original layer of what each step merges; with ``official`` the layers that go."""
    depth = problem.view.num_layers
    coordinates = [ranked(diffusion(cloud(problem, method, layer))) for layer in range(depth)]
    similarity = [
        [bottleneck(own, other, method.num_neighbors) if j > i else 0.0 for j, other in enumerate(coordinates)]
        for i, own in enumerate(coordinates)
    ]
    candidates = method.candidates(depth)
    if method.official:
        return candidates[::-1][: problem.target.remove]
    lower = candidates[:-1]
    if method.pairs == "similar":
        lower = sorted(lower, key=lambda layer: -similarity[layer][layer + 1])
    else:
        lower.reverse()
    groups = [[layer] for layer in range(depth)]
    merged = []
    for layer in lower[: problem.target.remove]:
        position = next(index for index, group in enumerate(groups) if group[-1] == layer)
        groups[position : position + 2] = [groups[position] + groups[position + 1]]
        merged.append((groups[position][0], groups[position][-1]))
    return merged


def cloud(problem: PruningProblem, method: Mka, layer: int) -> Tensor:
    """[points, d] float64: of all layers' states on all samples, those of one."""
    states = torch.cat([found[layer + 1] for found in hidden_states(problem)])
    number = min(method.num_points, len(states))
    chosen = (2 * torch.arange(number, device=states.device) + 1) * len(states) // (2 * number)
    return states[chosen].double()


def diffusion(points: Tensor) -> Tensor:
    """[n, d] -> [n, 2]: a dense kernel and its singular vectors."""
    distances = torch.stack([(points - point).norm(dim=-1) for point in points])
    others = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    kernel = (-(distances / distances[others].median()).sqrt()).exp()
    density = kernel.sum(dim=1).sqrt()
    kernel = kernel / (density[:, None] * density[None])
    root = kernel.sum(dim=1).sqrt()
    vectors, _, _ = torch.linalg.svd(kernel / (root[:, None] * root[None]))
    return (vectors / root[:, None])[:, 1:3]


def ranked(values: Tensor) -> Tensor:
    return values.argsort(dim=0, stable=True).argsort(dim=0).double() + 1


def bottleneck(first: Tensor, second: Tensor, neighbors: int) -> float:
    """Mutual information over the root of the entropies, each from the nearest neighbours of all points."""
    own, other = (torch.cdist(points, points, p=math.inf) for points in (first, second))
    for distances in (own, other):
        distances.fill_diagonal_(math.inf)
    radius = torch.maximum(own, other).sort(dim=1).values[:, neighbors - 1, None]
    counts = torch.stack([(own < radius).sum(dim=1), (other < radius).sum(dim=1)]).double() + 1
    information = digamma(len(first)) + digamma(neighbors) - float(counts.digamma().sum(dim=0).mean())
    return max(information, 0) / math.sqrt(entropy(own, first.shape[1]) * entropy(other, second.shape[1]))


def entropy(distances: Tensor, num_coordinates: int) -> float:
    neighbors = min(ENTROPY_NEIGHBORS, len(distances) - 1)
    radius = distances.sort(dim=1).values[:, neighbors - 1]
    return digamma(len(distances)) - digamma(neighbors) + num_coordinates * float((2 * radius).log().mean())


def digamma(number: int) -> float:
    return float(torch.tensor(number, dtype=torch.float64).digamma())
