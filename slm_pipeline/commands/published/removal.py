"""SLEB and Shortened LLaMA's perplexity as published: a whole forward pass of each sample for each candidate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.shortened import ShortenedPerplexity
from slm_pipeline.methods.sleb import Sleb
from slm_pipeline.models.view import ModelView


def sleb(problem: PruningProblem, method: Sleb) -> list[int]:
    candidates = method.candidates(problem.view.num_layers)
    removed: list[int] = []
    for _ in range(problem.target.remove):
        losses = {layer: loss_without(problem, [*removed, layer]) for layer in candidates}
        best = min(losses, key=lambda layer: losses[layer])
        removed.append(best)
        candidates.remove(best)
    return removed


def shortened_ppl(problem: PruningProblem, method: ShortenedPerplexity) -> list[int]:
    losses = {layer: loss_without(problem, [layer]) for layer in method.candidates(problem.view.num_layers)}
    return sorted(losses, key=lambda layer: losses[layer])[: problem.target.remove]


def loss_without(problem: PruningProblem, layers: Sequence[int]) -> float:
    """`mean_loss` with some blocks passed over."""
    with passed_over(problem.view, layers):
        return mean_loss(problem.view.model, problem.input_ids)


@torch.no_grad()
def mean_loss(model: Any, input_ids: Tensor) -> float:
    """Mean next-token loss, sample by sample, by the model's own forward pass."""
    rows = input_ids.to(model.device)
    return sum(float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in rows) / len(rows)


class PassedOver(nn.Module):
    """Stands in for a block that is switched off."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


@contextmanager
def passed_over(view: ModelView, layers: Sequence[int]) -> Iterator[None]:
    present = {layer: view.layers[layer] for layer in layers}
    try:
        for layer in layers:
            view.layers[layer] = PassedOver()
        yield
    finally:
        for layer, block in present.items():
            view.layers[layer] = block
