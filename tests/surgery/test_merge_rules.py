"""What each merge rule does to the parameters, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import random_source

from slm_pipeline.errors import UserError
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.merge_rules import merge


def filled_model(architecture="qwen3"):
    """Layer i's parameters are all i + 1; qwen3 has q/k norms, qwen2 has projection biases."""
    model, _ = load_dense(random_source(architecture))
    view = ModelView(model)
    with torch.no_grad():
        for index, layer in enumerate(view.layers):
            for parameter in layer.parameters():
                parameter.fill_(index + 1)
    return view


def values(view, low, high, rule):
    """Parameter name -> its value in the merged block."""
    merged = merge(view, [Block(layer) for layer in range(low, high + 1)], rule)
    own = {name: float(value.detach().flatten()[0]) for name, value in view.layers[merged.body].named_parameters()}
    return own | {name: float(value.flatten()[0]) for name, value in merged.replaced.items()}


@pytest.mark.parametrize(
    ("rule", "projections", "norms", "others"),
    [  # window 1..3, so values 2, 3, 4
        ("official", 4, 2, 4),
        ("base_difference", 2 + (3 - 2) + (4 - 2), 2, 2),
        ("mean", 3, 2, 2),
        ("keep_lowest", 2, 2, 2),
        ("keep_highest", 4, 4, 4),
    ],
)
@pytest.mark.parametrize(
    ("architecture", "other"), [("qwen3", "self_attn.q_norm.weight"), ("qwen2", "self_attn.k_proj.bias")]
)
def test_rules(architecture, other, rule, projections, norms, others):
    found = values(filled_model(architecture), 1, 3, rule)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert found[f"self_attn.{name}.weight"] == projections
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert found[f"mlp.{name}.weight"] == projections
    assert found["input_layernorm.weight"] == found["post_attention_layernorm.weight"] == norms
    assert found[other] == others


def test_official_and_base_difference_agree_on_pairs_only():
    view = filled_model()
    assert (
        values(view, 2, 3, "official")["mlp.up_proj.weight"]
        == values(view, 2, 3, "base_difference")["mlp.up_proj.weight"]
    )
    assert (
        values(view, 1, 3, "official")["mlp.up_proj.weight"]
        != values(view, 1, 3, "base_difference")["mlp.up_proj.weight"]
    )


def test_official_is_bit_for_bit():
    model, _ = load_dense(random_source())
    view = ModelView(model)
    merged = merge(view, [Block(layer) for layer in range(1, 5)], "official")
    assert merged.body == 4
    assert set(merged.replaced) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert all(torch.equal(value, view.layers[1].get_parameter(name)) for name, value in merged.replaced.items())


def test_unknown_rule():
    with pytest.raises(UserError, match="method.merge_rule='average' is not one of"):
        merge(filled_model(), [Block(1), Block(2)], "average")
