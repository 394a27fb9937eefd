"""A merged model of every architecture is saved, and plain transformers loads the same function."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import random_source
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slm_pipeline.errors import UserError
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import byte_tokenizer, load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.merge_rules import RULES
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan


def plan_of(windows, rule="official", num_layers=6) -> Plan:
    return Plan(
        model={"name": "random", "fingerprint": "x", "num_layers": num_layers},
        method="test",
        options={},
        calibration={},
        ops=[Merge(tuple(range(low, high + 1)), rule) for low, high in windows],
    )


@torch.no_grad()
def test_merge_save_reload_generate(any_model, input_ids, tmp_path):
    config = random_source(any_model.config.model_type).config
    pruned = apply(plan_of([(1, 2), (3, 4)]), any_model)
    pruned.eval()
    expected = pruned(input_ids=input_ids, use_cache=False).logits
    checkpoint.save(pruned, byte_tokenizer(), tmp_path / "model", card="# card", config=config)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert reloaded.config.num_hidden_layers == 4
    torch.testing.assert_close(reloaded(input_ids=input_ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with_cache = reloaded.generate(input_ids, use_cache=True, **settings)
    without_cache = reloaded.generate(input_ids, use_cache=False, **settings)
    assert with_cache.shape == (3, 18)
    assert torch.equal(with_cache, without_cache)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_reloads(rule, input_ids, tmp_path):
    """Qwen3 has q/k norms and per-layer lists in its configuration."""
    source = random_source("qwen3")
    model, tokenizer = load_dense(source)
    pruned = apply(plan_of([(1, 3)], rule), model)
    expected = pruned(input_ids=input_ids).logits
    checkpoint.save(pruned, tokenizer, tmp_path / "model", card="# card", config=source.config)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert len(reloaded.config.layer_types) == 4
    torch.testing.assert_close(reloaded(input_ids=input_ids).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_layer_types_follow_the_projections(input_ids):
    """Gemma 2 alternates sliding and full attention: `official` takes the type of the highest layer of a window."""
    model, _ = load_dense(random_source("gemma2"))
    assert model.config.layer_types[1:3] == ["full_attention", "sliding_attention"]
    lowest = apply(plan_of([(1, 2)], "keep_lowest"), copy.deepcopy(model))
    highest = apply(plan_of([(1, 2)], "official"), copy.deepcopy(model))
    assert lowest.config.layer_types[1] == "full_attention" == lowest.model.layers[1].self_attn.layer_type
    assert highest.config.layer_types[1] == "sliding_attention" == highest.model.layers[1].self_attn.layer_type


def test_loads_where_this_package_cannot_be_imported(tiny_llama, tmp_path):
    model, tokenizer = tiny_llama
    checkpoint.save(
        apply(plan_of([(2, 4)]), model), tokenizer, tmp_path / "model", card="# card", config=random_source().config
    )
    program = (
        "import sys; sys.modules['slm_pipeline'] = None\n"  # any import of it raises
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(tmp_path / 'model')!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "ids = tokenizer('hello', return_tensors='pt').input_ids\n"
        "print(model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape[1])\n"
    )
    found = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "10"
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("hi")["input_ids"] == byte_tokenizer()("hi")["input_ids"]


def test_a_checkpoint_that_reloads_differently_is_refused_and_not_kept(tiny_llama, tmp_path, monkeypatch):
    model, tokenizer = tiny_llama
    honest = checkpoint.load_checkpoint

    def damaged(folder, config):
        loaded = honest(folder, config)
        with torch.no_grad():
            loaded.model.layers[0].mlp.down_proj.weight.zero_()
        return loaded

    monkeypatch.setattr(checkpoint, "load_checkpoint", damaged)
    with pytest.raises(UserError, match="logits differ"):
        checkpoint.save(model, tokenizer, tmp_path / "model", card="# card", config=random_source().config)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("window", "message"), [(20, "logits differ"), (4096, "other attention windows")])
def test_a_reload_with_other_windows_is_refused(window, message, tmp_path, monkeypatch):
    """The probe is longer than a window that a probe can pass; of wider ones the settings are compared."""
    source = random_source("mistral", num_layers=2)
    model, tokenizer = load_dense(source)
    model.config.sliding_window = window
    honest = checkpoint.load_checkpoint

    def damaged(folder, config):
        loaded = honest(folder, config)
        loaded.config.sliding_window = None
        return loaded

    checkpoint.save(copy.deepcopy(model), tokenizer, tmp_path / "whole", card="", config=source.config)
    monkeypatch.setattr(checkpoint, "load_checkpoint", damaged)
    with pytest.raises(UserError, match=message):
        checkpoint.save(model, tokenizer, tmp_path / "model", card="", config=source.config)
    assert not (tmp_path / "model").exists()


def test_the_probe_ends_where_learned_positions_do(tmp_path):
    source = random_source("opt", num_layers=2)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "opt",
            vocab_size=300,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=9,
        )
    ).eval()
    reloaded = checkpoint.save(model, byte_tokenizer(), tmp_path / "model", card="", config=source.config)
    assert reloaded.config.max_position_embeddings == 9


def test_a_tokenizer_that_reloads_differently_is_refused(tiny_llama, tmp_path, monkeypatch):
    model, tokenizer = tiny_llama
    other = byte_tokenizer()
    other.add_tokens(["The 12"])
    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda folder: other)
    with pytest.raises(UserError, match="reloaded tokenizer gives other token ids"):
        checkpoint.save(model, tokenizer, tmp_path / "model", card="", config=random_source().config)
    assert not (tmp_path / "model").exists()


def test_tied_embeddings_stay_tied(tmp_path):
    source = random_source("gemma2")
    model, tokenizer = load_dense(source)
    assert model.config.tie_word_embeddings
    checkpoint.save(apply(plan_of([(1, 2)]), model), tokenizer, tmp_path / "model", card="# card", config=source.config)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 5


@torch.no_grad()
def test_logits_of_the_view_are_the_models_own(any_model, input_ids):
    view = ModelView(any_model)
    normed = view.decoder(input_ids=input_ids).last_hidden_state
    torch.testing.assert_close(view.logits(normed), any_model(input_ids=input_ids).logits)


@torch.no_grad()
def test_weights_above_the_largest_shard_are_written_in_several(input_ids, tmp_path, monkeypatch):
    """Each file holds no more than that, the index says which tensor lies where, and all of it loads."""
    monkeypatch.setattr(checkpoint, "MAX_SHARD", "60KB")
    source = random_source()
    model, tokenizer = load_dense(source)
    expected = model(input_ids=input_ids).logits
    checkpoint.save(model, tokenizer, tmp_path / "model", card="# card", config=source.config)
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 70_000  # with the header
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {shard.name for shard in shards}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, expected, rtol=0, atol=1e-5)
