"""What a model is made of, by hand and by what its layers do, for every architecture."""

from __future__ import annotations

import pytest
import torch
from conftest import HEAD_DIM, WINDOW, peculiar_model, random_source

from slm_pipeline.engine.blocks import BlockRunner, entering_and_leaving
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView

TWO_KINDS = [None, WINDOW, WINDOW, None, WINDOW, WINDOW]
WINDOWS = {
    **dict.fromkeys(("llama", "gemma", "olmo2", "opt", "gpt_neox"), [None] * 6),
    **dict.fromkeys(("mistral", "phi3"), [WINDOW] * 6),
    **dict.fromkeys(("qwen2", "qwen3", "gemma2", "gemma3_text"), TWO_KINDS),
}


@torch.no_grad()
def test_each_layer_sees_as_far_back_as_its_window(any_model, architecture, input_ids):
    view = ModelView(any_model)
    assert view.attention_windows() == WINDOWS[architecture]
    runner = BlockRunner(view, input_ids)
    entering, leaving, arguments = entering_and_leaving(
        view, {"input_ids": input_ids}, range(6), range(6), arguments_of=range(6)
    )
    for layer, window in enumerate(view.attention_windows()):

        def change(position, layer=layer):
            """How much the last token's output changes with an earlier token's state."""
            state = entering[layer].clone()
            state[:, position] += torch.randn(state.shape[2], generator=torch.Generator().manual_seed(0))
            args, kwargs = arguments[layer]
            output = view.layers[layer](state, *args, **kwargs)
            return float(((output[0] if isinstance(output, tuple) else output) - leaving[layer])[:, -1].norm())

        assert change(12 - window if window else 0) > 1e-3
        if window:
            assert change(12 - window - 1) < 1e-6
        torch.testing.assert_close(entering[layer], runner.states[layer])
        torch.testing.assert_close(leaving[layer], runner.states[layer + 1])


@torch.no_grad()
def test_a_block_run_by_hand_is_what_left_it(any_model, input_ids):
    """With padding on the left, which no recorded pass has."""
    view = ModelView(any_model)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    entering, leaving, arguments = entering_and_leaving(
        view, {"input_ids": input_ids, "attention_mask": mask}, [0, 1, 3, 5], [0, 1, 3, 5], [0, 1, 3, 5]
    )
    for layer, state in entering.items():
        args, kwargs = arguments[layer]
        output = view.layers[layer](state, *args, **kwargs)
        torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, leaving[layer])


def test_units_of_wide_heads_by_hand():
    """Two key-value groups of two query heads, each 12 wide; 48 neurons."""
    view = ModelView(peculiar_model("llama"))
    groups = torch.arange(24).view(2, 12)
    queries = torch.arange(48).view(2, 24)
    found = {piece.parameter: (piece.dim, piece.units) for piece in view.attention_slices(0)}
    assert found.keys() == {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    for name, dim, units in (("q", 0, queries), ("k", 0, groups), ("v", 0, groups), ("o", 1, queries)):
        dim_found, (units_found,) = found[f"self_attn.{name}_proj.weight"]
        assert dim_found == dim
        assert torch.equal(units_found, units)
    assert [(piece.parameter, piece.dim, [unit.tolist() for unit in piece.units]) for piece in view.mlp_slices(0)] == [
        (f"mlp.{name}_proj.weight", dim, [[[neuron] for neuron in range(48)]])
        for name, dim in (("gate", 0), ("up", 0), ("down", 1))
    ]


def test_units_cover_each_parameter_once(any_model, architecture):
    view = ModelView(any_model)
    slices = [*view.attention_slices(1), *view.mlp_slices(1)]
    parameters = dict(view.layers[1].named_parameters())
    assert len({piece.parameter for piece in slices}) == len(slices)
    for piece in slices:
        rows = torch.cat([units.flatten() for units in piece.units])
        assert rows.sort().values.tolist() == list(range(parameters[piece.parameter].shape[piece.dim]))
    norms = set(view.norm_names(1))
    left = parameters.keys() - {piece.parameter for piece in slices} - norms
    of_all = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} if architecture != "olmo2" else set()
    assert left <= of_all | {name for name in parameters if name.endswith("bias")}
    width = HEAD_DIM if architecture not in ("opt", "gpt_neox") else 8
    assert view.attention_output(1).in_features == 4 * width


@pytest.mark.parametrize("architecture", ["phi3", "gpt_neox"])
def test_units_of_one_projection_for_queries_keys_and_values(any_model, architecture):
    inputs = ModelView(any_model).attention_slices(0)[0]
    if architecture == "phi3":  # all queries, all keys, all values
        assert [units.tolist() for units in inputs.units] == [
            [[*range(24)], [*range(24, 48)]], [[*range(48, 60)], [*range(60, 72)]], [[*range(72, 84)], [*range(84, 96)]]
        ]  # fmt: skip
    else:  # query, key and value of each head side by side
        assert [units.tolist() for units in inputs.units] == [[[*range(24 * h, 24 * h + 24)] for h in range(4)]]


def test_a_rebuilt_configuration_follows_its_layers():
    view = ModelView(peculiar_model("qwen3"))
    view.config.max_window_layers = 3
    view.rebuild([view.layers[layer] for layer in (0, 2, 3, 5)], [0, 2, 3, 5])
    assert view.config.layer_types == [
        "full_attention", "sliding_attention", "full_attention", "sliding_attention"
    ]  # fmt: skip
    assert view.config.max_window_layers == 2
    assert view.config.num_hidden_layers == view.num_layers == 4
    assert [layer.self_attn.layer_idx for layer in view.layers] == [0, 1, 2, 3]


def test_a_period_of_layers_is_forgotten_when_they_are_no_longer_periodic():
    view = ModelView(peculiar_model("gemma3_text"))
    view.config._sliding_window_pattern = 3
    view.rebuild(list(view.layers), range(6))
    assert view.config._sliding_window_pattern == 3
    view.rebuild([view.layers[layer] for layer in (0, 1, 3)], [0, 1, 3])
    assert "_sliding_window_pattern" not in vars(view.config)


@pytest.mark.parametrize(("architecture", "ties"), [("llama", False), ("gemma2", True)])
def test_tied_parameters_are_counted_once(architecture, ties):
    view = ModelView(load_dense(random_source(architecture))[0])
    assert view.ties_embeddings == ties
    assert view.head_parameters() == 300 * 32
    layers = sum(view.block_parameters(layer) for layer in range(6))
    assert view.num_parameters() == layers + 32 + 300 * 32 * (1 if ties else 2)


@torch.no_grad()
def test_logits_of_some_tokens_are_those_of_all(any_model, input_ids):
    view = ModelView(any_model)
    normed = view.decoder(input_ids=input_ids).last_hidden_state
    tokens = torch.tensor([7, 3, 299, 0])
    torch.testing.assert_close(view.logits(normed, tokens), view.logits(normed)[..., tokens])


@torch.no_grad()
def test_a_silenced_block_hands_its_input_on(any_model, input_ids):
    view = ModelView(any_model)
    runner = BlockRunner(view, input_ids)
    view.silence(2, "mlp")
    view.silence(2, "attention")
    block = BlockRunner(view, input_ids).states
    torch.testing.assert_close(block[3], block[2], rtol=0, atol=0)
    torch.testing.assert_close(block[2], runner.states[2], rtol=0, atol=0)


def test_what_is_lacking_comes_back_after_an_error(any_model):
    view = ModelView(any_model)
    before = [module for layer in view.layers for module in layer.modules()]
    with pytest.raises(ZeroDivisionError), view.lacking(3, ["attention", "mlp"]):
        assert 1 / view.block_parameters(3)  # nothing is there
    after = [module for layer in view.layers for module in layer.modules()]
    assert len(before) == len(after)
    assert all(first is second for first, second in zip(before, after, strict=True))
