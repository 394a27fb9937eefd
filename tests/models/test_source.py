"""Fingerprints of models that are not loaded, and the models that are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import model_folders as folders
import pytest
import torch
from conftest import random_source

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models import folder as model_folder
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.loading import byte_tokenizer, load_dense, load_dense_tokenizer
from slm_pipeline.models.source import describe

LLAMA = {"model_type": "llama", "num_hidden_layers": 5}
RANDOM = {
    "source": "random", "architecture": "llama", "dtype": "float32", "num_layers": 2, "hidden_size": 64,
    "intermediate_size": 1024, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 512, "seed": 1,
}  # fmt: skip


@pytest.fixture
def folder(sound_models: dict[str, Path], tmp_path: Path) -> Path:
    """A sound model folder, to be changed."""
    return folders.copy(sound_models["llama"], tmp_path / "model")


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def local(folder: Path, **options: object):
    return describe(ModelConfig(name="local", source="local", path=str(folder), **options))


def test_local_model(folder):
    source = local(folder)
    assert (source.name, source.num_layers, source.max_positions) == ("local", 4, 2048)
    assert source.special_tokens == {"bos", "eos", "pad"}
    assert source.fingerprint.startswith("local:")
    assert local(folder).fingerprint == source.fingerprint
    assert local(folder, dtype="float32").fingerprint != source.fingerprint  # other numbers come out
    assert local(folder, device="cpu").fingerprint == source.fingerprint


def with_equal_times(folder: Path, change) -> None:
    """Change a folder and leave it with the sizes' and times' look of a normalised archive."""
    change(folder)
    for file in folder.rglob("*"):
        os.utime(file, (0, 0))


def add_a_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")


def change_a_weight(folder: Path) -> None:
    def change(tensors: dict) -> dict:
        tensors["model.layers.2.input_layernorm.weight"][3] += 1
        return tensors

    folders.edit_weights(folder, change)


@pytest.mark.parametrize(
    "change",
    [
        folders.config(rope_theta=5.0),
        lambda folder: folders.edit_json(folder, "generation_config.json", temperature=0.9),
        lambda folder: folders.edit_json(folder, "tokenizer_config.json", model_max_length=9),
        lambda folder: folders.edit_json(folder, "tokenizer.json", version="1.1"),
        lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "modeling_own.py").write_text("pass"),
        add_a_template,
        change_a_weight,
        folders.weights(lambda tensors: {**tensors, "more": torch.zeros(1)}),
    ],
    ids=["config", "generation", "tokenizer settings", "tokenizer", "special tokens", "template", "code", "template 2",
         "weight", "tensor"],
)  # fmt: skip
def test_fingerprint_changes_with_whatever_may_change_the_model(change, folder):
    before = local(folder).fingerprint
    with_equal_times(folder, change)
    assert local(folder).fingerprint != before


def test_fingerprint_does_not_change_with_what_does_not_matter(folder, tmp_path):
    before = local(folder).fingerprint
    (folder / "README.md").write_text("A model.")
    assert local(folder).fingerprint == before
    with_equal_times(folder, lambda _: None)
    assert local(folder).fingerprint == before
    assert local(folders.copy(folder, tmp_path / "elsewhere")).fingerprint == before


def test_two_trainings_of_equal_sizes_and_times_are_two_models(sound_models, tmp_path):
    prints = set()
    for name in ("llama", "llama_other_seed"):
        folder = folders.copy(sound_models[name], tmp_path / name)
        with_equal_times(folder, lambda _: None)
        prints.add(local(folder).fingerprint)
    assert len(prints) == 2


def test_a_change_of_any_tensor_is_seen_in_weights_that_are_not_read_whole(folder, monkeypatch):
    """As of a training of one small tensor in a model of gigabytes: every tensor has its blocks."""
    monkeypatch.setattr("slm_pipeline.models.folder.SAMPLED_BYTES", 39 * 32)  # 32 bytes of each of the 39 tensors
    read = []
    honest = model_folder._blocks
    monkeypatch.setattr(model_folder, "_blocks", lambda *sizes: read.append(honest(*sizes)) or read[-1])
    before = local(folder).fingerprint
    assert sum(length for blocks in read for _, length in blocks) == 39 * 32
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        folders.edit_weights(folder, lambda tensors, name=name: {**tensors, name: tensors[name] + 1})
        after = local(folder).fingerprint
        assert after != before
        before = after


def test_fingerprint_of_random_weights_is_of_what_they_are_made_from():
    prints = {
        random_source().fingerprint,
        random_source(num_layers=7).fingerprint,
        random_source(hidden_size=64).fingerprint,
        random_source(seed=5).fingerprint,
        random_source("qwen3").fingerprint,
    }
    assert len(prints) == 5
    assert random_source().fingerprint in prints


def test_random_weights_of_another_kind_of_device_are_another_model(monkeypatch):
    """The same seed gives other numbers on a GPU."""
    config = ModelConfig(**{**vars(random_source().config), "device": "auto"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = describe(config).fingerprint
    assert on_cpu == random_source().fingerprint  # device=cpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    on_gpu = describe(config).fingerprint
    assert on_gpu != on_cpu
    assert {describe(ModelConfig(**{**vars(config), "device": f"cuda{n}"})).fingerprint for n in ("", ":1")} == {on_gpu}
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="random weights are drawn on cuda, PyTorch says cpu"):
            load_dense(describe(config))
    with pytest.raises(UserError, match="model.device=balanced spreads stored weights over GPUs"):
        describe(ModelConfig(**{**vars(config), "device": "balanced"}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "rwkv"}, "'rwkv' is not supported; supported: gemma, gemma2"),
        ({}, "None is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts .num_local_experts=8"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts .num_experts=128"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "mixture of experts"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 15}, "reuse the keys and values of earlier ones"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "OPT-350m"),
    ],
)
def test_architectures_that_cannot_be_cut_are_refused(config, message, folder):
    write_config(folder, {"num_hidden_layers": 4, **config})
    with pytest.raises(UserError, match=message):
        local(folder)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_supported_architectures_are_described_and_loaded(architecture, tmp_path, caplog):
    """The names and shapes that a header must have are those that transformers writes, also without the head."""
    folder = folders.save(tmp_path / "model", architecture)
    source = local(folder, dtype="float32", device="cpu")
    assert (source.num_layers, source.model_type, source.warnings) == (4, architecture, ())
    load_dense(source)
    decoder, _, _ = source.architecture.decoder.partition(".")
    folders.edit_json(folder, tie_word_embeddings=True)
    folders.edit_weights(
        folder, lambda tensors: {k.removeprefix(f"{decoder}."): v for k, v in tensors.items() if k.startswith(decoder)}
    )
    assert local(folder).num_layers == 4
    folders.edit_json(folder, num_hidden_layers=5, layer_types=None)
    with pytest.raises(UserError, match=r"its files lack \d+ tensors of the model .*[.]4[.]"):
        local(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "model.source='web' is not one of bundled, hub, local, random"),
        ({"source": "bundled", "name": "gpt5"}, "model.name='gpt5' is not bundled; bundled: smollm2_135m"),
        ({"source": "local"}, "needs model.path=FOLDER"),
        ({"source": "local", "path": "nowhere"}, "model.path='nowhere' is not a folder"),
        ({"source": "hub"}, "needs model.repo="),
        ({"source": "random", "dtype": "int8"}, "model.dtype='int8' is not one of float32, bfloat16, float16"),
        ({"source": "random", "device": "tpu"}, "model.device='tpu' is not one of"),
        ({**RANDOM, "num_layers": None}, "model.num_layers=null"),
        (
            {**RANDOM, "num_layers": 10_000, "hidden_size": 65536},
            r"takes \d+ GB and this machine has 8 GB; make model.hidden_size smaller",
        ),
        (  # a layer has 2 * 1024 * 2048 + 2 * 1024 * 1024 numbers of 4 bytes, the embedding 4 GB
            {**RANDOM, "num_layers": 10_000, "hidden_size": 1024, "vocab_size": 10**6},
            r"takes 256 GB and this machine has 8 GB; model.num_layers=155 would fit",
        ),
    ],
)
def test_unusable_options(options, message, monkeypatch):
    monkeypatch.setattr("slm_pipeline.machine.memory.of_machine", lambda: 8 * 10**9)
    with pytest.raises(UserError, match=message):
        describe(ModelConfig(**{"name": "x", **options}))


def test_hub_without_a_network_says_what_to_do_instead(monkeypatch):
    """At once: huggingface_hub would try for half a minute."""
    monkeypatch.setattr("slm_pipeline.machine.network.hub_answers", lambda: False)
    said = (
        r"model.repo='nobody/nothing' cannot be had .* \(https://huggingface.co does not answer\).* model.path=FOLDER"
    )
    with pytest.raises(UserError, match=said):
        describe(ModelConfig(name="x", source="hub", repo="nobody/nothing"))


def test_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    """A stand-in for the hub's cache: <cache>/models--a--b/snapshots/<commit>/config.json."""
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    write_config(snapshot, {"model_type": "llama", "num_hidden_layers": 5, "max_position_embeddings": 64})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(snapshot / "config.json"))
    monkeypatch.setattr("slm_pipeline.machine.network.hub_answers", lambda: True)
    source = describe(ModelConfig(name="x", source="hub", repo="a/b"))
    assert (source.fingerprint, source.num_layers) == ("hub:a/b@0123abc:bfloat16", 5)
    assert source.max_positions == 64
    asked = []
    monkeypatch.setattr(
        "slm_pipeline.models.loading.AutoTokenizer.from_pretrained",
        lambda place, revision, **_: asked.append((place, revision)) or byte_tokenizer(),
    )
    load_dense_tokenizer(source)
    assert asked == [("a/b", "0123abc")]  # and not what the branch has become meanwhile
    write_config(snapshot, {"model_type": "llama", "num_hidden_layers": "5", "quantization_config": {"bits": 4}})
    with pytest.raises(UserError, match="model.repo='a/b': config.json has num_hidden_layers=.*; it is a quantised"):
        describe(ModelConfig(name="x", source="hub", repo="a/b"))
