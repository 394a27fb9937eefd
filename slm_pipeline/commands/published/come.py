"""CoMe and CoMe-P as published: the whole model runs on all text again after each merge, and CoMe-P copies it for each
split that it tries."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slm_pipeline.commands.published.one_pass import token_cosines
from slm_pipeline.commands.published.removal import mean_loss
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.come import Come, ComePosterior
from slm_pipeline.models.view import ModelView

BATCH = 2  # samples
QUERIES, KEYS_AND_VALUES, NEURONS = ("q_proj",), ("k_proj", "v_proj"), ("gate_proj", "up_proj")  # by rows
OUTPUTS = ("o_proj", "down_proj")  # by columns
ATTENTION = (*QUERIES, *KEYS_AND_VALUES, "o_proj")


def come(problem: PruningProblem, method: Come) -> list[tuple[int, int]]:
    """First and last original layer of what each step merges."""
    if method.fold_norm:
        raise UserError("method.fold_norm=true: the published code has no such option")
    check_projections(problem.view)
    model = copy.deepcopy(problem.view.model)
    groups = [[layer] for layer in range(problem.view.num_layers)]
    merged: list[tuple[int, int]] = []
    while (left := problem.target.remove - (problem.view.num_layers - len(groups))) > 0:
        length = min(method.run_length, left + 1)
        scores = Scores(ModelView(model), problem.input_ids, length, last=method.tokens == "last")
        start = least_turning(scores.distances, groups, length, method)
        members = range(start, start + length)
        if isinstance(method, ComePosterior):
            model = best_split(problem, model, scores, start, method)
        else:
            powers = [scores.influences[member] ** method.power for member in members]
            ratios = [power / sum(powers) for power in powers] if sum(powers) > 0 else [1 / length] * length
            originals = sum(len(groups[member]) for member in members)
            concatenate(model, scores, start, floored(ratios, method.min_largest_share, originals), method.official_gqa)
        whole = [layer for member in members for layer in groups[member]]
        groups[start : start + length] = [whole]
        merged.append((whole[0], whole[-1]))
    return merged


@dataclass
class Scores:
    """What one pass over all text shows of the current model, all hidden states of a batch at once.

    Attributes:
        influences: of each layer, 1 - cosine of what enters and what leaves it, over all tokens.
        distances: of each run of ``length`` layers, the angle between its ends / pi.
        head_inputs, neuron_inputs: for each layer [n], sums over tokens of the absolute inputs of o_proj and down_proj.
    """

    view: ModelView
    input_ids: Tensor
    length: int
    last: bool
    influences: list[float] = field(init=False)
    distances: list[float] = field(init=False)
    head_inputs: dict[int, Tensor] = field(default_factory=dict)
    neuron_inputs: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __post_init__(self) -> None:
        depth = self.view.num_layers
        self.influences, self.distances = [0.0] * depth, [0.0] * (depth - self.length + 1)
        outputs: list[Tensor] = []
        hooks = [self.view.final_norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))]
        for layer, block in enumerate(self.view.layers):
            for name, sums in zip(OUTPUTS, (self.head_inputs, self.neuron_inputs), strict=True):
                hooks.append(projection(block, name).register_forward_pre_hook(self._note(layer, sums)))
        try:
            for batch in self.input_ids.to(self.view.device).split(BATCH):
                found = self.view.model(input_ids=batch, use_cache=False, output_hidden_states=True)
                self._score([*found.hidden_states[:-1], outputs.pop()])
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, layer: int, sums: dict[int, Tensor]) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            added = args[0].flatten(0, -2).float().abs().sum(dim=0)
            sums[layer] = sums[layer] + added if layer in sums else added

        return note

    def _score(self, states: Sequence[Tensor]) -> None:
        for row in range(len(states[0])):
            for layer in range(len(self.influences)):
                cosines = token_cosines(states[layer][row], states[layer + 1][row]).clamp(0, 1)
                self.influences[layer] += float((1 - cosines).sum())
            for start in range(len(self.distances)):
                cosines = token_cosines(states[start][row], states[start + self.length][row]).clamp(0, 1)
                self.distances[start] += float((cosines[-1:] if self.last else cosines).arccos().sum()) / math.pi


def least_turning(distances: Sequence[float], groups: Sequence[Sequence[int]], length: int, method: Come) -> int:
    """Where the run to merge starts; published: with an infinite distance for runs that touch a merged layer."""
    runs = range(method.protect_first, len(groups) - method.protect_last - length + 1)
    untouched = [run for run in runs if all(len(group) == 1 for group in groups[run : run + length])]
    if not untouched and method.repeat == "forbid":
        raise UserError(f"no run of {length} unmerged layers is left at {len(groups)} layers")
    allowed = untouched if untouched and method.repeat != "allow" else list(runs)
    return min(allowed, key=lambda run: distances[run])


def floored(ratios: list[float], floor: float, num_originals: int) -> list[float]:
    largest, least = max(ratios), floor ** (1 / (num_originals - 1))
    if largest >= least:
        return ratios
    top = ratios.index(largest)
    return [least if index == top else ratio * (1 - least) / (1 - largest) for index, ratio in enumerate(ratios)]


def best_split(problem: PruningProblem, model: Any, scores: Scores, start: int, method: ComePosterior) -> Any:
    """Of copies of the model, in which the pair is merged in one share after the other, the one with the least loss."""
    best, least = None, math.inf
    for step in range(method.granularity + 1):
        lower = step / method.granularity
        candidate = copy.deepcopy(model)
        concatenate(candidate, scores, start, [lower, 1 - lower], method.official_gqa)
        if (loss := mean_loss(candidate, problem.input_ids)) < least:
            best, least = candidate, loss
    return best


@torch.no_grad()
def concatenate(model: Any, scores: Scores, start: int, ratios: Sequence[float], tiled: bool) -> None:
    """Make one layer of adjacent ones, in place: each gives its most sensitive key-value groups and neurons."""
    view = ModelView(model)
    blocks = [view.layers[start + offset] for offset in range(len(ratios))]
    groups, dim, repeats = view.num_kv_heads, view.head_dim, view.heads_per_group
    rows: dict[str, list[Tensor]] = {}
    for offset, (block, heads, neurons) in enumerate(
        zip(blocks, counts(groups, ratios), counts(view.num_neurons, ratios), strict=True)
    ):
        u = scores.head_inputs[start + offset] * projection(block, "o_proj").weight.float().abs().sum(dim=0)
        s = scores.neuron_inputs[start + offset] * projection(block, "down_proj").weight.float().abs().sum(dim=0)
        kept = mask_of_highest(u.view(groups, -1).mean(dim=1), heads)
        queries = kept.repeat(repeats) if tiled else kept.repeat_interleave(repeats)
        masks = {
            **dict.fromkeys(QUERIES, queries.repeat_interleave(dim)),
            **dict.fromkeys(KEYS_AND_VALUES, kept.repeat_interleave(dim)),
            **dict.fromkeys(NEURONS, mask_of_highest(s, neurons)),
        }
        masks |= {"o_proj": masks["q_proj"], "down_proj": masks["gate_proj"]}
        for name, mask in masks.items():
            rows.setdefault(name, []).append(mask.nonzero().flatten())
    new: dict[str, Tensor] = {}
    for name, _ in blocks[0].named_parameters():
        values = [block.get_parameter(name) for block in blocks]
        module, kind = name.split(".")[-2:]
        if module in OUTPUTS and kind == "weight":
            new[name] = torch.cat([value[:, row] for value, row in zip(values, rows[module], strict=True)], dim=1)
        elif module in rows and module not in OUTPUTS:
            new[name] = torch.cat([value[row] for value, row in zip(values, rows[module], strict=True)])
        else:
            weights = [1 / len(values)] * len(values) if name in view.norm_names(start) else ratios
            parts = [weight * value.float() for weight, value in zip(weights, values, strict=True)]
            new[name] = torch.stack(parts).sum(dim=0)
    for name, value in new.items():
        blocks[0].get_parameter(name).copy_(value)
    kept_layers = [layer for layer in range(view.num_layers) if not start < layer < start + len(ratios)]
    view.rebuild([view.layers[layer] for layer in kept_layers], kept_layers)


def counts(total: int, ratios: Sequence[float]) -> list[int]:
    """Units that each layer gives; the largest share takes what rounding leaves."""
    numbers = [math.floor(total * ratio) for ratio in ratios]
    numbers[list(ratios).index(max(ratios))] += total - sum(numbers)
    return numbers


def mask_of_highest(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask


def projection(block: nn.Module, name: str) -> Any:
    return block.get_submodule(f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}")


def check_projections(view: ModelView) -> None:
    """Raise `UserError` for other blocks than those that the published code has modelling files for."""
    present = {name.split(".")[-2] for name in view.matrix_names(0)}
    if present != {*ATTENTION, *NEURONS, "down_proj"}:
        raise UserError(
            f"the published loop of CoMe knows blocks as those of Llama, Mistral and Qwen, not {view.config.model_type}"
        )
