"""Blocks of other sizes than their model's: fewer heads and neurons, no attention or no feed-forward network, or a bias
more.

`put` and `cut_out` make them so, module by module, and `settle` lets the configuration say it, or gives the model a
class that can.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from slm_pipeline.models.modeling_pruned import set_heads, set_parameter, stand_in
from slm_pipeline.models.view import ModelView

_SUBLAYERS = ("attention", "mlp")


def changes_shapes(view: ModelView, layer: int, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a block with these in the place of its own parameters (by their names within it) is another size."""
    own = dict(view.layers[layer].named_parameters())
    return any(name not in own or own[name].shape != value.shape for name, value in parameters.items())


def put(block: nn.Module, parameters: Mapping[str, Tensor]) -> list[str]:
    """Put copies of ``parameters`` into a block; one of another shape takes the place of the block's own as it is.

    Returns:
        Names of the projections that had no bias and have one now. `settle` must hear of them.
    """
    own, gained = dict(block.named_parameters()), []
    with torch.no_grad():
        for name, value in parameters.items():
            if name in own and own[name].shape == value.shape:
                own[name].data = value.to(own[name].device, own[name].dtype, copy=True)
                continue
            module, _, kind = name.rpartition(".")
            beside = next(block.get_submodule(module).parameters())
            set_parameter(block.get_submodule(module), kind, value.to(beside.device, beside.dtype))
            if name not in own:
                gained.append(module)
    return gained


def resized(view: ModelView, layer: int, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a block with ``parameters``, of whatever shape, in the place of its own."""
    block = copy.deepcopy(view.layers[layer]).to(view.device_of(layer))
    put(block, parameters)
    if not view.lacks(layer, "attention"):
        output = cast(nn.Linear, block.get_submodule(view.architecture.attention_output))
        heads = output.in_features // view.head_dim
        set_heads(block, heads, heads // view.heads_per_group)
    return block


def cut_out(view: ModelView, layers: Mapping[str, Sequence[int]]) -> None:
    """Remove sublayers (attention, mlp -> layers) for good. `settle` must hear of it."""
    for name, found in layers.items():
        for layer in found:
            for child in view.sublayer(name):
                view.layers[layer].set_submodule(child, stand_in(child, layer))


def settle(view: ModelView, gained: Sequence[Sequence[str]] | None = None) -> None:
    """Let modules and configuration say what the layers have now.

    In the words of the model's own class if they are all alike and it allows them; else layer by layer, and the
    model gets a class of `modeling_pruned`.

    Args:
        gained: for each layer, the projections with a bias that the class does not give them; None: there are none.
    """
    head_dim, per_group, layers = view.head_dim, view.heads_per_group, range(view.num_layers)
    before = getattr(view.config, "layer_sizes", None)
    biases = [[*(before[layer]["biases"] if before else ()), *(gained[layer] if gained else ())] for layer in layers]
    groups, neurons = [*map(view.kv_heads_of, layers)], [*map(view.neurons_of, layers)]
    dense = (view.num_kv_heads, getattr(view.config, view.architecture.intermediate_size))
    alike = len(set(zip(groups, neurons, strict=True))) == 1 and groups[0] > 0 < neurons[0] and not any(biases)
    if alike and (groups[0], neurons[0]) == dense and before is None:
        return
    if alike and view.allows_kv_heads(groups[0]) and before is None:
        setattr(view.config, view.architecture.intermediate_size, neurons[0])
        if groups[0] != dense[0]:
            view.config.head_dim = head_dim
            view.config.num_attention_heads = per_group * groups[0]
            view.config.num_key_value_heads = groups[0]
    else:
        view.become_pruned()
        view.config.layer_sizes = [
            {
                "heads": per_group * groups[layer],
                "key_value_heads": groups[layer],
                "neurons": neurons[layer],
                "absent": [child for part in _SUBLAYERS if view.lacks(layer, part) for child in view.sublayer(part)],
                "shapes": _shapes(view, layer),
                "biases": [*dict.fromkeys(biases[layer])],
            }
            for layer in layers
        ]
    for layer, block in enumerate(view.layers):
        if groups[layer]:
            set_heads(block, per_group * groups[layer], groups[layer])


def _shapes(view: ModelView, layer: int) -> dict[str, list[int]]:
    own = {name for name, _ in view.layers[layer].named_parameters()}
    names = (*view.architecture.projections, *view.architecture.query_key_norms)
    names = tuple(name for name in names if f"{name}.weight" in own)  # not of a sublayer that is missing
    return {name: [*cast(Any, view.layers[layer].get_submodule(name)).weight.shape] for name in names}
