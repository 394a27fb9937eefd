"""Layers of unequal width, or without a sublayer, become the stock class with zeros, and the same function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import WINDOW, peculiar_model
from plans import narrowing

from slm_pipeline.errors import UserError
from slm_pipeline.export import padded
from slm_pipeline.models.view import ModelView
from slm_pipeline.models.widths import cut_out, settle
from slm_pipeline.surgery.apply import apply

# Layer -> the key-value groups and the neurons that stay; the others keep all.
KEPT = {0: ([1], range(0, 48, 3)), 2: (None, range(40)), 3: ([0], None), 5: ([0], range(1))}
NARROWER = {layer: ([layer % 2], range(5 + layer)) for layer in range(6)}  # none as wide as the dense one
NEURONS = {0: (None, range(16)), 3: (None, range(40))}


def unequal(architecture: str, kept=KEPT, absent=None, biases=None):
    model = peculiar_model(architecture)
    if kept:
        model = apply(narrowing(kept, biases=biases), model)
    if absent:
        cut_out(view := ModelView(model), absent)
        settle(view)
    return model.eval()


ABSENT = {"attention": [0, 4], "mlp": [4, 5]}
CASES = [
    *(
        (name, KEPT, ABSENT)
        for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
    ),
    *((name, KEPT, {}) for name in ("opt", "gpt_neox", "llama")),
    *((name, {}, ABSENT) for name in ("opt", "gpt_neox", "olmo2", "gemma3_text")),
    *((name, NARROWER, {}) for name in ("llama", "gemma3_text")),
    ("olmo2", NEURONS, ABSENT),
]


@torch.no_grad()
def difference(model, stock, input_ids) -> float:
    return padded.difference(*(m(input_ids=input_ids, use_cache=False).logits for m in (model, stock)))


@pytest.mark.parametrize(("architecture", "kept", "absent"), CASES)
def test_the_stock_class_computes_the_same(architecture, kept, absent, input_ids):
    assert input_ids.shape[1] > WINDOW
    model = unequal(architecture, kept, absent)
    stock = padded.pad(model)
    assert type(stock).__name__ == type(model).__name__.removeprefix("Pruned")
    assert stock.config.model_type == architecture
    assert not hasattr(stock.config, "layer_sizes")
    assert difference(model, stock, input_ids) < 1e-6


def test_it_is_as_wide_as_the_widest_layer():
    view = ModelView(padded.pad(unequal("llama", NARROWER)))
    assert view.config.intermediate_size == view.num_neurons == 10
    assert view.config.num_attention_heads == 2
    assert view.num_kv_heads == 1
    assert view.layers[0].mlp.up_proj.weight[5:].abs().max() == 0


def test_heads_stay_as_many_as_the_class_allows(input_ids):
    """OPT and GPT-NeoX have no width of heads of their own, so the number of heads is the dense one's."""
    one_head = {layer: ([1], None) for layer in range(6)}
    model = unequal("opt", one_head)
    stock = padded.pad(model)
    assert stock.config.num_attention_heads == 4
    assert difference(model, stock, input_ids) < 1e-6


CONSTANTS = {0: {"attention": np.full(32, 0.5, np.float32), "mlp": np.linspace(-1, 1, 32, dtype=np.float32)}}


def test_constants_become_biases_where_the_class_can_have_some(input_ids):
    model = unequal("llama", KEPT, biases=CONSTANTS)
    stock = padded.pad(model)
    assert stock.config.attention_bias is True
    assert stock.config.mlp_bias is True
    assert stock.model.layers[1].mlp.down_proj.bias.abs().max() == 0
    assert difference(model, stock, input_ids) < 1e-6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: unequal("qwen2", KEPT, biases=CONSTANTS), "method.bias=false"),
        (lambda: unequal("olmo2", KEPT), "heads of zeros would change"),
        (lambda: unequal("llama", {}), "of its stock class already"),
    ],
)
def test_what_zeros_cannot_fill_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        padded.pad(make())
