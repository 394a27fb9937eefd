"""FinerCut, which has no published code: the plain greedy loop, a whole forward pass of a sample for each candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slm_pipeline.commands.published.removal import passed_over
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.finercut import FinerCut
from slm_pipeline.methods.target import Parameters
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.plan import SUBLAYERS


def angle(view: ModelView, dense: Tensor, pruned: Tensor) -> Tensor:
    return torch.cosine_similarity(dense.float(), pruned.float(), dim=-1).clamp(-1, 1).arccos() / math.pi


def distance(view: ModelView, dense: Tensor, pruned: Tensor) -> Tensor:
    return torch.linalg.vector_norm(dense.float() - pruned.float(), dim=-1)


def divergence(view: ModelView, dense: Tensor, pruned: Tensor) -> Tensor:
    """Jensen-Shannon, of all tokens' whole distributions at once."""
    p, q = (view.head(normed).float().softmax(dim=-1) for normed in (dense, pruned))
    middle = (p + q) / 2
    return (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(dim=-1) / 2


DISTANCES: dict[str, Callable[[ModelView, Tensor, Tensor], Tensor]] = {  # [..., d] final-normed states -> [...]
    "angular": angle,
    "euclidean": distance,
    "jensen_shannon": divergence,
}


@torch.no_grad()
def finercut(problem: PruningProblem, method: FinerCut) -> list[str]:
    """The sublayers in the order of removal, ``LAYER.PART``."""
    view, distance = problem.view, DISTANCES[method.objective]
    rows = [row[None] for row in problem.input_ids.to(view.device)]
    dense = [view.decoder(input_ids=row, use_cache=False).last_hidden_state for row in rows]

    def badness(removed: Sequence[tuple[int, str]]) -> float:
        lost = {layer: [part for at, part in removed if at == layer] for layer, _ in removed}
        gone = [layer for layer, parts in lost.items() if len(parts) == len(SUBLAYERS)]
        total = 0.0
        for row, final in zip(rows, dense, strict=True):
            with passed_over(view, gone), all_lacking(view, {k: v for k, v in lost.items() if k not in gone}):
                normed = view.decoder(input_ids=row, use_cache=False).last_hidden_state
            total += float(distance(view, final, normed).sum())
        return total

    layers = range(method.protect_first, view.num_layers - method.protect_last)
    candidates = [(layer, part) for layer in layers for part in SUBLAYERS]
    removed: list[tuple[int, str]] = []
    target = problem.target

    def enough() -> bool:
        if isinstance(target, Parameters):
            return sum(view.sublayer_parameters(*sublayer) for sublayer in removed) >= target.remove
        return len(removed) == 2 * target.remove

    while not enough():
        values = {candidate: badness([*removed, candidate]) for candidate in candidates}
        best = min(values, key=lambda candidate: values[candidate])
        removed.append(best)
        candidates.remove(best)
    return [f"{layer}.{part}" for layer, part in removed]


@contextmanager
def all_lacking(view: ModelView, lost: dict[int, list[str]]) -> Iterator[None]:
    if not lost:
        yield
        return
    (layer, parts), *rest = lost.items()
    with view.lacking(layer, parts), all_lacking(view, dict(rest)):
        yield
