"""The searches as their authors run them, to be measured beside ours.

Faithful in their cost (whole-model copies, whole forward passes, one sample at a time, tokens x tokens matrices), not
in their faults: similarities are in float32, every layer is scored on its true output, the configuration is that of
our method. So both sides decide on the same grounds and their decisions can be compared.

Each function takes the problem and the method's options and returns its decision: layers in the order of removal, or
windows that are merged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from slm_pipeline.engine.criteria import CRITERIA
from slm_pipeline.engine.progressive import ProgressiveStack
from slm_pipeline.errors import UserError
from slm_pipeline.methods.angular import AngularDistance
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.come import Come, ComePosterior, shares
from slm_pipeline.methods.finercut import FinerCut
from slm_pipeline.methods.laco import Laco
from slm_pipeline.methods.replaceme import ReplaceMe
from slm_pipeline.methods.shortened import ShortenedPerplexity, ShortenedTaylor, scored
from slm_pipeline.methods.shortgpt import ShortGPT
from slm_pipeline.methods.sleb import Sleb
from slm_pipeline.methods.slm import SlidingLayerMerging
from slm_pipeline.methods.streamline import Streamline
from slm_pipeline.methods.target import Floor, Parameters
from slm_pipeline.methods.threshold import ThresholdMerging
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.merge_rules import merge
from slm_pipeline.surgery.plan import SUBLAYERS

Decision = list[Any]
Window = tuple[int, int]


# SLM and LaCo: a copy of the model and a whole forward pass for each candidate.


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


def slm(problem: PruningProblem, method: SlidingLayerMerging) -> Decision:
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


def laco(problem: PruningProblem, method: Laco) -> Decision:
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


def by_threshold(problem: PruningProblem, one_pass: Callable[[float, int | None], list[Window]]) -> Decision:
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


# Removal by loss: a whole forward pass of each sample for each candidate.


def sleb(problem: PruningProblem, method: Sleb) -> Decision:
    candidates = method.candidates(problem.view.num_layers)
    removed: list[int] = []
    for _ in range(problem.target.remove):
        losses = {layer: loss_without(problem, [*removed, layer]) for layer in candidates}
        best = min(losses, key=lambda layer: losses[layer])
        removed.append(best)
        candidates.remove(best)
    return removed


def shortened_ppl(problem: PruningProblem, method: ShortenedPerplexity) -> Decision:
    losses = {layer: loss_without(problem, [layer]) for layer in method.candidates(problem.view.num_layers)}
    return sorted(losses, key=lambda layer: losses[layer])[: problem.target.remove]


@torch.no_grad()
def loss_without(problem: PruningProblem, layers: Sequence[int]) -> float:
    """Mean next-token loss, sample by sample, by the model's own forward pass with some blocks passed over."""
    model = problem.view.model
    with passed_over(problem.view, layers):
        rows = problem.input_ids.to(problem.view.device)
        return sum(float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in rows) / len(
            rows
        )


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


@torch.no_grad()
def finercut(problem: PruningProblem, method: FinerCut) -> Decision:
    """There is no published code: the plain greedy loop."""
    view, sums = problem.view, CRITERIA[method.objective].sums
    rows = [row[None] for row in problem.input_ids.to(view.device)]
    dense = [view.decoder(input_ids=row, use_cache=False).last_hidden_state for row in rows]

    def badness(removed: Sequence[tuple[int, str]]) -> float:
        lost = {layer: [part for at, part in removed if at == layer] for layer, _ in removed}
        gone = [layer for layer, parts in lost.items() if len(parts) == len(SUBLAYERS)]
        total = 0.0
        for row, final in zip(rows, dense, strict=True):
            with passed_over(view, gone), all_lacking(view, {k: v for k, v in lost.items() if k not in gone}):
                normed = view.decoder(input_ids=row, use_cache=False).last_hidden_state
            total += sums(cast(Any, _Finished(view, final)), [normed], row)[0]
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


class _Finished:
    """As much of a `BlockRunner` as a criterion reads, for states that have passed the final norm already."""

    def __init__(self, view: ModelView, final: Tensor):
        self.view = view
        self.final = final

    @staticmethod
    def finish(normed: Tensor) -> Tensor:
        return normed


@contextmanager
def all_lacking(view: ModelView, lost: dict[int, list[str]]) -> Iterator[None]:
    if not lost:
        yield
        return
    (layer, parts), *rest = lost.items()
    with view.lacking(layer, parts), all_lacking(view, dict(rest)):
        yield


# One-pass scores: all hidden states of a sample, tokens x tokens matrices.


def shortgpt(problem: PruningProblem, method: ShortGPT) -> Decision:
    influence = [0.0] * problem.view.num_layers
    for states in hidden_states(problem):
        for layer, (before, after) in enumerate(zip(states, states[1:], strict=False)):
            influence[layer] += float((1 - token_cosines(before, after)).mean())
    return sorted(method.candidates(len(influence)), key=lambda layer: influence[layer])[: problem.target.remove]


def streamline(problem: PruningProblem, method: Streamline) -> Decision:
    def distance(before: Tensor, after: Tensor) -> float:
        return 1 - float(token_cosines(before, after).mean())

    return closest_ends(problem, method, distance)


def angular(problem: PruningProblem, method: AngularDistance) -> Decision:
    def distance(before: Tensor, after: Tensor) -> float:
        return float(torch.cosine_similarity(before[-1].float(), after[-1].float(), dim=0).clamp(-1, 1).arccos())

    return closest_ends(problem, method, distance)


def token_cosines(before: Tensor, after: Tensor) -> Tensor:
    """[length] cosines, out of the product of all tokens with all tokens, as both authors do it."""
    before, after = (torch.nn.functional.normalize(state.float(), dim=-1) for state in (before, after))
    return (before @ after.T).diagonal()


def closest_ends(
    problem: PruningProblem, method: AngularDistance, distance: Callable[[Tensor, Tensor], float]
) -> Decision:
    size = problem.target.remove
    starts = range(method.protect_first, problem.view.num_layers - method.protect_last - size + 1)
    totals = dict.fromkeys(starts, 0.0)
    for states in hidden_states(problem):
        for start in starts:
            totals[start] += distance(states[start], states[start + size])
    best = min(totals, key=lambda start: totals[start])
    return list(range(best, best + size))


@torch.no_grad()
def hidden_states(problem: PruningProblem) -> Iterator[list[Tensor]]:
    """For one sample after the other what enters each block and what leaves the last, [length, d] each."""
    view = problem.view
    last: list[Tensor] = []
    hook = view.final_norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    try:
        for row in problem.input_ids.to(view.device):
            output = view.model(input_ids=row[None], use_cache=False, output_hidden_states=True)
            yield [state[0] for state in (*output.hidden_states[:-1], last.pop())]
    finally:
        hook.remove()


@torch.no_grad()
def replaceme(problem: PruningProblem, method: ReplaceMe) -> Decision:
    """All activations of all tokens in memory, then least squares. The decision compared is the block."""
    view = problem.view
    removed = angular(problem, method)
    outputs: list[Tensor] = []
    hook = view.mlp_output(removed[0] - 1).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        states = [(each[removed[0]], each[removed[-1] + 1]) for each in hidden_states(problem)]
    finally:
        hook.remove()
    output = torch.cat([part.flatten(0, -2) for part in outputs]).double()
    before, after = (torch.cat(parts).double() for parts in zip(*states, strict=True))
    torch.linalg.lstsq(output, after - before + output)
    return removed


def shortened_taylor(problem: PruningProblem, method: ShortenedTaylor) -> Decision:
    """All gradients at once, as autograd leaves them."""
    view = problem.view
    ids = problem.input_ids.to(view.device)
    with torch.enable_grad():
        view.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    salience = [
        sum(float((p.detach().float() * p.grad.float()).abs().sum()) for p in scored(view, layer) if p.grad is not None)
        for layer in range(view.num_layers)
    ]
    view.model.zero_grad(set_to_none=True)
    return sorted(method.candidates(view.num_layers), key=lambda layer: salience[layer])[: problem.target.remove]


# CoMe: the whole model again after each merge.


def come(problem: PruningProblem, method: Come) -> Decision:
    model = copy.deepcopy(problem.view.model)
    groups = [[layer] for layer in range(problem.view.num_layers)]
    merged: Decision = []
    for _ in range(problem.target.remove):
        stack = ProgressiveStack(ModelView(model), problem.input_ids)
        position, _ = method.least_turning_run(stack, groups, 2)
        block = _pair(problem, method, stack, position)
        _write(model, position, block)
        merged.append((groups[position][0], groups[position + 1][-1]))
        groups[position : position + 2] = [groups[position] + groups[position + 1]]
    return merged


def _pair(problem: PruningProblem, method: Come, stack: ProgressiveStack, position: int) -> Block:
    if not isinstance(method, ComePosterior):
        chosen = shares([score.influence for score in stack.scores[position : position + 2]], method.power)
        return method.concatenate(stack, position, 2, chosen)[0]
    found: list[tuple[float, Block]] = []
    for step in range(method.granularity + 1):
        lower = step / method.granularity
        block = method.concatenate(stack, position, 2, [lower, 1 - lower])[0]
        candidate = copy.deepcopy(stack.view.model)
        _write(candidate, position, block)
        whole = PruningProblem(**{**vars(problem), "view": ModelView(candidate)})
        found.append((loss_without(whole, []), block))
    return min(found, key=lambda item: item[0])[1]


def _write(model: Any, position: int, block: Block) -> None:
    """Make layers position and position + 1 of a model one."""
    view = ModelView(model)
    for name, value in block.replaced.items():
        view.layers[position].get_parameter(name).data.copy_(value)
    kept = [layer for layer in range(view.num_layers) if layer != position + 1]
    view.rebuild([view.layers[layer] for layer in kept], kept)


LOOPS: dict[type, Callable[[PruningProblem, Any], Decision]] = {
    SlidingLayerMerging: slm,
    Laco: laco,
    Sleb: sleb,
    ShortenedPerplexity: shortened_ppl,
    ShortenedTaylor: shortened_taylor,
    FinerCut: finercut,
    ShortGPT: shortgpt,
    AngularDistance: angular,
    Streamline: streamline,
    ReplaceMe: replaceme,
    Come: come,
    ComePosterior: come,
}


def decision_of(method: Any, plan: Any) -> Decision:
    """What a plan decided, in the form that the published loop gives."""
    if isinstance(method, FinerCut):
        return [found["removed"] for found in plan.scores["rounds"]]
    if isinstance(method, (ThresholdMerging, Come)):
        return [(min(op.layers), max(op.layers)) for op in plan.ops]
    return list(plan.scores["order"])


READ_STATISTICS = (ShortGPT, AngularDistance)  # Streamline and ReplaceMe are AngularDistances
