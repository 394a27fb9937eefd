"""What the JSON files of a checkpoint say of the model beside them."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import random_source
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models import architectures, checkpoint
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.loading import byte_tokenizer, load_dense
from slm_pipeline.models.source import describe
from slm_pipeline.models.view import ModelView
from slm_pipeline.models.widths import cut_out, settle


def cut(model, kept):
    view = ModelView(model)
    view.rebuild([view.layers[layer] for layer in kept], kept)
    return model


def saved_config(model, folder, config=None) -> dict:
    config = config or random_source().config
    checkpoint.save(model, byte_tokenizer(), folder, card="# card", config=config)
    return json.loads((folder / "config.json").read_text())


def test_what_is_left_of_another_life_is_dropped(tmp_path):
    model, tokenizer = load_dense(random_source("phi3"))
    model.config.auto_map = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "someone/model--modeling_phi3.Phi3ForCausalLM",
    }
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    tokenizer.init_kwargs |= {"auto_map": ["tokenization_phi3.Phi3Tokenizer", None], "is_local": True}
    checkpoint.save(model, tokenizer, tmp_path / "model", card="", config=random_source("phi3").config)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert not config.keys() & {"auto_map", "quantization_config"}
    assert not json.loads((tmp_path / "model" / "tokenizer_config.json").read_text()).keys() & {"auto_map", "is_local"}


def test_code_that_is_in_the_folder_stays_named(tiny_llama, tmp_path):
    model, _ = tiny_llama
    cut_out(view := ModelView(model), {"mlp": [1]})
    settle(view)
    config = saved_config(model, tmp_path / "model")
    assert config["auto_map"] == {
        "AutoConfig": "modeling_pruned.PrunedLlamaConfig",
        "AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM",
    }


@torch.no_grad()
def test_a_head_that_is_not_the_embedding_is_not_said_to_be(tiny_llama, input_ids, tmp_path):
    """transformers 5 leaves apart what the file holds twice, whatever the configuration says; 4 would tie it."""
    model, tokenizer = tiny_llama
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    source = describe(ModelConfig(name="x", source="local", path=str(folder), dtype="float32", device="cpu"))
    loaded, _ = load_dense(source)
    assert loaded.config.tie_word_embeddings is False
    expected = model(input_ids=input_ids).logits
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, expected)
    assert saved_config(loaded, tmp_path / "saved", source.config)["tie_word_embeddings"] is False
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)


def test_lists_that_merely_have_as_many_entries_as_layers_are_left_alone(tiny_llama, tmp_path):
    model, _ = tiny_llama
    model.config.languages = ["en", "de", "fr", "it", "pt", "hi"]
    model.config.no_rope_layers = [1, 1, 1, 0, 1, 0]
    config = saved_config(cut(model, [0, 1, 3, 5]), tmp_path / "model")
    assert config["num_hidden_layers"] == 4
    assert config["languages"] == ["en", "de", "fr", "it", "pt", "hi"]
    assert config["no_rope_layers"] == [1, 1, 0, 0]


def test_every_per_layer_list_of_the_supported_families_is_known_by_name():
    known = {"layer_types"}
    for architecture in ARCHITECTURES:
        config = AutoConfig.for_model(architecture, num_hidden_layers=7)
        found = {key for key, value in vars(config).items() if isinstance(value, (list, tuple)) and len(value) == 7}
        assert found <= known <= set(architectures.PER_LAYER_LISTS), architecture


def test_counts_and_periods_of_layers_follow(tmp_path):
    qwen, _ = load_dense(random_source("qwen2"))
    qwen.config.max_window_layers = 4
    assert saved_config(cut(qwen, [0, 2, 4, 5]), tmp_path / "qwen")["max_window_layers"] == 2
    gemma, _ = load_dense(random_source("gemma3_text"))
    gemma.config.sliding_window_pattern = 6
    assert gemma.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    config = saved_config(cut(gemma, [0, 2, 5]), tmp_path / "gemma")
    assert config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert not config.keys() & {"sliding_window_pattern", "_sliding_window_pattern"}
    whole, _ = load_dense(random_source("gemma3_text"))
    assert cut(whole, range(6)).config._sliding_window_pattern == 6


@pytest.mark.parametrize("length", [5, 7])
def test_a_list_with_too_many_or_too_few_entries_is_refused_before_loading(length, tmp_path):
    config = {"model_type": "qwen2", "num_hidden_layers": 6, "layer_types": ["full_attention"] * length}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"config.json contradicts itself: {length} layer_types for 6 layers"):
        describe(ModelConfig(name="x", source="local", path=str(tmp_path)))


def test_a_model_whose_layers_differ_in_size_is_refused():
    config = {"model_type": "llama", "num_hidden_layers": 6, "per_layer_config": {"3": {"intermediate_size": 24}}}
    with pytest.raises(UserError, match="cannot be cut by layers: its layers differ in size or lack parts"):
        architectures.find(config)


def test_no_file_names_a_place_on_this_machine(tiny_llama, tmp_path):
    model, tokenizer = tiny_llama
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    source = describe(
        ModelConfig(name="x", source="local", path=str(tmp_path / "dense"), dtype="float32", device="cpu")
    )
    model, tokenizer = load_dense(source)
    checkpoint.save(cut(model, [0, 1, 3]), tokenizer, tmp_path / "model", card="# card", config=source.config)
    for file in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_files_have_the_mode_that_the_umask_gives(tiny_llama, tmp_path):
    model, tokenizer = tiny_llama
    before = os.umask(0o027)
    try:
        checkpoint.save(model, tokenizer, tmp_path / "model", card="", config=random_source().config)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {"0o640"}, modes


def test_old_names_stand_beside_the_new_and_agree(tiny_llama, tmp_path):
    model, _ = tiny_llama
    config = saved_config(model, tmp_path / "model")
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10000.0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
