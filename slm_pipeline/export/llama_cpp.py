"""How llama.cpp keeps and runs each architecture, where that is not what transformers does.

The names of tensors are not here: the ``gguf`` package has them. llama.cpp's rules are those of its loaders and graphs
(ggml-org/llama.cpp, src/models/<architecture>.cpp); what one of them cannot express is refused, never left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from slm_pipeline.errors import UserError
from slm_pipeline.models.architectures import PRUNED

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView


_IDLE_NEURONS = 32  # where deci would leave out the attention too; a row of quantised weights is no shorter


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp.

    Attributes:
        name: as GGUF files call it.
        activation: the only one that its graph has, as config.json calls it.
        rotates_pairs: rotary embeddings turn neighbours (2i, 2i + 1) and not halves (i, i + d/2), so that the rows of
            query and key projections are kept in another order.
        own_head: the file holds a head of its own: True must, False must not (it is the embedding), None may.
        heads_fill_hidden: heads times their width must be the hidden size.
        has_biases: query, key and value projections have biases: True must, False must not, None may.
        slides: its graph has sliding windows: every n-th layer attends to all, n from 1.
        scale_depths: numbers of layers at which its graph divides queries by sqrt(hidden size / heads) instead of
            sqrt(head width), because the published model of that depth does.
        per_layer: each layer has its own numbers of heads and neurons, or none.
        frequency_factors: its graph scales rotary frequencies one by one (llama3, longrope).
    """

    name: str
    activation: str = "silu"
    rotates_pairs: bool = False
    own_head: bool | None = None
    heads_fill_hidden: bool = False
    has_biases: bool | None = False
    slides: bool = False
    scale_depths: tuple[int, ...] = ()
    per_layer: bool = False
    frequency_factors: tuple[str, ...] = ()


_LLAMA = Family("llama", rotates_pairs=True, has_biases=None, frequency_factors=("llama3",))
_DECI = replace(_LLAMA, name="deci", per_layer=True)
_GEMMA = Family("gemma", activation="gelu_pytorch_tanh", own_head=False)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "pruned_llama": _DECI,
    "pruned_mistral": _DECI,
    "qwen2": Family("qwen2", heads_fill_hidden=True, has_biases=True),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3", heads_fill_hidden=True, frequency_factors=("longrope",)),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, name="gemma2", slides=True, scale_depths=(46,)),
    "gemma3_text": replace(_GEMMA, name="gemma3", slides=True, scale_depths=(62,)),
    "olmo2": Family("olmo2", own_head=True, heads_fill_hidden=True),
    "gpt_neox": Family("gptneox", activation="gelu", own_head=True, heads_fill_hidden=True, has_biases=True),
}


def family_of(model_type: str) -> Family:
    """The entry of an architecture.

    Raises:
        UserError: llama.cpp has no such architecture, or not with layers that differ.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.startswith(PRUNED):
        raise UserError(
            f"layers of this {model_type.removeprefix(PRUNED)} differ in width or lack a sublayer, which llama.cpp has"
            " for llama and mistral alone: make it zero-padded first (slm-export padded), or prune with"
            " method.export=stock"
        )
    known = sorted(name for name in FAMILIES if not name.startswith(PRUNED))
    raise UserError(f"llama.cpp has no model_type={model_type!r}; of what is supported it has {', '.join(known)}")


def may_run(description: Mapping[str, Any]) -> bool:
    """Whether llama.cpp has the architecture of a config.json and its kinds of layers; `check` looks at all else."""
    model_type = str(description["model_type"])
    if model_type != "gemma3_text":
        return model_type in FAMILIES
    kinds = description.get("layer_types") or []
    return period([1 if kind == "sliding_attention" else None for kind in kinds]) is not None


def check(view: ModelView, family: Family) -> None:
    """Raise `UserError` for whatever of this model llama.cpp's graph of its architecture does not compute."""
    config, wrong = view.config, []
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if family.name.startswith("gemma"):  # Gemma's own hidden_act is ignored where hidden_activation is set
        activation = getattr(config, "hidden_activation", None) or activation
    if activation != family.activation:
        wrong.append(f"its activation is {activation}, there it is {family.activation}")
    heads = config.num_attention_heads * view.head_dim
    if family.heads_fill_hidden and heads != config.hidden_size:
        wrong.append(f"its heads are {heads} wide together, there they are as wide as hidden_size={config.hidden_size}")
    if family.has_biases is not None and family.has_biases != (has_biases := _has_biases(view)):
        wrong.append(f"its attention has {'' if has_biases else 'no '}biases, there it is the other way round")
    if family.own_head is False and not view.ties_embeddings:
        wrong.append("its head is not its embedding, there it is")
    if getattr(view.head, "bias", None) is not None:
        wrong.append("its head has a bias, there it has none")
    if family.name == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not getattr(config, key, None):
                wrong.append(f"it has no {key}, there it has one")
    if family.name == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        wrong.append("it has attn_logit_softcapping, there it has none")
    if getattr(config, "use_bidirectional_attention", None):
        wrong.append("it attends to what comes after, there it does not")
    if family.slides and period(view.attention_windows()) is None and not _may_all_attend(view):
        kinds = "".join("s" if window else "F" for window in view.attention_windows())
        wrong.append(
            f"its layers are {kinds} (s sliding, F full attention), there every n-th and no other has full attention;"
            " prune its width, or whole periods of layers"
        )
    scaling = rope_type(rope(view))
    if scaling not in ("default", "linear", *family.frequency_factors):
        wrong.append(f"its positions are scaled by rope_type={scaling}, which there is not done alike")
    if family.name == "gemma3" and not any(view.attention_windows()) and scaling != "default":
        wrong.append(f"none of its layers slides, and there rope_type={scaling} needs some that do")
    if wrong:
        raise UserError(f"llama.cpp does not run this {config.model_type} as it is: {'; '.join(wrong)}")


def period(windows: Sequence[int | None]) -> int | None:
    """n if every n-th layer, and no other, attends to all; more than there are layers if none does.

    None if no n describes them. llama.cpp's layer i slides where ``i % n < n - 1``.
    """
    for n in range(1, len(windows) + 2):
        if all((window is not None) == (layer % n < n - 1) for layer, window in enumerate(windows)):
            return n
    return None


def _has_biases(view: ModelView) -> bool:
    inputs = view.layers[0].get_submodule(view.architecture.attention_inputs[0])
    return getattr(inputs, "bias", None) is not None


def _may_all_attend(view: ModelView) -> bool:
    """Whether layers that slide differ in nothing but the window, which short texts do not notice."""
    return "sliding_attention" not in (getattr(view.config, "rope_parameters", None) or {})


def context_length(view: ModelView, family: Family) -> int:
    """Tokens that the file says the model is made for.

    No more than its window where layers slide and llama.cpp lets them attend to all: up to there both are one function.
    """
    length = int(view.config.max_position_embeddings)
    windows = view.attention_windows()
    if family.slides and period(windows) is not None:
        return length
    return min([length, *(window for window in windows if window)])


def _sliding(view: ModelView) -> tuple[int | None, int]:
    """The window, and n of `period`; (None, more than there are layers) if the window is to hide nothing.

    llama.cpp ends itself over a model of these architectures in which no layer slides.
    """
    windows = view.attention_windows()
    window, pattern = max(windows, key=lambda window: window or 0), period(windows)
    return (None, view.num_layers + 1) if window is None or pattern is None else (window, pattern)


def rope(view: ModelView) -> dict[str, Any]:
    """Rotary settings of layers with full attention."""
    found: dict[str, Any] = view.config.rope_parameters
    return found.get("full_attention", found)


def rope_type(settings: dict[str, Any]) -> str:
    return str(settings.get("rope_type") or "default")


def metadata(view: ModelView, family: Family) -> dict[str, int | float | bool | list[int]]:
    """Sizes and settings by their keys within the architecture, typed as GGUF wants them."""
    config, settings = view.config, rope(view)
    rotated = int(view.head_dim * float(settings.get("partial_rotary_factor") or 1.0))
    groups, neurons = _groups(view), _neurons(view)
    heads = [view.heads_per_group * count for count in groups]
    found: dict[str, int | float | bool | list[int]] = {
        "context_length": context_length(view, family),
        "embedding_length": int(config.hidden_size),
        "block_count": view.num_layers,
        "feed_forward_length": neurons if family.per_layer else neurons[0],
        "attention.head_count": heads if family.per_layer else heads[0],
        "attention.head_count_kv": groups if family.per_layer else groups[0],
        "attention.key_length": view.head_dim,
        "attention.value_length": view.head_dim,
        "rope.dimension_count": rotated,
        "rope.freq_base": float(settings["rope_theta"]),
        "vocab_size": int(view.model.get_input_embeddings().weight.shape[0]),
    }
    if family.name == "gptneox":
        found["attention.layer_norm_epsilon"] = float(config.layer_norm_eps)
        found["use_parallel_residual"] = bool(config.use_parallel_residual)
    else:
        found["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value := getattr(config, key, None):
            found[key] = float(value)
    if family.slides:
        window, pattern = _sliding(view)
        found["attention.sliding_window"] = window or context_length(view, family)
        found["attention.sliding_window_pattern"] = pattern
        found["rope.freq_base_swa"] = float(settings["rope_theta"])
        if window is not None and "sliding_attention" in config.rope_parameters:
            found["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if rope_type(settings) == "linear":
        found["rope.scaling.factor"] = float(settings["factor"])
    if rope_type(settings) == "longrope":
        original = settings.get("original_max_position_embeddings") or config.original_max_position_embeddings
        found["rope.scaling.original_context_length"] = int(original)
        found["rope.scaling.attn_factor"] = float(_rotary(view).attention_scaling)
    return found


def _groups(view: ModelView) -> list[int]:
    """Key-value groups of each layer; 0 where there is no attention, but for the first layer.

    llama.cpp takes the first layer's number of heads for the model's; there `_idle` puts one group.
    """
    return [view.kv_heads_of(layer) or int(layer == 0) for layer in range(view.num_layers)]


def _neurons(view: ModelView) -> list[int]:
    """Hidden neurons of each layer; where there is no feed-forward network, those of `_idle`."""
    return [view.neurons_of(layer) or _IDLE_NEURONS for layer in range(view.num_layers)]


def scaling_type(view: ModelView) -> str | None:
    """``rope.scaling.type``; None where each frequency has a factor of its own, or none has."""
    return "linear" if rope_type(rope(view)) == "linear" else None


def frequency_factors(view: ModelView) -> dict[str, Tensor]:
    """What each rotary frequency is divided by, by the names of tensors; [rotated / 2] float32."""
    import torch

    settings = rope(view)
    if rope_type(settings) == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(settings[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    if rope_type(settings) != "llama3":
        return {}
    scaled = _rotary(view).inv_freq.float().cpu()
    plain = float(settings["rope_theta"]) ** -(torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
    return {"rope_freqs.weight": plain / scaled}


def _rotary(view: ModelView) -> Any:
    return next(module for module in view.decoder.modules() if hasattr(module, "attention_scaling"))


def tensors(view: ModelView, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the file holds, by transformers' name, as llama.cpp wants its values; one at a time."""
    scale = _query_scale(view, family)
    for name, value in view.model.state_dict().items():
        if name.startswith(f"{view.architecture.decoder}."):
            yield name, _converted(name, value.detach(), view, family, scale)
    yield from _idle(view)
    if family.own_head or not view.ties_embeddings:
        yield f"{view.architecture.head}.weight", cast(Any, view.head).weight.detach()


def _idle(view: ModelView) -> Iterator[tuple[str, Tensor]]:
    """Sublayers of zeros, with norms, that add nothing: where llama.cpp cannot do without."""
    parts, width = view.architecture, int(view.config.hidden_size)
    like = view.model.get_input_embeddings().weight
    blocks = [f"{parts.decoder}.{parts.layers}.{layer}" for layer in range(view.num_layers)]
    if view.lacks(0, "attention"):
        keys = view.head_dim
        queries = keys * view.heads_per_group
        yield f"{blocks[0]}.{parts.attention_norms[0]}.weight", like.new_ones(width)
        for name, rows in zip(parts.attention_inputs, (queries, keys, keys), strict=True):
            yield f"{blocks[0]}.{name}.weight", like.new_zeros(rows, width)
        yield f"{blocks[0]}.{parts.attention_output}.weight", like.new_zeros(width, queries)
    for layer in (layer for layer in range(view.num_layers) if view.lacks(layer, "mlp")):
        yield f"{blocks[layer]}.{parts.mlp_norms[0]}.weight", like.new_ones(width)
        for name in parts.mlp_inputs:
            yield f"{blocks[layer]}.{name}.weight", like.new_zeros(_IDLE_NEURONS, width)
        yield f"{blocks[layer]}.{parts.mlp_output}.weight", like.new_zeros(width, _IDLE_NEURONS)


def _query_scale(view: ModelView, family: Family) -> float:
    """What queries must be multiplied by for attention to be scaled as in transformers."""
    wanted = getattr(view.config, "query_pre_attn_scalar", None)
    if not wanted:
        return 1.0
    by_depth = view.config.hidden_size // view.config.num_attention_heads
    there = by_depth if view.num_layers in family.scale_depths else view.head_dim
    return math.sqrt(there / wanted)


def _converted(name: str, value: Tensor, view: ModelView, family: Family, scale: float) -> Tensor:
    architecture = view.architecture
    if value.ndim == 1 and architecture.gain_offset and name.endswith("norm.weight"):
        value = value.float() + architecture.gain_offset
    scaled = "q_norm.weight" if family.name == "gemma3" else "q_proj.weight"
    if scale != 1.0 and name.endswith(scaled):
        value = value.float() * scale
    if family.rotates_pairs and (".q_proj." in name or ".k_proj." in name):
        return pairs_beside(value, value.shape[0] // view.head_dim)
    if architecture.heads_interleaved and f".{architecture.attention_inputs[0]}." in name:
        return query_key_value(value, view.config.num_attention_heads)
    return value


def pairs_beside(value: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves, (0 .. d/2, d/2 .. d), to pairs, (0, d/2, 1, d/2 + 1, ...): [heads * d, ...]."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)


def query_key_value(value: Tensor, heads: int) -> Tensor:
    """Rows of all queries, then all keys, then all values, from those of head after head: [heads * 3 * d, ...]."""
    return value.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(value.shape)
