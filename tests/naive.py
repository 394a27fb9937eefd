"""Plain, slow versions of what the engine does, with a model of its own and whole forward passes for each candidate."""

from __future__ import annotations

import copy

import torch

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def naive_merge(model, low, high, rule):
    """A copy of ``model`` (Llama) whose layers low..high are one layer; the others' weights are the same tensors."""
    merged = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    layers = model.model.layers
    block = copy.deepcopy(layers[low])
    for name in PROJECTIONS:
        part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        weights = [getattr(getattr(layers[k], part), name).weight.data for k in range(low, high + 1)]
        if rule in ("official", "keep_highest"):
            value = weights[-1]
        elif rule == "base_difference":
            value = weights[0] + sum(weight - weights[0] for weight in weights[1:])
        elif rule == "mean":
            value = sum(weights) / len(weights)
        else:
            value = weights[0]
        getattr(getattr(block, part), name).weight.data = value.clone()
    if rule == "keep_highest":
        block = copy.deepcopy(layers[high])
    merged.model.layers = torch.nn.ModuleList([*merged.model.layers[:low], block, *merged.model.layers[high + 1 :]])
    merged.config.num_hidden_layers = len(merged.model.layers)
    return merged


@torch.no_grad()
def naive_states(model, input_ids):
    return [model.model(input_ids=row[None], use_cache=False).last_hidden_state.flatten() for row in input_ids]


def naive_search(model, input_ids, threshold, rule, protect_first=1, protect_last=1, max_window=None):
    """The published loop: a whole copy and a whole forward pass for each candidate. Gives windows and similarities."""
    reference = naive_states(model, input_ids)
    current, windows, similarities = model, [], {}
    high = len(model.model.layers) - 1 - protect_last
    low = high - 1
    while low >= protect_first:
        candidate = naive_merge(current, low, high, rule)
        states = naive_states(candidate, input_ids)
        similarity = sum(
            float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in zip(reference, states, strict=True)
        ) / len(states)
        fits = max_window is None or high - low + 1 <= max_window
        if low < high and fits:
            similarities[low, high] = similarity
        if fits and similarity >= threshold:
            low -= 1
        elif low + 1 != high:
            current = naive_merge(current, low + 1, high, rule)
            windows.append((low + 1, high))
            high = low
        else:
            high -= 1
            low -= 1
    if high > low + 1:
        windows.append((low + 1, high))
    return windows, similarities
