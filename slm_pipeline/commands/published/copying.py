"""SLM and LaCo as published: a copy of the whole model and a whole forward pass for each candidate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.laco import Laco
from slm_pipeline.methods.slm import SlidingLayerMerging
from slm_pipeline.methods.target import Floor
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.merge_rules import merge

Window = tuple[int, int]


class CopyingSearch:
    """Similarity of merged models to the dense one, each of them a copy of the whole model.

    Args:
        rule: merge rule, see `slm_pipeline.surgery.merge_rules`.
    """

    def __init__(self, problem: PruningProblem, rule: str):
        self.model = problem.view.model
        self.num_layers = problem.view.num_layers
        self.rule = rule
        self._input_ids = problem.input_ids.to(problem.view.device)
        self._reference = self._states(self.model)

    def merged(self, model: Any, low: int, high: int) -> Any:
        """A copy of ``model`` in which its layers low .. high are one."""
        candidate = ModelView(copy.deepcopy(model))
        block = merge(candidate, [Block(layer) for layer in range(low, high + 1)], self.rule)
        body = candidate.layers[block.body]
        for name, value in block.replaced.items():
            body.get_parameter(name).data = value.clone()
        layers = list(candidate.layers)
        sources = [*range(low), block.body, *range(high + 1, len(layers))]
        candidate.rebuild([*layers[:low], body, *layers[high + 1 :]], sources)
        return candidate.model

    def similarity(self, model: Any) -> float:
        pairs = zip(self._reference, self._states(model), strict=True)
        values = [torch.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0) for a, b in pairs]
        return float(torch.stack(values).mean())

    @torch.no_grad()
    def _states(self, model: Any) -> list[Tensor]:
        decoder = ModelView(model).decoder
        return [decoder(input_ids=row[None], use_cache=False).last_hidden_state.cpu() for row in self._input_ids]


def slm(problem: PruningProblem, method: SlidingLayerMerging) -> list[Window]:
    """The published pass; the window that is open at the end is merged, and protected layers are respected."""
    search = CopyingSearch(problem, method.merge_rule)
    return by_threshold(problem, lambda threshold, target: slide(search, method, threshold, target))


def slide(search: CopyingSearch, method: SlidingLayerMerging, threshold: float, num_remove: int | None) -> list[Window]:
    current = search.model
    windows: list[Window] = []
    high = search.num_layers - 1 - method.protect_last
    low = high - 1
    limit = method.max_window or search.num_layers
    while low >= method.protect_first:
        fits = high - low + 1 <= limit
        if fits and search.similarity(search.merged(current, low, high)) >= threshold:
            low -= 1
            if removed_by(windows) + high - (low + 1) == num_remove:
                break
        elif low + 1 != high:
            current = search.merged(current, low + 1, high)
            windows.append((low + 1, high))
            high = low
        else:
            high -= 1
            low -= 1
    return [*windows, (low + 1, high)] if high > low + 1 else windows


def laco(problem: PruningProblem, method: Laco) -> list[Window]:
    search = CopyingSearch(problem, method.merge_rule)
    return by_threshold(problem, lambda threshold, target: collapse(search, method, threshold, target))


def collapse(search: CopyingSearch, method: Laco, threshold: float, num_remove: int | None) -> list[Window]:
    current = search.model
    groups = [(layer, layer) for layer in range(search.num_layers)]
    windows: list[Window] = []
    highest = search.num_layers - 1 if method.highest is None else method.highest
    layer = highest - method.num_merged
    while layer >= method.lowest:
        count = min(method.num_merged - 1, len(groups) - layer - 1)
        if num_remove is not None:
            count = min(count, num_remove - (search.num_layers - len(groups)))
        candidate = search.merged(current, layer, layer + count)
        if search.similarity(candidate) >= threshold:
            current = candidate
            windows.append((groups[layer][0], groups[layer + count][1]))
            groups[layer : layer + count + 1] = windows[-1:]
            if search.num_layers - len(groups) == num_remove:
                break
            layer -= method.interval
            if layer >= len(groups):
                layer = len(groups) - 1 - method.num_merged
        else:
            layer -= 1
    return windows


def removed_by(windows: Sequence[Window]) -> int:
    """Layers fewer after merging windows; one that lies within a later one is merged anew with it."""
    outermost = [w for w in windows if not any(o != w and o[0] <= w[0] and w[1] <= o[1] for o in windows)]
    return sum(high - low for low, high in outermost)


def by_threshold(problem: PruningProblem, one_pass: Callable[[float, int | None], list[Window]]) -> list[Window]:
    """One pass at a given threshold; for ``auto`` ten halvings of [0, 1], as a user of the published code would."""
    if isinstance(problem.target, Floor):
        return one_pass(problem.target.similarity, None)
    num_remove = problem.target.remove
    low, high, best = 0.0, 1.0, None
    for _ in range(10):
        middle = (low + high) / 2
        windows = one_pass(middle, num_remove)
        low, high = (middle, high) if removed_by(windows) >= num_remove else (low, middle)
        best = windows if removed_by(windows) == num_remove else best
    if best is None:
        raise UserError(f"ten halvings met no threshold that removes {num_remove} layers")
    return best
