"""What a variant of the model is judged by on the calibration text: sums over tokens of something that is never
negative, so that a variant whose sum is too large already can be given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, max_logit_rows

Sums = Callable[[BlockRunner, Sequence[Tensor], Tensor], list[float]]


@dataclass(frozen=True)
class Criterion:
    """How bad a variant is, lower is better.

    Attributes:
        sums: (runner, states, input_ids) -> for each variant the sum over the batch's tokens, >= 0. ``states`` holds
            the variants' last blocks' outputs, [batch, length, d] each; ``runner`` has the dense model's.
        tokens_without: tokens of a sample that add nothing to the sum.
        bound: the same as ``sums``, but cheaper and never above it (but for rounding).
    """

    sums: Sums
    tokens_without: int = 0
    bound: Sums | None = None


def next_token_loss(runner: BlockRunner, states: Sequence[Tensor], input_ids: Tensor) -> list[float]:
    """Negative log-likelihood of the text, in nats."""
    return [runner.loss(state, input_ids) for state in states]


def least_next_token_loss(runner: BlockRunner, states: Sequence[Tensor], input_ids: Tensor) -> list[float]:
    """A little less than what `next_token_loss` is at least, so that rounding cannot put it above."""
    return [(1 - 1e-6) * runner.least_loss(state, input_ids) for state in states]


def angular_distance(runner: BlockRunner, states: Sequence[Tensor], input_ids: Tensor) -> list[float]:
    """arccos(cosine) / pi of a token's final-normed state in the dense model and in the variant, in [0, 1]."""
    cosines = [torch.cosine_similarity(runner.final.float(), runner.finish(s).float(), dim=-1) for s in states]
    return [float(cosine.clamp(-1, 1).arccos().sum(dtype=torch.float64)) / math.pi for cosine in cosines]


def euclidean_distance(runner: BlockRunner, states: Sequence[Tensor], input_ids: Tensor) -> list[float]:
    """Length of the difference of a token's final-normed states."""
    differences = [runner.final.float() - runner.finish(state).float() for state in states]
    return [float(difference.norm(dim=-1).sum(dtype=torch.float64)) for difference in differences]


def jensen_shannon(runner: BlockRunner, states: Sequence[Tensor], input_ids: Tensor) -> list[float]:
    """Jensen-Shannon divergence of the two next-token distributions, in nats, in [0, log 2]."""
    totals = [0.0] * len(states)
    rows = max_logit_rows(runner.view)
    variants = [runner.finish(state).flatten(0, 1).split(rows) for state in states]
    for number, piece in enumerate(runner.final.flatten(0, 1).split(rows)):
        dense = runner.view.logits(piece).float().log_softmax(dim=-1)
        for index, pieces in enumerate(variants):
            pruned = runner.view.logits(pieces[number]).float().log_softmax(dim=-1)
            middle = torch.logaddexp(dense, pruned) - math.log(2)
            divergence = dense.exp() * (dense - middle) + pruned.exp() * (pruned - middle)
            totals[index] += float(divergence.sum(dtype=torch.float64)) / 2
    return totals


@torch.no_grad()
def kl_divergence(runner: BlockRunner, states: Sequence[Tensor], input_ids: Tensor) -> list[float]:
    """Kullback-Leibler divergence of the variant's next-token distribution from the dense model's, in nats."""
    totals = [0.0] * len(states)
    rows = max_logit_rows(runner.view)
    variants = [runner.finish(state).flatten(0, 1).split(rows) for state in states]
    for number, piece in enumerate(runner.final.flatten(0, 1).split(rows)):
        dense = runner.view.logits(piece).float().log_softmax(dim=-1)
        probability = dense.exp()
        for index, pieces in enumerate(variants):
            difference = dense - runner.view.logits(pieces[number]).float().log_softmax(dim=-1)
            totals[index] += float((probability * difference).sum(dim=-1).double().sum())
    return totals


CRITERIA: dict[str, Criterion] = {
    "next_token_loss": Criterion(next_token_loss, tokens_without=1, bound=least_next_token_loss),
    "angular": Criterion(angular_distance),
    "euclidean": Criterion(euclidean_distance),
    "jensen_shannon": Criterion(jensen_shannon),
    "kl_divergence": Criterion(kl_divergence),
}
