"""Layers with fewer heads and neurons: one function with the dense model with zeros, in either class, run and saved."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from conftest import random_source
from model_folders import plain_transformers
from plans import narrowing
from transformers import AutoConfig, AutoModelForCausalLM

from slm_pipeline.config import ModelConfig
from slm_pipeline.engine.blocks import BlockRunner
from slm_pipeline.models import checkpoint
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.loading import byte_tokenizer, load_checkpoint, load_dense
from slm_pipeline.models.source import describe
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply, layer_sizes, planned_blocks
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer

NEURONS = [1, 4, 5, 17, 40]
ONE_WIDTH = {layer: ([1], NEURONS) for layer in range(6)}
FEWER_NEURONS = dict.fromkeys(range(6), (None, NEURONS))
UNEQUAL = {0: ([0], None), 1: (None, NEURONS), 3: ([1], [0, 47]), 4: ([0, 1], list(range(7)))}
STOCK_HEADS = sorted(set(ARCHITECTURES) - {"opt", "gpt_neox"})  # the others' heads are as wide as hidden_size / heads


@torch.no_grad()
def masked(model, kept):
    """A copy of the dense model whose last projections read zero from what is not kept."""
    model = copy.deepcopy(model)
    view = ModelView(model)
    for layer, (heads, neurons) in kept.items():
        pairs = ((heads, view.attention_output(layer), view.num_kv_heads), (neurons, view.mlp_output(layer), 48))
        for units, output, number in pairs:
            for unit in set(range(number)) - set(units if units is not None else range(number)):
                size = output.in_features // number
                output.weight[:, unit * size : (unit + 1) * size] = 0
    return model


@torch.no_grad()
@pytest.mark.parametrize("kept", [ONE_WIDTH, FEWER_NEURONS, UNEQUAL], ids=["one_width", "fewer_neurons", "unequal"])
def test_a_narrower_model_is_the_dense_one_with_zeros(kept, any_model, architecture, input_ids, tmp_path):
    if architecture == "olmo2":  # its query and key norms are over all heads that are there
        kept = {layer: (None, neurons or NEURONS) for layer, (_, neurons) in kept.items()}
    expected = masked(any_model, kept)(input_ids=input_ids, use_cache=False).logits
    plan = narrowing(kept)
    dense = ModelView(any_model)
    sizes, _ = measure_changes(plan, layer_sizes(dense))
    outside = dense.num_parameters() - sum(dense.block_parameters(layer) for layer in range(6))
    runner = BlockRunner(dense, input_ids)
    hidden = runner.states[0]
    for block in planned_blocks(plan, dense):
        hidden = runner.run(block, hidden)
    torch.testing.assert_close(dense.logits(runner.finish(hidden)), expected)

    pruned = apply(plan, any_model)
    torch.testing.assert_close(pruned(input_ids=input_ids, use_cache=False).logits, expected)
    logits = pruned(input_ids=input_ids, use_cache=False).logits
    config = random_source(architecture).config
    reloaded = checkpoint.save(pruned, byte_tokenizer(), tmp_path / "model", card="", config=config)
    assert torch.equal(reloaded(input_ids=input_ids, use_cache=False).logits, logits)
    view = ModelView(reloaded)
    assert [view.block_parameters(layer) for layer in range(6)] == [size.whole for size in sizes]
    assert view.num_parameters() == outside + sum(size.whole for size in sizes)
    options = {"max_new_tokens": 8, "do_sample": False}
    for implementation in ["eager"] if architecture == "gemma2" else ["eager", "sdpa"]:  # Gemma 2 has no sdpa
        reloaded.set_attn_implementation(implementation)
        generated = reloaded.generate(input_ids, use_cache=True, num_beams=2, **options)
        assert torch.equal(generated, reloaded.generate(input_ids, use_cache=False, num_beams=2, **options))
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    assert description["model_type"] == class_of(architecture, kept)
    if not description["model_type"].startswith("pruned_"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(plain(input_ids=input_ids, use_cache=False).logits, logits)


def class_of(architecture, kept):
    """The model type of a checkpoint whose six layers keep these units."""
    alike = len(kept) == 6 and len({str(units) for units in kept.values()}) == 1
    is_legal = kept[0][0] is None or architecture in STOCK_HEADS
    return architecture if alike and is_legal else f"pruned_{architecture}"


@torch.no_grad()
def test_a_constant_stands_for_what_is_gone(any_model, architecture, input_ids, tmp_path):
    generator = torch.Generator().manual_seed(3)
    constants = {"attention": torch.randn(32, generator=generator), "mlp": torch.randn(32, generator=generator)}
    groups = ModelView(any_model).num_kv_heads
    kept = {2: (list(range(groups)), NEURONS)}
    expected = masked(any_model, kept)
    for sublayer, path in (("attention", "attention_output"), ("mlp", "mlp_output")):
        output = getattr(ModelView(expected), path)(2)
        bias = constants[sublayer] + (0 if output.bias is None else output.bias)
        output.bias = torch.nn.Parameter(bias)
    expected = expected(input_ids=input_ids, use_cache=False).logits
    plan = narrowing(kept, biases={2: {name: value.numpy() for name, value in constants.items()}})
    dense = ModelView(any_model)
    has_bias = dense.mlp_output(2).bias is not None
    sizes, changes = measure_changes(plan, layer_sizes(dense))
    pruned = apply(plan, any_model)
    torch.testing.assert_close(pruned(input_ids=input_ids, use_cache=False).logits, expected)
    logits = pruned(input_ids=input_ids, use_cache=False).logits
    config = random_source(architecture).config
    reloaded = checkpoint.save(pruned, byte_tokenizer(), tmp_path / "model", card="", config=config)
    assert torch.equal(reloaded(input_ids=input_ids, use_cache=False).logits, logits)
    assert ModelView(reloaded).block_parameters(2) == sizes[2].whole
    projections = 2 if architecture in ("opt", "gpt_neox") else 3
    lost = 43 * (projections * 32 + (1 if has_bias else 0)) - (0 if has_bias else 64)
    assert sizes[0].whole - sizes[2].whole == lost
    assert changes.lines == [
        f"narrower: {groups} key-value groups left in layers 2; 5 neurons left in layers 2, with a constant for what is"
        f" gone: {lost} parameters less"
    ]


@pytest.mark.parametrize(("architecture", "is_stock"), [("llama", False), ("mistral", True), ("gemma3_text", False)])
def test_heads_that_do_not_divide_the_hidden_size(architecture, is_stock, input_ids, tmp_path):
    source = random_source(architecture, hidden_size=48, num_heads=6, num_kv_heads=6)
    model, _ = load_dense(source)
    assert [n for n in range(1, 7) if ModelView(model).allows_kv_heads(n)] == (
        [1, 2, 3, 4, 5, 6] if is_stock else [1, 2, 3, 4, 6]
    )
    pruned = apply(narrowing({layer: ([0, 1, 3, 4, 5], None) for layer in range(6)}), model)
    checkpoint.save(pruned, byte_tokenizer(), tmp_path / "model", card="", config=source.config)
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    if is_stock:
        assert (description["model_type"], description["num_attention_heads"]) == (architecture, 5)
    else:
        assert description["model_type"] == f"pruned_{architecture}"
        assert [size["heads"] for size in description["layer_sizes"]] == [5] * 6


@torch.no_grad()
@pytest.mark.parametrize("kept", [ONE_WIDTH, UNEQUAL], ids=["one_width", "unequal"])
@pytest.mark.parametrize("architecture", ["qwen3", "phi3", "gemma2"])
def test_heads_may_be_wider_than_their_share_of_the_states(architecture, kept, input_ids, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "vocab_size": 300, "head_dim": 24}
    config = AutoConfig.for_model(architecture, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = masked(model, kept)(input_ids=input_ids, use_cache=False).logits
    pruned = apply(narrowing(kept), model)
    torch.testing.assert_close(pruned(input_ids=input_ids, use_cache=False).logits, expected)
    folder = tmp_path / "model"
    reloaded = checkpoint.save(pruned, byte_tokenizer(), folder, card="", config=random_source(architecture).config)
    torch.testing.assert_close(reloaded(input_ids=input_ids, use_cache=False).logits, expected)
    assert [ModelView(reloaded).kv_heads_of(layer) for layer in range(6)] == [
        2 if layer not in kept or kept[layer][0] is None else len(kept[layer][0]) for layer in range(6)
    ]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt"])
def test_layers_may_be_narrower_and_fewer_and_lack_sublayers(architecture, input_ids, tmp_path):
    source = random_source(architecture)
    model, _ = load_dense(source)
    others = [Drop((2,)), DropSublayer((5,), "attention", "custom"), DropSublayer((3,), "mlp", "custom")]
    kept = {0: ([1], None), 4: (None, NEURONS), 5: (None, [3])}
    plan = narrowing(kept, *others)
    reference = masked(model, kept)
    with torch.no_grad():
        view = ModelView(reference)
        view.silence(5, "attention")
        view.silence(3, "mlp")
        view.rebuild([view.layers[layer] for layer in (0, 1, 3, 4, 5)], [0, 1, 3, 4, 5])
    pruned = apply(plan, model)
    expected = reference(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(pruned(input_ids=input_ids, use_cache=False).logits, expected)
    reloaded = checkpoint.save(pruned, byte_tokenizer(), tmp_path / "model", card="", config=source.config)
    options = {"max_new_tokens": 8, "do_sample": False}
    generated = reloaded.generate(input_ids, use_cache=True, **options)
    assert torch.equal(generated, reloaded.generate(input_ids, use_cache=False, **options))


@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt"])
def test_plain_transformers_loads_layers_of_different_widths(architecture, input_ids, tmp_path):
    """...and the dense model was read from files, whose configuration says more of itself than one made anew."""
    source = random_source(architecture)
    load_dense(source)[0].save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    pruned = apply(narrowing(UNEQUAL), dense)
    folder = tmp_path / "model"
    model = checkpoint.save(pruned, byte_tokenizer(), folder, card="A card.", config=source.config)
    expected = model.generate(input_ids[:1], max_new_tokens=6, do_sample=False)[0].tolist()
    assert plain_transformers(folder, input_ids, tmp_path) == [str(expected), "refused True"]
    assert "trust_remote_code=True" in (folder / "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "stream"])
def test_a_gpt_neox_read_from_files_is_pruned_and_saved_twice(device, input_ids, tmp_path):
    """transformers calls its head otherwise in files than in the model, but only where the class is its own."""
    model, tokenizer = load_dense(random_source("gpt_neox"))
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = ModelConfig(name="local", source="local", dtype="float32", device=device)
    for name, plan in (("first", narrowing(UNEQUAL)), ("second", narrowing({0: (None, [1, 2])}, Drop((1,))))):
        config = dataclasses.replace(options, path=str(folder))
        pruned = apply(plan, load_dense(describe(config))[0])
        expected = pruned(input_ids=input_ids, use_cache=False).logits
        folder = tmp_path / name
        checkpoint.save(pruned, tokenizer, folder, card="", config=config)
    found, _ = load_dense(describe(dataclasses.replace(options, path=str(folder))))
    torch.testing.assert_close(found(input_ids=input_ids, use_cache=False).logits, expected)
    assert [ModelView(found).neurons_of(layer) for layer in range(5)] == [2, 48, 2, 7, 48]


def test_a_model_of_unequal_layers_trains_is_saved_again_and_is_pruned_further(tiny_llama, input_ids, tmp_path):
    source = random_source()
    pruned = apply(narrowing(UNEQUAL), tiny_llama[0])
    first = checkpoint.save(pruned, byte_tokenizer(), tmp_path / "first", card="", config=source.config)
    first.train()
    first(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in first.parameters())
    first.eval()
    checkpoint.save(first, byte_tokenizer(), tmp_path / "second", card="", config=source.config)
    view = ModelView(load_checkpoint(tmp_path / "second", source.config))
    assert [view.kv_heads_of(layer) for layer in range(6)] == [1, 2, 2, 1, 2, 2]
    assert [view.neurons_of(layer) for layer in range(6)] == [48, 5, 48, 2, 7, 48]
    again = apply(narrowing({2: ([1], None), 4: (None, [0, 6])}, Drop((0,))), view.model)
    expected = again(input_ids=input_ids, use_cache=False).logits
    third = checkpoint.save(again, byte_tokenizer(), tmp_path / "third", card="", config=source.config)
    torch.testing.assert_close(third(input_ids=input_ids, use_cache=False).logits, expected, rtol=0, atol=0)
    assert [ModelView(third).kv_heads_of(layer) for layer in range(5)] == [2, 1, 1, 2, 2]
    assert [ModelView(third).neurons_of(layer) for layer in range(5)] == [5, 48, 2, 2, 48]
    shallower = apply(narrowing({}, Drop((1,)), num_layers=5), third)  # no width changes
    expected = shallower(input_ids=input_ids, use_cache=False).logits
    last = checkpoint.save(shallower, byte_tokenizer(), tmp_path / "last", card="", config=source.config)
    torch.testing.assert_close(last(input_ids=input_ids, use_cache=False).logits, expected, rtol=0, atol=0)


def said_twice(size, layer, absent):
    """A layer's description as checkpoints of before had it, and what they said of all layers in ``absent``."""
    for child in size["absent"]:
        absent.setdefault(child, []).append(layer)
    return {name: size[name] for name in ("heads", "key_value_heads", "shapes", "biases")}


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("kept", [UNEQUAL, {}], ids=["narrower_too", "missing_alone"])
def test_a_checkpoint_that_says_in_two_lists_what_its_layers_have_still_loads(architecture, kept, input_ids, tmp_path):
    source = random_source(architecture)
    lost = [DropSublayer((5,), "attention", "custom"), DropSublayer((2,), "mlp", "custom")]
    constant = {3: {"mlp": torch.ones(32).numpy()}} if kept else None
    pruned = apply(narrowing(kept, *lost, biases=constant), load_dense(source)[0])
    expected = pruned(input_ids=input_ids, use_cache=False).logits
    saved = checkpoint.save(pruned, byte_tokenizer(), tmp_path / "model", card="", config=source.config)
    file = tmp_path / "model" / "config.json"
    description, absent = json.loads(file.read_text()), {}
    sizes = description.pop("layer_sizes")
    widths = [said_twice(size, layer, absent) for layer, size in enumerate(sizes)]
    file.write_text(json.dumps(description | {"absent": absent} | ({"widths": widths} if kept else {})))
    again = load_checkpoint(tmp_path / "model", source.config)
    assert torch.equal(again(input_ids=input_ids, use_cache=False).logits, expected)
    assert not {"absent", "widths"} & vars(again.config).keys()
    if not kept:  # their shapes are the dense model's, of which nothing was said
        for size in (*sizes, *again.config.layer_sizes):
            size["shapes"] = None
    if architecture == "gpt_neox":  # it has no key-value heads: as many as heads
        assert {size["key_value_heads"] for size in sizes} == {size["heads"] for size in sizes}
    assert again.config.layer_sizes == sizes
    assert ModelView(again).num_parameters() == ModelView(saved).num_parameters()
