"""Fingerprints of models that are not loaded, and the models that are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import random_source
from safetensors.torch import save_file

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.source import describe

LLAMA = {"model_type": "llama", "num_hidden_layers": 5}
RANDOM = {
    "source": "random", "architecture": "llama", "dtype": "float32", "num_layers": 2, "hidden_size": 64,
    "intermediate_size": 1024, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 512, "seed": 1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a model folder must have for its weights not to be looked at."""
    write_config(tmp_path, LLAMA)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def local(folder: Path, **options: object):
    return describe(ModelConfig(name="local", source="local", path=str(folder), **options))


def test_local_model(folder):
    source = local(folder)
    assert (source.name, source.num_layers) == ("local", 5)
    assert source.fingerprint.startswith("local:")
    assert local(folder).fingerprint == source.fingerprint
    assert local(folder, dtype="float32").fingerprint != source.fingerprint  # other numbers come out
    assert local(folder, device="cpu").fingerprint == source.fingerprint


def rename_tensor(folder: Path) -> None:
    save_same_time(folder, {"bias": torch.zeros(2, 3)})


def add_weights(folder: Path) -> None:
    save_file({"more": torch.zeros(1)}, folder / "model-00002.safetensors")


def touch_weights(folder: Path) -> None:
    state = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))


def save_same_time(folder: Path, tensors: dict) -> None:
    """Other content under the same name and modification time."""
    file = folder / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    save_file(tensors, file)
    os.utime(file, ns=times)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write_config(folder, {**LLAMA, "rope_theta": 5.0}),
        lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.1"}'),
        lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
        rename_tensor,
        lambda folder: save_same_time(folder, {"weight": torch.zeros(3, 2)}),
        lambda folder: save_same_time(folder, {"weight": torch.zeros(2, 4)}),
        add_weights,
        touch_weights,
    ],
    ids=["config", "tokenizer", "another tokenizer file", "tensor name", "shape", "size", "shard", "time"],
)
def test_fingerprint_changes_with_whatever_may_change_the_model(change, folder):
    before = local(folder).fingerprint
    change(folder)
    assert local(folder).fingerprint != before


def test_fingerprint_does_not_change_with_what_does_not_matter(folder):
    before = local(folder).fingerprint
    (folder / "README.md").write_text("A model.")
    assert local(folder).fingerprint == before


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


def lose_a_shard(folder: Path) -> None:
    shards = {"weight": "model.safetensors", "bias": "model-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def cut(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pickled weights are never",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no \*.safetensors file"),
        (lambda folder: cut(folder, 5), "damaged or incomplete: its header is longer than the file"),
        (lambda folder: cut(folder, 30), "damaged or incomplete: its header is longer than the file"),
        (lambda folder: cut(folder, -1), "damaged or incomplete: .* bytes, its header says"),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(100)), "is not a safetensors file"),
        (lose_a_shard, "lacks model-00002.safetensors, which model.safetensors.index.json names"),
        (lambda folder: write_config(folder, {"model_type": "llama"}), "config.json has no num_hidden_layers"),
    ],
)
def test_damaged_folder_is_refused(damage, message, folder):
    damage(folder)
    with pytest.raises(UserError, match=message):
        local(folder)


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
def test_supported_architectures_are_not(architecture, folder):
    write_config(folder, {"model_type": architecture, "num_hidden_layers": 4, "num_kv_shared_layers": 0})
    assert local(folder).num_layers == 4


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
    monkeypatch.setattr("slm_pipeline.memory.of_machine", lambda: 8 * 10**9)
    with pytest.raises(UserError, match=message):
        describe(ModelConfig(**{"name": "x", **options}))


def test_hub_without_a_network_says_what_to_do_instead():
    with pytest.raises(UserError, match="model.repo='nobody/nothing' cannot be had .* model=local model.path=FOLDER"):
        describe(ModelConfig(name="x", source="hub", repo="nobody/nothing"))


def test_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    """A stand-in for the hub's cache: <cache>/models--a--b/snapshots/<commit>/config.json."""
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    write_config(snapshot, LLAMA)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(snapshot / "config.json"))
    source = describe(ModelConfig(name="x", source="hub", repo="a/b"))
    assert (source.fingerprint, source.num_layers) == ("hub:a/b@0123abc:bfloat16", 5)
