"""Causal language models whose layers differ: some have no attention or no feed-forward network, or fewer heads or
neurons than others.

A checkpoint that needs it carries a copy of this file: it imports nothing but torch and transformers, and
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` runs it. Its model type is unknown to
transformers, so that a plain load is an error instead of a model with freshly drawn weights.

For every architecture X the module has ``PrunedXForCausalLM`` and ``PrunedXConfig``, made when asked for. The
configuration's ``layer_sizes`` has an entry for each layer: its numbers of ``heads``, ``key_value_heads`` and
``neurons``, 0 of a sublayer that is missing; the children that are ``absent`` with it; the ``shapes`` of the weights
that are there; and the ``biases`` that only this model has; all by the names of modules within the layer.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


class NoAttention(nn.Module):
    """Adds nothing to the residual stream.

    It keeps its slot in the key-value cache, with one number per token, because a cache tells how long a text is by
    its first layer.
    """

    is_sliding = False  # transformers 4 asks Gemma 3's

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            slot = hidden_states[:, None, :, :1]
            cache.update(slot, slot, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def stand_in(child: str, layer_idx: int) -> nn.Module:
    """What takes the place of a layer's ``child`` that is absent."""
    if "norm" in child or child == "fc1":  # fc1, fc2: where the feed-forward network is no module of its own
        return nn.Identity()
    return NoAttention(layer_idx) if "att" in child else NoFeedForward()


class _LayerConfig:
    """The model's configuration, with one layer's own numbers of heads."""

    def __init__(self, shared: Any, heads: int, key_value_heads: int):
        self.shared, self.num_attention_heads, self.num_key_value_heads = shared, heads, key_value_heads

    def __getattr__(self, name: str) -> Any:
        if name == "shared" or name.startswith("__"):  # asked for by copies of this object that are not filled yet
            raise AttributeError(name)
        return getattr(self.shared, name)


def set_heads(layer: nn.Module, heads: int, key_value_heads: int) -> None:
    """Tell the parts of a layer that ask how many heads it has."""
    counts = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    module: Any
    for module in layer.modules():
        for name in counts.keys() & vars(module).keys():
            setattr(module, name, counts[name])
        shared = getattr(module, "config", None)
        shared = getattr(shared, "shared", shared)
        if shared is not None:
            alike = getattr(shared, "num_attention_heads", heads) == heads
            module.config = shared if alike else _LayerConfig(shared, heads, key_value_heads)


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value``, of whatever shape, in the place of a module's weight or bias."""
    setattr(module, name, nn.Parameter(value))
    if isinstance(module, nn.Linear) and name == "weight":
        module.out_features, module.in_features = value.shape


def resize(layer: nn.Module, index: int, size: dict[str, Any]) -> None:
    """Make layer number ``index`` what its entry of ``layer_sizes`` says; its parameters are not filled."""
    for child in size["absent"]:
        layer.set_submodule(child, stand_in(child, index))
    for name, shape in size["shapes"].items():
        module: Any = layer.get_submodule(name)
        set_parameter(module, "weight", module.weight.new_empty(shape))
        if getattr(module, "bias", None) is not None or name in size["biases"]:
            set_parameter(module, "bias", module.weight.new_empty(shape[0]))
    if size["heads"]:
        set_heads(layer, size["heads"], size["key_value_heads"])


def layer_sizes_of_before(config: Any) -> list[dict[str, Any]]:
    """``layer_sizes`` of a configuration that says the same in two: ``absent``, name of a layer's child -> indices of
    the layers without it, and ``widths``, without ``neurons`` and without what is absent."""
    absent, heads = getattr(config, "absent", {}), config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    alike = {"heads": heads, "key_value_heads": groups, "shapes": {}, "biases": []}
    widths = getattr(config, "widths", None) or [alike] * config.num_hidden_layers
    sizes = []
    for layer, width in enumerate(widths):
        gone = [child for child, layers in absent.items() if layer in layers]
        shapes = {name: shape for name, shape in width["shapes"].items() if not name.startswith(tuple(gone))}
        matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and "att" not in name]
        neurons = [rows * columns // config.hidden_size for rows, columns in matrices]  # of a fused projection twice
        dense = getattr(config, "ffn_dim", None) or config.intermediate_size
        sizes.append({**width, "neurons": min(neurons, default=dense), "shapes": shapes, "absent": gone})
        for child in gone:
            sizes[-1] |= {"heads": 0, "key_value_heads": 0} if child in ("self_attn", "attention") else {}
            sizes[-1] |= {"neurons": 0} if child in ("mlp", "fc2") else {}
    return sizes


class _Pruned:
    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the architecture's own class comes next
        if hasattr(self, "embed_out"):  # GPT-NeoX's head in transformers 4, which would draw its weights anew
            raise ImportError("a GPT-NeoX checkpoint whose layers differ needs transformers 5 or later")
        modules = self.modules()  # type: ignore[attr-defined]
        layers = next(module for module in modules if isinstance(module, nn.ModuleList))  # it has no other list
        if not hasattr(config, "layer_sizes"):
            config.layer_sizes = layer_sizes_of_before(config)
            for name in {"absent", "widths"} & vars(config).keys():
                delattr(config, name)
        for index, size in enumerate(config.layer_sizes):
            resize(layers[index], index, size)


def __getattr__(name: str) -> Any:
    """``PrunedXForCausalLM`` or ``PrunedXConfig`` for an architecture X of transformers."""
    base: Any = getattr(transformers, name.removeprefix("Pruned"), None)
    if not name.startswith("Pruned") or not isinstance(base, type):
        raise AttributeError(name)
    if issubclass(base, transformers.PretrainedConfig):
        made = type(name, (base,), {"model_type": f"pruned_{base.model_type}", "__module__": __name__})
    else:
        config_class = pruned_config_class(base)
        made = type(name, (_Pruned, base), {"config_class": config_class, "__module__": __name__})
    globals()[name] = made  # from now on this is the class of that name
    return made


def pruned_config_class(base: Any) -> Any:
    """The configuration class that goes with a pruned model of class ``base``."""
    name = f"Pruned{base.config_class.__name__}"
    return globals()[name] if name in globals() else __getattr__(name)
