"""One-pass scores as published: all hidden states of a sample, tokens x tokens matrices, all gradients at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slm_pipeline.methods.angular import AngularDistance
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.replaceme import ReplaceMe
from slm_pipeline.methods.shortened import ShortenedTaylor, scored
from slm_pipeline.methods.shortgpt import ShortGPT
from slm_pipeline.methods.streamline import Streamline


def shortgpt(problem: PruningProblem, method: ShortGPT) -> list[int]:
    influence = [0.0] * problem.view.num_layers
    for states in hidden_states(problem):
        for layer, (before, after) in enumerate(zip(states, states[1:], strict=False)):
            influence[layer] += float((1 - token_cosines(before, after)).mean())
    return sorted(method.candidates(len(influence)), key=lambda layer: influence[layer])[: problem.target.remove]


def streamline(problem: PruningProblem, method: Streamline) -> list[int]:
    def distance(before: Tensor, after: Tensor) -> float:
        return 1 - float(token_cosines(before, after).mean())

    return closest_ends(problem, method, distance)


def angular(problem: PruningProblem, method: AngularDistance) -> list[int]:
    def distance(before: Tensor, after: Tensor) -> float:
        return float(torch.cosine_similarity(before[-1].float(), after[-1].float(), dim=0).clamp(-1, 1).arccos())

    return closest_ends(problem, method, distance)


def token_cosines(before: Tensor, after: Tensor) -> Tensor:
    """[length] cosines, out of the product of all tokens with all tokens, as both authors do it."""
    before, after = (torch.nn.functional.normalize(state.float(), dim=-1) for state in (before, after))
    return (before @ after.T).diagonal()


def closest_ends(
    problem: PruningProblem, method: AngularDistance, distance: Callable[[Tensor, Tensor], float]
) -> list[int]:
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
def replaceme(problem: PruningProblem, method: ReplaceMe) -> list[int]:
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


def shortened_taylor(problem: PruningProblem, method: ShortenedTaylor) -> list[int]:
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
