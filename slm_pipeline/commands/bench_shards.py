"""A checkpoint of a 70B Llama in 16 GB of disk: random weights, 80 layers that share the shards of eight.

The header of a shard names the tensors of several layers at the same offsets. The safetensors library refuses such a
file, so that ``model.device=stream`` alone reads it. Layers that share a shard are equal; each pass reads 80 blocks all
the same, from the page cache where the shards fit into it.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slm_pipeline.config import ModelConfig
    from slm_pipeline.models.source import ModelSource


@dataclass(frozen=True)
class Shape:
    """Of a Llama, and how many of its layers have weights of their own."""

    layers: int = 80
    shards: int = 8
    hidden: int = 8192
    neurons: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocab: int = 32000

    @classmethod
    def of(cls, model: ModelConfig) -> Shape:
        """A random model's, in two shards."""
        sizes = (model.hidden_size, model.intermediate_size, model.num_heads, model.num_kv_heads, model.vocab_size)
        layers, hidden, neurons, heads, kv_heads, vocab = (int(size or 1) for size in (model.num_layers, *sizes))
        return cls(layers, 2, hidden, neurons, heads, kv_heads, vocab)


def write(folder: Path, shape: Shape) -> None:
    """Write the checkpoint, in bfloat16, with a byte tokenizer."""
    import torch

    from slm_pipeline.models.loading import byte_tokenizer

    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1234)
    weight_map: dict[str, str] = {}

    def write_shard(number: int, tensors: dict[str, tuple[int, ...]], parents: Sequence[str]) -> None:
        file = f"model-{number + 1:05}-of-{shape.shards + 1:05}.safetensors"
        header, start = {}, 0
        for own, size in tensors.items():
            end = start + 2 * torch.Size(size).numel()
            for name in (f"{parent}{own}" for parent in parents):
                header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
                weight_map[name] = file
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for size in tensors.values():
                value = torch.ones(size) if len(size) == 1 else torch.randn(size, device=device) * 0.02
                out.write(value.bfloat16().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    for shard in range(shape.shards):
        layers = range(shard, shape.layers, shape.shards)
        write_shard(shard, _block(shape), [f"model.layers.{layer}." for layer in layers])
    ends = {"model.embed_tokens.weight": (shape.vocab, shape.hidden), "model.norm.weight": (shape.hidden,)}
    write_shard(shape.shards, ends | {"lm_head.weight": (shape.vocab, shape.hidden)}, [""])
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    byte_tokenizer().save_pretrained(folder)


def seconds_of_a_pass(source: ModelSource) -> float:
    """That bringing each block to where it runs takes, without running it: the second of two passes."""
    import torch

    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView

    view = ModelView(load_dense(source)[0])
    for _ in range(2):
        started = time.perf_counter()
        for layer in range(view.num_layers):
            view.bring(layer)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        view.rest()
    if view.stream is not None:
        view.stream.close()
    return seconds


def _block(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, keys = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (shape.neurons, hidden),
        "mlp.up_proj.weight": (shape.neurons, hidden),
        "mlp.down_proj.weight": (hidden, shape.neurons),
    }


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.neurons,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "dtype": "bfloat16",
    }
