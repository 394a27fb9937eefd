"""transformers 4 loads a checkpoint of every family and computes what transformers 5 does."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_source
from plans import narrowing
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
)

from slm_pipeline.export import padded
from slm_pipeline.models import checkpoint
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.loading import byte_tokenizer
from slm_pipeline.models.view import ModelView
from slm_pipeline.models.widths import cut_out, settle
from slm_pipeline.surgery.apply import apply

FOLDER = Path(sys.prefix) / "transformers4"  # make transformers4
TEXT = " It's naïve:\n  x  <extra>"
LENGTH = 40  # tokens, of which windows of 8 see few

ROPE = {"rope_theta": 500.0}
WINDOW = {"sliding_window": 8}
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SETTINGS = {
    "llama": {"rope_parameters": ROPE},
    "llama_llama3": {"rope_parameters": {"rope_type": "llama3", **LLAMA3, **ROPE}},
    "llama_linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}},
    "llama_dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **ROPE},
        "max_position_embeddings": 24,
    },
    "mistral": {"rope_parameters": ROPE, **WINDOW},
    "qwen2": {"rope_parameters": ROPE, "use_sliding_window": True, "max_window_layers": 3, **WINDOW},
    "qwen2_yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **ROPE}
    },
    "qwen3": {"rope_parameters": ROPE, "use_sliding_window": True, "max_window_layers": 3, **WINDOW},
    "phi3": {"rope_parameters": {"partial_rotary_factor": 0.5, **ROPE}, **WINDOW},
    "phi3_longrope": {
        "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.5, **FACTORS, **ROPE},
        "original_max_position_embeddings": 16,
        "max_position_embeddings": 64,
    },
    "gemma": {"rope_parameters": ROPE},
    "gemma2": {"rope_parameters": ROPE, **WINDOW},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", **ROPE},
        },
        "sliding_window_pattern": 2,
        **WINDOW,
    },
    "olmo2": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}},
    "opt": {"max_position_embeddings": 64},
    "gpt_neox": {"rope_parameters": {"partial_rotary_factor": 0.5, **ROPE}},
    "gpt_neox_linear": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5, **ROPE}
    },
}


NARROW = [name for name in SETTINGS if "_" not in name and name != "opt"] + ["gemma3_text"]  # one group, 40 neurons
UNEQUAL = ["llama", "phi3", "gemma3_text", "opt"]  # layers of different widths
PADDED = ["llama", "gemma3_text"]  # unequal, then filled up with zeros: the stock class
CUSTOM = ["llama", "gemma3_text", "opt", "gpt_neox"]  # saved without one attention and one feed-forward network as well


OTHERS = {
    f"{architecture}_{form}": architecture
    for form, architectures in (("custom", CUSTOM), ("narrow", NARROW), ("unequal", UNEQUAL), ("padded", PADDED))
    for architecture in architectures
}


def architecture_of(name: str) -> str:
    return max((known for known in ARCHITECTURES if name.startswith(known)), key=len)


def make_model(name: str) -> Any:
    """5 layers, the third of 6 taken out; weights so large that positions and windows show in the logits."""
    torch.manual_seed(5)
    architecture = architecture_of(name)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes |= {"ffn_dim" if architecture == "opt" else "intermediate_size": 48}
    if architecture not in ("opt", "gpt_neox"):
        # Wider than 32 / 4, but where transformers counts the factors of positions by that.
        sizes |= {"num_key_value_heads": 2, "head_dim": 8 if "longrope" in name else 12}
    config = AutoConfig.for_model(architecture, **sizes, **copy.deepcopy(SETTINGS[name]))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    view = ModelView(model)
    kept = [0, 1, 3, 4, 5]
    view.rebuild([view.layers[layer] for layer in kept], kept)
    return model


def make_tokenizer(architecture: str) -> Any:
    """The family's own class with a vocabulary of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_letter = {piece: index for index, piece in enumerate(["<pad>", "<s>", "</s>", "<|endoftext|>", *letters])}
    coded = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<s>", "</s>", *coded, "▁", "I", "t"]
    by_piece = {piece: index for index, piece in enumerate(pieces)}
    if architecture.startswith("gemma"):
        return GemmaTokenizer(vocab=by_piece, merges=[])
    if architecture in ("llama", "mistral"):
        return LlamaTokenizer(vocab=by_piece, merges=[], additional_special_tokens=["<extra>"])
    if architecture == "opt":
        return GPT2Tokenizer(vocab=by_letter, merges=[], add_bos_token=True, bos_token="</s>", pad_token="<pad>")
    if architecture.startswith("qwen"):
        return Qwen2Tokenizer(vocab=by_letter, merges=[])
    if architecture == "gpt_neox":
        return GPTNeoXTokenizer(vocab=by_letter, merges=[], add_prefix_space=True)
    return byte_tokenizer()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """For each checkpoint what transformers 5 makes of it, and what transformers 4 does."""
    assert (FOLDER / "transformers").is_dir(), f"no transformers 4 in {FOLDER}: make transformers4 installs it"
    root = tmp_path_factory.mktemp("transformers4")
    expected = {}
    for name in (*SETTINGS, *OTHERS):
        model, tokenizer = make_model(OTHERS.get(name, name)), make_tokenizer(architecture_of(name))
        if name.endswith("_custom"):
            cut_out(view := ModelView(model), {"attention": [0, 2], "mlp": [3]})
            settle(view)
        if name.endswith("_narrow"):
            apply(narrowing(dict.fromkeys(range(5), ([1], range(40))), num_layers=5), model)
        if name.endswith(("_unequal", "_padded")):
            apply(narrowing({0: ([0], range(4)), 3: ([1], None)}, num_layers=5), model)
        if name.endswith("_padded"):
            model = padded.pad(model)
        input_ids = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(3))
        inputs = tokenizer(TEXT, return_tensors="pt")
        with torch.no_grad():
            expected[name] = {
                "logits": model(input_ids=input_ids).logits[0],
                "dtype": "torch.float32",
                "token_ids": inputs["input_ids"][0].tolist(),
                "decoded": tokenizer.decode(inputs["input_ids"][0]),
                "generated": model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0].tolist(),
            }
        checkpoint.save(model, tokenizer, root / name, card="", config=random_source().config)
        options: dict[str, Any] = {"trust_remote_code": True} if name.endswith(("_custom", "_unequal")) else {}
        if architecture_of(name) == "gemma2":
            options["attn_implementation"] = "eager"  # its default in transformers 4 leaves out the softcapping
        asked = {"input_ids": input_ids[0].tolist(), "text": TEXT, "options": options}
        (root / f"{name}.json").write_text(json.dumps(asked))
    out = root / "found" / "out.json"
    out.parent.mkdir()
    program = Path(__file__).with_name("load_with_transformers4.py")
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "HF_MODULES_CACHE": str(root / "modules")}
    run = subprocess.run([sys.executable, program, root, out], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    return {name: (expected[name], found[name]) for name in expected}


@pytest.mark.parametrize("name", [*SETTINGS, *(name for name in OTHERS if name != "gpt_neox_custom")])
def test_transformers_4_computes_the_same(both, name):
    expected, found = both[name]
    torch.testing.assert_close(torch.tensor(found.pop("logits")), expected.pop("logits"), rtol=1e-5, atol=1e-5)
    assert found == expected


def test_a_head_that_transformers_4_would_draw_anew_is_refused_there(both):
    assert both["gpt_neox_custom"][1] == {
        "error": "a GPT-NeoX checkpoint whose layers differ needs transformers 5 or later"
    }


def test_every_family_is_among_them():
    assert {architecture_of(name) for name in SETTINGS} == set(ARCHITECTURES)
