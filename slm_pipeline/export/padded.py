"""A model whose layers differ, as one of the stock class: every layer as wide as the widest, filled up with zeros.

The same function, up to rounding: a neuron of zeros adds nothing; a key-value group whose values and outputs are zeros
adds nothing, wherever it attends; a sublayer that was not there has a last projection of zeros. As large on disk and as
slow as its widest layer, so it is for tools that know no other class.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models import checkpoint
from slm_pipeline.models.architectures import PRUNED
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.plan import Plan, file_of

_ABOUT = "Layers that were narrower, or lacked a sublayer, are filled up with zeros here: the class is a stock one."
_BIAS_SETTINGS = {"attention": "attention_bias", "mlp": "mlp_bias"}  # of all projections of a sublayer at once


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    card: Callable[[str, dict[str, Any]], str],
    plan: Plan | None,
    config: ModelConfig,
) -> None:
    """Write the padded ``model`` with its tokenizer to ``folder``, loaded again and compared before it is there.

    Args:
        card: of the place that loads it and its config.json.
        plan: written beside it.

    Raises:
        UserError: see `pad`; or the logits are not those of ``model``.
    """
    stock = pad(model)
    apart = difference(checkpoint.probe(model), checkpoint.probe(stock))
    if not apart <= checkpoint.TOLERANCE[config.dtype]:
        raise UserError(f"{folder}: the padded model's logits differ by {apart:.2e} (relative): it was not kept")
    about = f"{card(folder.name, stock.config.to_dict())}\n\n{_ABOUT}\n"
    checkpoint.save(stock, tokenizer, folder, card=about, config=config)
    if plan is not None:
        plan.write(file_of(folder))


@torch.no_grad()
def pad(model: Any) -> Any:
    """A new model of the architecture's own class that computes what ``model`` does; on the CPU.

    Raises:
        UserError: it is of such a class already; or it has biases, or query norms over all heads, that this class does
            not allow to be filled up.
    """
    source = ModelView(model)
    config = _stock_config(source)
    stock = transformers.AutoModelForCausalLM.from_config(config, dtype=source.dtype).eval()
    stock.generation_config = model.generation_config
    target = ModelView(stock)
    values, layers = model.state_dict(), f"{source.architecture.decoder}.{source.architecture.layers}."
    for name, parameter in stock.named_parameters():
        if not name.startswith(layers):
            parameter.copy_(values[name])
    for layer in range(target.num_layers):
        _fill(source, target, layer)
    return stock


def _stock_config(view: ModelView) -> Any:
    """The configuration of the stock class, as wide as the widest layer and not wider than it allows."""
    model_type = str(view.config.model_type)
    if not model_type.startswith(PRUNED):
        raise UserError(f"this {model_type} is of its stock class already: nothing is to be padded")
    drop = ("model_type", "architectures", "auto_map", "layer_sizes", "transformers_version")
    settings = {key: value for key, value in view.config.to_dict().items() if key not in drop}
    config = transformers.AutoConfig.for_model(model_type.removeprefix(PRUNED), **settings)
    counts = {*map(view.kv_heads_of, range(view.num_layers))} - {0}
    neurons = max(map(view.neurons_of, range(view.num_layers)))
    widest = max(counts, default=view.num_kv_heads)
    groups = next(count for count in range(widest, view.num_kv_heads + 1) if view.allows_kv_heads(count))
    if view.architecture.query_key_norms and counts - {groups}:
        raise UserError(
            f"the norms of queries and keys of this {model_type.removeprefix(PRUNED)} are as wide as all heads:"
            " heads of zeros would change what they divide by; prune it with method.export=stock"
        )
    if groups != view.num_kv_heads:
        config.head_dim = view.head_dim
        config.num_attention_heads = groups * view.heads_per_group
        config.num_key_value_heads = groups
    if neurons:
        setattr(config, view.architecture.intermediate_size, neurons)
    for name in sorted({name for size in view.config.layer_sizes for name in size["biases"]}):
        setting = _BIAS_SETTINGS["attention" if name.startswith(view.architecture.attention) else "mlp"]
        if not hasattr(config, setting):
            raise UserError(
                f"{name} has a bias here, and the stock class of {model_type.removeprefix(PRUNED)} has none there:"
                " prune it with method.bias=false"
            )
        setattr(config, setting, True)
    return config


def _fill(source: ModelView, target: ModelView, layer: int) -> None:
    """Put a layer's values where they belong, and zeros, or gains of one, where it had none."""
    values = dict(source.layers[layer].named_parameters())
    pieces = {
        (piece.parameter, piece.dim): piece for piece in (*source.attention_slices(layer), *source.mlp_slices(layer))
    }
    padded = {
        (piece.parameter, piece.dim): piece for piece in (*target.attention_slices(layer), *target.mlp_slices(layer))
    }
    for name, parameter in target.layers[layer].named_parameters():
        if name not in values:
            is_gain = "norm" in name.split(".")[-2] and name.endswith("weight")
            parameter.fill_(1 - target.architecture.gain_offset if is_gain else 0)
            continue
        key = next((key for key in pieces if key[0] == name), None)
        if key is None:
            parameter.copy_(values[name])
            continue
        parameter.zero_()
        for own, there in zip(pieces[key].units, padded[key].units, strict=True):
            rows = values[name].index_select(key[1], own.flatten())
            parameter.index_copy_(key[1], there[: len(own)].flatten(), rows)


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Distance of logits, relative to their size."""
    return float((expected - found).norm() / expected.norm())
