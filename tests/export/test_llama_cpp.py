"""llama.cpp computes from a GGUF file what transformers computes from the model, in every architecture it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from run_llama_cpp import LlamaCpp, make_model

from slm_pipeline.errors import UserError
from slm_pipeline.export import gguf_file, llama_cpp
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.loading import byte_tokenizer
from slm_pipeline.models.view import ModelView
from slm_pipeline.models.widths import cut_out, put, settle

IDS = [int(token) for token in torch.arange(1, 25) * 97 % 256]
ROPE = {"rope_theta": 500.0}
WIDE_HEADS = {"head_dim": 12}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", **ROPE},
}
# What each differs in from the smallest; where llama.cpp has windows, those are shorter than the text.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": ROPE, **WIDE_HEADS}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", **LLAMA3, **ROPE}}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    "mistral": ("mistral", {"rope_parameters": ROPE, "sliding_window": 64, **WIDE_HEADS}),
    "qwen2": ("qwen2", {"rope_parameters": ROPE}),
    "qwen3": ("qwen3", {"rope_parameters": ROPE, **WIDE_HEADS}),
    "phi3": ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5, **ROPE}, "sliding_window": 64}),
    "phi3, longrope": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.5, **FACTORS, **ROPE},
            "original_max_position_embeddings": 256,  # at least as many as llama.cpp's least context
            "max_position_embeddings": 1024,
        },
    ),
    "gemma": ("gemma", {"rope_parameters": ROPE, **WIDE_HEADS}),
    "gemma2": ("gemma2", {"sliding_window": 5, "layer_types": SLIDING, **WIDE_HEADS}),
    "gemma2, layers in disorder": ("gemma2", {"sliding_window": 64, "layer_types": SLIDING[1:] + SLIDING[:1]}),
    "gemma2, as deep as one": ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 8}),
    "gemma2, nothing slides": ("gemma2", {"layer_types": ["full_attention"] * 6}),
    "gemma3": ("gemma3_text", {"rope_parameters": TWO_ROPES, "sliding_window": 5, "layer_types": SLIDING}),
    "gemma3, all slide": (
        "gemma3_text",
        {"rope_parameters": TWO_ROPES, "sliding_window": 5, "layer_types": SLIDING[:1] * 6},
    ),
    "gemma3, nothing slides": ("gemma3_text", {"layer_types": SLIDING[2:3] * 6}),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    "olmo2, one embedding": ("olmo2", {"tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.5, **ROPE}}),
    "gpt_neox, in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}


@torch.no_grad()
def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def difference(model: Any, tmp_path: Any, ids: list[int] = IDS, context: int = 256) -> float:
    """Largest difference of the next token's log-probabilities, in standard deviations over the vocabulary."""
    gguf_file.write(model, byte_tokenizer(), tmp_path / "model.gguf", "f16")
    expected = log_probs(model, ids)
    found = LlamaCpp(tmp_path / "model.gguf", context).log_probs(ids, len(expected))
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path):
    architecture, settings = MODELS[name]
    assert difference(make_model(architecture, **settings), tmp_path) < 0.02


def test_positions_of_long_texts_are_those_of_a_long_context(tmp_path):
    """Of longrope llama.cpp chooses the factors by the context that it is started with, transformers by the text."""
    architecture, settings = MODELS["phi3, longrope"]
    assert difference(make_model(architecture, **settings), tmp_path, IDS * 12, context=512) < 0.02


def narrow(view: ModelView, layer: int, groups: int, neurons: int, *, biases: bool) -> list[str]:
    """Keep the first key-value groups and neurons of a layer."""
    own = dict(view.layers[layer].named_parameters())
    keys = groups * view.head_dim
    queries = keys * view.heads_per_group
    rows = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    rows |= {"mlp.gate_proj": neurons, "mlp.up_proj": neurons}
    new = {f"{name}.weight": own[f"{name}.weight"][:count].clone() for name, count in rows.items()}
    for name, count in {"self_attn.o_proj": queries, "mlp.down_proj": neurons}.items():
        new[f"{name}.weight"] = own[f"{name}.weight"][:, :count].clone()
        if biases:
            new[f"{name}.bias"] = torch.randn(view.config.hidden_size)
    return put(view.layers[layer], new)


def unequal(architecture: str, *, biases: bool = False, absent: dict[str, list[int]] | None = None) -> Any:
    model = make_model(architecture)
    view = ModelView(model)
    sizes = [(1, 40), (2, 64), (2, 13), (1, 64), (2, 20), (1, 16)]
    settle(view, [narrow(view, layer, *size, biases=biases) for layer, size in enumerate(sizes)])
    if absent:
        cut_out(view, absent)
        settle(view)
    return model


@pytest.mark.parametrize("absent", [{}, {"attention": [0, 4], "mlp": [2, 4, 5]}])
@pytest.mark.parametrize(("architecture", "biases"), [("llama", True), ("mistral", False)])
def test_layers_that_differ_run_as_deci(architecture, biases, absent, tmp_path):
    """Layers without attention or feed-forward network, or without both, among those of different widths."""
    assert difference(unequal(architecture, biases=biases, absent=absent), tmp_path) < 0.02


def test_every_supported_architecture_is_exported_or_refused():
    there = {model_type.removeprefix("pruned_") for model_type in llama_cpp.FAMILIES}
    assert ARCHITECTURES.keys() - there == {"opt"}
    assert there <= ARCHITECTURES.keys()


GEMMA3_IN_DISORDER = {"layer_types": SLIDING[1:] + SLIDING[:1], "rope_parameters": TWO_ROPES}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **ROPE}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": ("qwen2", WIDE_HEADS, "heads are 48 wide together, there they are as wide as hidden_size=32"),
    "biases": ("qwen3", {"attention_bias": True}, "its attention has biases, there it is the other way round"),
    "head": ("gemma", {"tie_word_embeddings": False}, "its head is not its embedding"),
    "kinds": ("gemma3_text", GEMMA3_IN_DISORDER, "its layers are sFssFs"),
    "activation": ("llama", {"hidden_act": "gelu"}, "its activation is gelu, there it is silu"),
    "positions": ("qwen2", {"rope_parameters": YARN}, "rope_type=yarn"),
    "no cap": ("gemma2", {"final_logit_softcapping": None}, "no final_logit_softcapping"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(why, tmp_path):
    architecture, settings, words = REFUSED[why]
    with pytest.raises(UserError, match=words):
        gguf_file.write(make_model(architecture, **settings), byte_tokenizer(), tmp_path / "x.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("opt", "llama.cpp has no model_type='opt'"), ("pruned_qwen3", "layers of this qwen3 differ")],
)
def test_what_llama_cpp_does_not_have_is_refused(model_type, words):
    with pytest.raises(UserError, match=words):
        llama_cpp.family_of(model_type)


def test_a_window_that_llama_cpp_does_not_have_limits_the_context(tmp_path):
    said = gguf_file.write(make_model("mistral", sliding_window=10), byte_tokenizer(), tmp_path / "x.gguf", "f16")
    assert len(said) == 1
    assert "up to 10 tokens" in said[0]
    answer = LlamaCpp(tmp_path / "x.gguf").server.handle_completions({"prompt": IDS, "n_predict": 1})
    assert "10" in str(answer["error"])


@pytest.mark.parametrize(
    ("kinds", "n"), [("FFFF", 1), ("ssss", 5), ("sFsF", 2), ("sFs", 2), ("ssFss", 3), ("Fsss", None), ("sFFs", None)]
)
def test_which_layers_llama_cpp_can_let_slide(kinds, n):
    assert llama_cpp.period([4 if kind == "s" else None for kind in kinds]) == n


def test_rows_of_pairs_lie_beside_each_other():
    rows = torch.arange(12)  # two heads of 6 rows
    assert llama_cpp.pairs_beside(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_rows_of_queries_keys_and_values_are_put_together():
    rows = torch.tensor([10, 11, 20, 21, 30, 31, 12, 13, 22, 23, 32, 33])  # q, k, v of one head, then of the other
    assert llama_cpp.query_key_value(rows, 2).tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]
