"""Concatenation of units: what goes where, and that a layer cut in two and put together again is itself."""

from __future__ import annotations

import pytest
import torch
from conftest import peculiar_model, random_source

from slm_pipeline.engine.blocks import BlockRunner
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.concatenate import concatenate, folded


def two_parts(num_units, first):
    order = torch.randperm(num_units, generator=torch.Generator().manual_seed(3))
    return [order[:first].sort().values, order[first:].sort().values]


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])  # multi-head, grouped-query, multi-query
def test_a_layer_cut_in_two_and_put_together_is_itself(architecture, num_kv_heads, input_ids):
    """Its units in another order, each with its own biases and gains, none of which is 0 or 1."""
    model = peculiar_model(architecture, num_layers=3, num_kv_heads=num_kv_heads)
    view = ModelView(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in view.layers[1].named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        elif "q_proj" in name or "k_proj" in name or "qkv" in name or "query_key" in name:
            parameter.mul_(20)  # else all positions get the same attention, whatever the queries are
    groups, neurons = torch.arange(view.num_kv_heads), torch.arange(view.num_neurons)
    merged = concatenate(
        view,
        [Block(1), Block(1)],
        heads=[groups[-1:], groups[:-1]],
        neurons=[neurons[17:], neurons[:17]],
        shares=[0.3, 0.7],
    )
    moved = {
        name for name, value in merged.replaced.items() if not torch.equal(value, view.layers[1].get_parameter(name))
    }
    assert {name.rpartition(".")[0] for name in moved} >= set(view.architecture.mlp_inputs)
    if num_kv_heads > 1:
        wide = {*view.architecture.attention_inputs, view.architecture.attention_output}
        assert {name.rpartition(".")[0] for name in moved} >= wide | set(view.architecture.query_key_norms)
    runner = BlockRunner(view, input_ids)
    torch.testing.assert_close(runner.run(merged, runner.states[1]), runner.states[2], rtol=1e-4, atol=1e-6)
    shapes = {name: parameter.shape for name, parameter in view.layers[1].named_parameters()}
    assert {name: value.shape for name, value in merged.replaced.items()} == shapes


def test_the_published_selection_scrambles_grouped_query_attention(input_ids):
    model, _ = load_dense(random_source("qwen3", num_layers=3, num_heads=8, num_kv_heads=4))
    view = ModelView(model)
    runner = BlockRunner(view, input_ids)
    options = {"heads": two_parts(4, 2), "neurons": two_parts(48, 17), "shares": [0.5, 0.5]}
    right = concatenate(view, [Block(1), Block(1)], **options)
    wrong = concatenate(view, [Block(1), Block(1)], official_gqa=True, **options)
    change = runner.states[2] - runner.states[1]
    for merged, error in ((right, 0), (wrong, 0.05)):
        found = runner.run(merged, runner.states[1]) - runner.states[1]
        difference = float((found - change).norm() / change.norm())
        assert difference == pytest.approx(0, abs=1e-5) if error == 0 else difference > error
    # head_dim 4; group 1 has heads 2 and 3, the published selection takes 1 and 5
    chosen = {"heads": [torch.tensor([1]), torch.tensor([0, 2, 3])], "neurons": two_parts(48, 17), "shares": [0.5, 0.5]}
    rows = view.layers[1].self_attn.q_proj.weight
    found = concatenate(view, [Block(1), Block(1)], **chosen).replaced["self_attn.q_proj.weight"]
    assert torch.equal(found[:8], rows[8:16])
    found = concatenate(view, [Block(1), Block(1)], official_gqa=True, **chosen).replaced["self_attn.q_proj.weight"]
    assert torch.equal(found[:4], rows[4:8])
    assert torch.equal(found[4:8], rows[20:24])


def test_what_cannot_be_cut_is_averaged():
    model, _ = load_dense(random_source("opt", num_layers=3))
    view = ModelView(model)
    with torch.no_grad():
        for index, layer in enumerate(view.layers):
            for parameter in layer.parameters():
                parameter.fill_(index + 1)
    merged = concatenate(
        view, [Block(1), Block(2)], heads=two_parts(4, 1), neurons=two_parts(48, 12), shares=[0.25, 0.75]
    )
    value = {name: tensor.flatten() for name, tensor in merged.replaced.items()}
    assert set(value["self_attn_layer_norm.weight"].tolist()) == {2.5}  # plain mean of 2 and 3
    assert set(value["self_attn.out_proj.bias"].tolist()) == {2.75}  # by share
    assert set(value["fc2.bias"].tolist()) == {2.75}
    assert value["fc1.bias"].tolist() == [2.0] * 12 + [3.0] * 36
    assert value["self_attn.k_proj.bias"].tolist() == [2.0] * 8 + [3.0] * 24


def test_a_single_layer_with_all_the_share_is_a_plain_deletion_of_the_other(input_ids):
    model, _ = load_dense(random_source(num_layers=3))
    view = ModelView(model)
    everything, nothing = torch.arange(2), torch.arange(0)
    merged = concatenate(
        view, [Block(1), Block(2)], heads=[nothing, everything], neurons=[nothing, torch.arange(48)], shares=[0.0, 1.0]
    )
    for name, value in merged.replaced.items():
        torch.testing.assert_close(value, view.layers[2].get_parameter(name).detach())  # all norms are 1 here


@pytest.mark.parametrize("architecture", ["llama", "gemma", "phi3", "qwen2"])
def test_folded_gains_let_every_row_keep_its_own_norm(any_model, input_ids):
    """The attention of one layer and the feed-forward network of another, each under its own norm."""
    view = ModelView(any_model)
    runner = BlockRunner(view, input_ids)
    everything, nothing = torch.arange(view.num_kv_heads), torch.arange(0)
    all_neurons = torch.arange(view.num_neurons)
    options = {"heads": [everything, nothing], "neurons": [nothing, all_neurons], "shares": [0.5, 0.5]}
    blocks = [Block(1), Block(2)]
    middle = runner.run(Block(1).lacking("mlp"), runner.states[1])
    expected = runner.run(Block(2).lacking("attention"), middle)
    found = runner.run(concatenate(view, blocks, fold_norm=True, **options), runner.states[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    averaged = runner.run(concatenate(view, blocks, **options), runner.states[1])
    assert (averaged - expected).norm() > 1e-3 * (expected - runner.states[1]).norm()


def test_folding_changes_no_layer(any_model, architecture, input_ids):
    view = ModelView(any_model)
    if not view.architecture.input_rms_norms:
        assert architecture in ("opt", "gpt_neox", "olmo2")
        return
    runner = BlockRunner(view, input_ids)
    torch.testing.assert_close(
        runner.run(folded(view, Block(1)), runner.states[1]), runner.states[2], rtol=1e-4, atol=1e-5
    )
