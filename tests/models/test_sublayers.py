"""Blocks without attention or without feed-forward network: run, saved, reloaded, generated with."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import random_source, run_slm
from model_folders import plain_transformers
from transformers import AutoModelForCausalLM

from slm_pipeline.engine.blocks import BlockRunner
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import byte_tokenizer, load_checkpoint, load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.plan import Plan


def plan_with(export, num_layers=6):
    """Layer 2 goes, layers 0 and 3 lose their attention, layer 4 its feed-forward network."""
    lost = [(0, "attention"), (3, "attention"), (4, "mlp")]
    plan = Plan(
        model={"name": "random", "fingerprint": "x", "num_layers": num_layers},
        method="test",
        options={},
        calibration={},
        ops=[Drop((2,)), *(DropSublayer((i,), part, export) for i, part in lost)],
    )
    plan.check("the plan")
    assert plan.layer_groups == [[0], [1], [3], [4], [5]]
    return plan


@torch.no_grad()
def test_a_block_without_a_sublayer_by_hand(tiny_llama, input_ids):
    view = ModelView(tiny_llama[0])
    runner = BlockRunner(view, input_ids)
    hidden, layer = runner.states[1], view.layers[1]
    only_mlp = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    torch.testing.assert_close(runner.run(Block(1).lacking("attention"), hidden), only_mlp)
    middle = []
    hook = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: middle.append(args[0]))
    torch.testing.assert_close(runner.run(Block(1), hidden), runner.states[2])  # nothing of the change is left
    hook.remove()
    torch.testing.assert_close(runner.run(Block(1).lacking("mlp"), hidden), middle[0])
    torch.testing.assert_close(runner.run(Block(1).lacking("mlp").lacking("attention"), hidden), hidden)


@torch.no_grad()
def test_both_exports_are_one_function(any_model, architecture, input_ids, tmp_path):
    config = random_source(architecture).config
    dense = sum(parameter.numel() for parameter in any_model.parameters())
    found = {}
    for export in ("stock", "custom"):
        pruned = apply(plan_with(export), copy.deepcopy(any_model))
        logits = pruned(input_ids=input_ids, use_cache=False).logits
        folder = tmp_path / export
        reloaded = checkpoint.save(pruned, byte_tokenizer(), folder, card="", config=config)
        torch.testing.assert_close(reloaded(input_ids=input_ids, use_cache=False).logits, logits, rtol=0, atol=0)
        options = {"max_new_tokens": 8, "do_sample": False}
        generated = reloaded.generate(input_ids, use_cache=True, num_beams=2, **options)
        assert torch.equal(generated, reloaded.generate(input_ids, use_cache=False, num_beams=2, **options))
        found[export] = logits, generated, ModelView(reloaded).num_parameters()
    torch.testing.assert_close(found["stock"][0], found["custom"][0], rtol=0, atol=0)
    assert torch.equal(found["stock"][1], found["custom"][1])
    view = ModelView(any_model)
    of_layer = view.block_parameters(0)
    assert found["stock"][2] == dense - of_layer
    lost = 2 * view.sublayer_parameters(0, "attention") + view.sublayer_parameters(0, "mlp")
    assert found["custom"][2] == dense - of_layer - lost
    assert view.sublayer_parameters(0, "attention") + view.sublayer_parameters(0, "mlp") == of_layer
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")) is type(any_model)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "opt"])
def test_plain_transformers_loads_the_custom_export(architecture, input_ids, tmp_path):
    source = random_source(architecture)
    pruned = apply(plan_with("custom"), load_dense(source)[0])
    folder = tmp_path / "model"
    model = checkpoint.save(pruned, byte_tokenizer(), folder, card="", config=source.config)
    expected = model.generate(input_ids[:1], max_new_tokens=6, do_sample=False)[0].tolist()
    assert plain_transformers(folder, input_ids, tmp_path) == [str(expected), "refused True"]


def test_a_model_that_lacks_sublayers_trains_and_is_saved_again(tiny_llama, input_ids, tmp_path):
    source = random_source()
    pruned = apply(plan_with("custom"), tiny_llama[0])
    first = checkpoint.save(pruned, byte_tokenizer(), tmp_path / "first", card="", config=source.config)
    first.train()
    first(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in first.parameters())
    with torch.no_grad():
        first.get_input_embeddings().weight.add_(0.1)
    first.eval()
    checkpoint.save(first, byte_tokenizer(), tmp_path / "second", card="", config=source.config)
    description = json.loads((tmp_path / "second" / "config.json").read_text())
    assert description["model_type"] == "pruned_llama"
    sizes, no_attention = description["layer_sizes"], ["self_attn", "input_layernorm"]
    assert [size["absent"] for size in sizes] == [
        no_attention, [], no_attention, ["mlp", "post_attention_layernorm"], []
    ]  # fmt: skip
    assert [(size["heads"], size["key_value_heads"], size["neurons"]) for size in sizes] == [
        (0, 0, 48), (4, 2, 48), (0, 0, 48), (4, 2, 0), (4, 2, 48)
    ]  # fmt: skip
    assert all(set(size["shapes"]).isdisjoint(size["absent"]) for size in sizes)
    assert ModelView(load_checkpoint(tmp_path / "second", source.config)).num_layers == 5


def test_it_can_be_pruned_further(tiny_llama, tmp_path):
    """The whole command, with our own class: nothing in the folder is run."""
    source = random_source()
    pruned = apply(plan_with("custom"), tiny_llama[0])
    checkpoint.save(pruned, byte_tokenizer(), tmp_path / "model", card="", config=source.config)
    (tmp_path / "model" / "modeling_pruned.py").write_text("raise SystemExit('this must not run')")
    (tmp_path / "text.txt").write_text("The river runs past the mill and the tree. " * 40)
    words = [
        "model=local", f"model.path={tmp_path / 'model'}", f"output_dir={tmp_path / 'out'}", "calibration=text_file",
        f"calibration.path={tmp_path / 'text.txt'}", "calibration.num_samples=2", "calibration.seq_len=16",
        "model.dtype=float32", "recovery=none", "evaluation=none", "tracker=jsonl", "pictures=false",
    ]  # fmt: skip
    for method in (["method=finercut", "method.export=custom"], ["method=shortgpt"], ["method=flap"]):
        outcome = run_slm(*words, *method)
        assert outcome.status == 0, outcome.err
    for method in (["method=slm", "method.merge_rule=mean"], ["method=come"]):
        outcome = run_slm(*words, *method)
        assert outcome.status == 2
        assert "mixes the weights of layers, and those of local differ in heads, neurons or sublayers" in outcome.err
