"""Model folders for tests: small random models on disk, whole, or with the faults that people report.

``sound_models`` of conftest.py saves the whole ones once; a fault is a change to a copy of one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from slm_pipeline.models.loading import BOS, EOS, PAD, byte_tokenizer

SOUND: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_other_seed": {"seed": 1},
    "llama_shards": {"max_shard_size": "60KB"},
    "llama_32_layers": {"num_hidden_layers": 32, "hidden_size": 8, "intermediate_size": 8},
    "gemma3_text": {"head_dim": 16},
    "opt": {"max_position_embeddings": 48},
    "opt_proj": {"word_embed_proj_dim": 16, "max_position_embeddings": 48},
}


def save(folder: Path, architecture: str, *, seed: int = 0, max_shard_size: str = "5GB", **sizes: Any) -> Path:
    """Save a random float32 model of 4 layers, hidden size 32 and 300 tokens, and its byte tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, **sizes}
    if architecture == "opt":
        sizes = {"word_embed_proj_dim": 32, "ffn_dim": sizes.pop("intermediate_size"), **sizes}
    else:
        sizes["num_key_value_heads"] = 2
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, vocab_size=300, **special, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_all(root: Path) -> dict[str, Path]:
    return {name: save(root / name, name.split("_")[0] if name != "gemma3_text" else name, **how)
            for name, how in SOUND.items()}  # fmt: skip


def edit_json(folder: Path, file: str = "config.json", **values: Any) -> None:
    """Set some keys of a JSON file."""
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**content, **values}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict], dict], file: str = "model.safetensors") -> None:
    """Write what ``change`` makes of the tensors of a file."""
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})


def without_a_tensor_of_its_index(folder: Path) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    edit_weights(folder, lambda tensors: {key: value for key, value in tensors.items() if key != name}, shard)


def edit_index(folder: Path, **values: Any) -> None:
    edit_json(folder, "model.safetensors.index.json", **values)


def without_special_tokens(folder: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer).save_pretrained(folder)


def with_more_tokens_than_rows(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"the{number}" for number in range(60)])
    tokenizer.save_pretrained(folder)


def with_an_adapter(folder: Path) -> None:
    """As peft saves it beside the weights: of rank 1 on one projection."""
    about = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(1, 32), f"{prefix}.lora_B.weight": torch.ones(32, 1)},
        folder / "adapter_model.safetensors",
    )


def replace_by(kind: str, file: str) -> Callable[[Path], None]:
    """A change that puts something else where a file was: folder, fifo, link (broken), nothing, empty, truncated."""

    def change(folder: Path) -> None:
        path = folder / file
        content = path.read_bytes()
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to("nowhere")
        elif kind != "nothing":
            path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "utf-16": content.decode(
                errors="replace").encode("utf-16"), "latin-1": b'{"a": "\xe9"}', "null": b"null", "list": b"[1, 2]",
                "deep": b"[" * 100_000}[kind])  # fmt: skip

    return change


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, **values)


def weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, change)


def copy(source: Path, target: Path, change: Callable[[Path], object] = lambda folder: None) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def plain_transformers(folder: Path, input_ids: torch.Tensor, tmp_path: Path) -> list[str]:
    """What a process without this package prints that loads a checkpoint with its own code: six tokens after the first
    row, and whether loading is refused without that code's being trusted."""
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(model.generate(torch.tensor([{input_ids[0].tolist()}]), max_new_tokens=6, do_sample=False)[0].tolist())
assert not any(name.startswith("slm_pipeline") for name in sys.modules)
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=False)
except ValueError as error:
    print("refused", "trust_remote_code=True" in str(error))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    return found.stdout.splitlines()
