"""How much the shapes of the layers' state clouds have in common: diffusion maps, and the information between them.

Clouds are states of the same n tokens, in the same order. All arithmetic is in float64; at most a few n x n matrices
are in memory at a time, whatever the number of layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, batches
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.show.progress import ProgressBar

_MAX_BATCH_TOKENS = 2048
_ENTROPY_NEIGHBORS = 50


@torch.no_grad()
def output_clouds(view: ModelView, input_ids: Tensor, num_points: int) -> Tensor:
    """Output states of every layer at evenly spaced tokens: [layers, num_points, d], on the CPU, in the model's dtype.

    Args:
        input_ids: [N, length] int64.
        num_points: at most N x length; each is the middle of an equal share of all tokens, so that samples' first
            tokens, whose states are unlike all others, are not over-represented.
    """
    chosen = torch.zeros(input_ids.numel(), dtype=torch.bool)
    chosen[(2 * torch.arange(num_points) + 1) * input_ids.numel() // (2 * num_points)] = True
    masks = batches(chosen.view(input_ids.shape), _MAX_BATCH_TOKENS)
    taken = []
    for batch, mask in zip(ProgressBar(batches(input_ids, _MAX_BATCH_TOKENS), desc="states"), masks, strict=True):
        states = BlockRunner(view, batch).states[1:]
        taken.append(torch.stack([state[mask.to(state.device)].cpu() for state in states]))
    return torch.cat(taken, dim=1)


def diffusion_map(cloud: Tensor, num_coordinates: int = 2) -> Tensor:
    """The leading coordinates of the points on the manifold that they lie on: [n, d] -> [n, num_coordinates] float64.

    The kernel is exp(-(distance / median distance) ** 0.5); it is divided by both points' densities (row sums) to the
    power 0.5, then its rows are normalised. Coordinates are the eigenvectors of that random walk with the largest
    eigenvalues, without the constant one; their signs are arbitrary.

    Raises:
        UserError: most points are equal, or not finite.
    """
    points = cloud.double()
    distances = torch.cdist(points, points).fill_diagonal_(0)  # rounding alone leaves up to 1e-7 of the norms
    scale = float(distances[~torch.eye(len(points), dtype=torch.bool, device=points.device)].median())
    if not 0 < scale < math.inf:
        raise UserError(f"the median distance between the states of {len(points)} tokens is {scale}: too few differ")
    kernel = (-(distances / scale).sqrt()).exp()
    density = kernel.sum(dim=1).sqrt()
    kernel = kernel / torch.outer(density, density)
    root = kernel.sum(dim=1).sqrt()
    vectors = torch.linalg.eigh(kernel / torch.outer(root, root)).eigenvectors  # symmetric, similar to the random walk
    return (vectors / root[:, None]).flip(1)[:, 1 : num_coordinates + 1]


def ranks(values: Tensor) -> Tensor:
    """Each column's values replaced by their ranks 1 .. n: [n, columns] -> the same in float64."""
    return values.argsort(dim=0, stable=True).argsort(dim=0).double() + 1


def max_norm_distances(points: Tensor) -> Tensor:
    """[n, coordinates] -> [n, n]; a point's distance to itself is infinite, so that it is no neighbour of its own."""
    return torch.cdist(points, points, p=math.inf).fill_diagonal_(math.inf)


def mutual_information(first: Tensor, second: Tensor, num_neighbors: int) -> float:
    """Mutual information in nats of two descriptions of the same n points, each given by its `max_norm_distances`.

    The first estimator of Kraskov et al. (Phys. Rev. E 69, 066138, equation 8). It may be slightly negative.
    """
    radius = _reach(torch.maximum(first, second), num_neighbors)[:, None]
    counts = torch.stack([(each < radius).sum(dim=1) for each in (first, second)])
    whole = _digamma(len(first)) + _digamma(num_neighbors)
    return whole - float((counts + 1).double().digamma().sum(dim=0).mean())


def entropy(distances: Tensor, num_coordinates: int, num_neighbors: int) -> float:
    """Differential entropy in nats of n points with these `max_norm_distances` (Kozachenko and Leonenko, max norm)."""
    radius = _reach(distances, num_neighbors)
    return _digamma(len(distances)) - _digamma(num_neighbors) + num_coordinates * float((2 * radius).log().mean())


def _reach(distances: Tensor, num_neighbors: int) -> Tensor:
    """[n] distance from each point to its ``num_neighbors``-th neighbour."""
    return distances.topk(num_neighbors, dim=1, largest=False).values[:, -1]  # three times as fast as kthvalue


def _digamma(number: int) -> float:
    return float(torch.tensor(number, dtype=torch.float64).digamma())


def similarities(embeddings: list[Tensor], num_neighbors: int) -> Tensor:
    """I(i; j) / sqrt(H_i H_j) of [n, coordinates] embeddings: [layers, layers] float64, at least 0, on the CPU.

    The embeddings are `ranks`: measured in ranks, an entropy is positive. Information is at least 0, whatever its
    estimate says.
    """
    depth = len(embeddings)
    num_points, num_coordinates = embeddings[0].shape
    similarity = torch.zeros(depth, depth, dtype=torch.float64)
    entropies = [
        entropy(max_norm_distances(ranked), num_coordinates, min(_ENTROPY_NEIGHBORS, num_points - 1))
        for ranked in embeddings
    ]
    for i in ProgressBar(range(depth), desc="similarities", unit="layer"):
        own = max_norm_distances(embeddings[i])
        for j in range(i, depth):
            information = mutual_information(own, max_norm_distances(embeddings[j]), num_neighbors)
            similarity[i, j] = similarity[j, i] = max(information, 0) / math.sqrt(entropies[i] * entropies[j])
    return similarity
