"""Where each supported architecture keeps its parts. Everything else in the package asks `ModelView`.

A new architecture is one entry here, or one that a plugin adds to `ARCHITECTURES` when it is imported, if its blocks
map a residual stream to a residual stream and share nothing with other blocks. Importing this module stays cheap: no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slm_pipeline.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """Module paths of a causal language model in transformers.

    ``attention`` and ``mlp`` are the children of a block that make up its two sublayers (the feed-forward network of
    some architectures is no module of its own), ``attention_norms`` and ``mlp_norms`` the normalisation layers that go
    with them. Every other parameter of a block (projections, biases, q/k norms) counts as part of its projections.
    """

    decoder: str = "model"  # from the causal LM to the module that runs the blocks
    embedding: str = "embed_tokens"  # from the decoder, as all below
    layers: str = "layers"
    final_norm: str = "norm"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    input_rms_norms: bool = True  # the first of each is an RMS norm right before the sublayer's first projections
    gain_offset: float = 0.0  # such a norm multiplies by its weight plus this
    output_norms: bool = False  # a norm stands between a sublayer's last projection and the residual stream
    attention: str = "self_attn"
    attention_inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # from the block
    query_key_norms: tuple[str, ...] = ()  # the norms of queries and of keys where they are as wide as all heads
    attention_output: str = "self_attn.o_proj"
    heads_interleaved: bool = False  # one fused projection holds query, key and value of each head side by side
    mlp: tuple[str, ...] = ("mlp",)
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    packs: bool = True  # its attention masks keep sequences apart whose position_ids start again in one row
    head: str = "lm_head"  # from the causal LM
    intermediate_size: str = "intermediate_size"  # what config.json calls the number of hidden neurons
    head_dim_is_free: bool = True  # config.json may say how wide a head is; else it is hidden_size / number of heads
    heads_divide_hidden: bool = False  # its configuration takes only numbers of heads that divide hidden_size
    learned_positions: bool = False  # a table with max_position_embeddings rows: there is no position after the last
    needs_bos: bool = False  # without the BOS token before a text its predictions are far off

    @property
    def projections(self) -> tuple[str, ...]:
        """Every linear layer of a block."""
        return (*self.attention_inputs, self.attention_output, *self.mlp_inputs, self.mlp_output)

    @property
    def fuses_queries(self) -> bool:
        """Whether queries, keys and values come from one projection."""
        return len(self.attention_inputs) == 1

    @property
    def norms(self) -> tuple[str, ...]:
        return self.attention_norms + self.mlp_norms


_LLAMA = Architecture()
_GEMMA_2 = Architecture(
    heads_divide_hidden=True,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    gain_offset=1.0,
    output_norms=True,
    needs_bos=True,
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": replace(_LLAMA, heads_divide_hidden=True),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": replace(_LLAMA, attention_inputs=("self_attn.qkv_proj",), mlp_inputs=("mlp.gate_up_proj",)),
    "gemma": replace(_LLAMA, gain_offset=1.0, needs_bos=True),
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "olmo2": Architecture(
        attention_norms=("post_attention_layernorm",),
        mlp_norms=("post_feedforward_layernorm",),
        query_key_norms=("self_attn.q_norm", "self_attn.k_norm"),
        input_rms_norms=False,
        output_norms=True,
    ),
    "opt": Architecture(
        packs=False,  # its position_ids do not reach the mask
        decoder="model.decoder",
        final_norm="final_layer_norm",
        attention_norms=("self_attn_layer_norm",),
        mlp_norms=("final_layer_norm",),
        input_rms_norms=False,
        attention_output="self_attn.out_proj",
        mlp=("fc1", "fc2"),
        mlp_inputs=("fc1",),
        mlp_output="fc2",
        intermediate_size="ffn_dim",
        head_dim_is_free=False,
        learned_positions=True,
    ),
    "gpt_neox": Architecture(
        decoder="gpt_neox",
        embedding="embed_in",
        input_rms_norms=False,
        final_norm="final_layer_norm",
        attention="attention",
        attention_inputs=("attention.query_key_value",),
        heads_interleaved=True,
        attention_output="attention.dense",
        mlp_inputs=("mlp.dense_h_to_4h",),
        mlp_output="mlp.dense_4h_to_h",
        head_dim_is_free=False,
        head="embed_out",
    ),
}
SHIPPED = frozenset(ARCHITECTURES)  # what is said of these changes with this package alone

# How configurations speak of single layers, here and in kindred architectures. No list is known by its length.
# One entry for each layer; widths is what layer_sizes was called in checkpoints of before.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_sizes", "widths")
LAYER_COUNTS = ("max_window_layers",)  # how many of the layers at the input side are of another kind than the rest
LAYER_PERIODS = ("sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval")  # every n-th is

PRUNED = "pruned_"  # prefix of the model types of checkpoints whose layers lack sublayers, or have widths of their own

# Configuration keys of models whose blocks depend on each other or choose their weights per token.
_UNSAFE = {
    "num_kv_shared_layers": "later layers reuse the keys and values of earlier ones",
    "num_experts": "it is a mixture of experts",
    "num_local_experts": "it is a mixture of experts",
    "n_routed_experts": "it is a mixture of experts",
    "num_nextn_predict_layers": "it has extra layers that predict further tokens",
    "per_layer_config": "its layers differ in size or lack parts",
}


def find(config: Mapping[str, Any]) -> Architecture:
    """The entry for a model configuration (``config.json`` as a mapping).

    Raises:
        UserError: the architecture is not in the table, or its layers cannot be removed or merged safely, or a list
            with an entry for each layer has more or fewer.
    """
    model_type = config.get("model_type")
    for key, reason in _UNSAFE.items():
        if config.get(key):
            raise UserError(f"model_type={model_type!r} cannot be cut by layers: {reason} ({key}={config[key]})")
    depth = config.get("num_hidden_layers")
    for key in PER_LAYER_LISTS:
        if isinstance(config.get(key), list) and depth is not None and len(config[key]) != depth:
            raise UserError(f"config.json contradicts itself: {len(config[key])} {key} for {depth} layers")
    architecture = ARCHITECTURES.get(str(model_type).removeprefix(PRUNED))
    if architecture is None:
        raise UserError(f"model_type={model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    if str(model_type).removeprefix(PRUNED) == "opt":
        _check_opt(config)
    if str(model_type).startswith(PRUNED):  # transformers renames nothing in files of these
        return replace(architecture, head=Architecture.head)
    return architecture


def _check_opt(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for the variants of OPT whose hidden states are not what enters and leaves the blocks."""
    if not config.get("do_layer_norm_before", True):
        raise UserError("model_type='opt' with do_layer_norm_before=false (OPT-350m) has no final norm: not supported")
    if config.get("_remove_final_layer_norm"):
        raise UserError("model_type='opt' with _remove_final_layer_norm=true has no final norm: not supported")
    width = config.get("word_embed_proj_dim")
    if width is not None and width != config.get("hidden_size", width):
        raise UserError(
            f"model_type='opt' with word_embed_proj_dim={width} beside hidden_size={config['hidden_size']} has"
            " projections between its embeddings and its blocks: not supported"
        )
