"""What a config.json says of a model, looked at by value: types, ranges, names, and what must go together. No torch.

transformers checks much of this itself, but only once torch is loaded, and some of it only in the forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from slm_pipeline.errors import UserError
from slm_pipeline.models import architectures
from slm_pipeline.models.architectures import Architecture
from slm_pipeline.models.sizes import Sizes

MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 10_000

ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid",
    "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
)  # fmt: skip
ROPE_TYPES: dict[str, tuple[str, ...]] = {  # and what each cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),  # what Phi-3 called it first
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
_DTYPES = ("float64", "double", "float32", "float", "float16", "half", "bfloat16")
_LAYER_TYPES = ("full_attention", "sliding_attention")

# Allowed values, in words and as a check, and the keys that may have them: those, and those that may be null, too.
Allowed = tuple[str, Callable[[Any], bool]]
Kinds = tuple[tuple[Allowed, tuple[str, ...], tuple[str, ...]], ...]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # no NaN either


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _one_of(names: tuple[str, ...]) -> Allowed:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


_BOOLEAN = "true or false", lambda value: type(value) is bool
_POSITIVE = "a positive number", _is_positive
_POSITIVE_FLOAT = "a positive number with a decimal point", lambda value: type(value) is float and _is_positive(value)
_SHARE = "a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1
_SIZE = f"an integer from 1 to {MAX_SIZE}", lambda value: is_size(value, MAX_SIZE)
_INTEGER = "an integer", lambda value: type(value) is int
_TEXT = "a text", lambda value: isinstance(value, str)
_OBJECT = "an object", lambda value: isinstance(value, dict)

# All of these may be absent.
_KINDS: Kinds = (
    (
        _BOOLEAN,
        ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache", "use_sliding_window", "enable_bias",
         "do_layer_norm_before", "layer_norm_elementwise_affine", "use_parallel_residual", "is_decoder"),
        ("use_bidirectional_attention", "output_hidden_states", "return_dict"),
    ),
    (
        _POSITIVE_FLOAT,
        ("rms_norm_eps", "layer_norm_eps", "initializer_range", "init_std"),
        ("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    (_POSITIVE, (), ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct")),
    (
        _SHARE,
        (),
        ("attention_dropout", "hidden_dropout", "dropout", "layerdrop", "resid_pdrop", "embd_pdrop",
         "classifier_dropout"),
    ),
    (_SIZE, ("query_pre_attn_scalar", "original_max_position_embeddings"), ("sliding_window",)),
    (_INTEGER, ("max_window_layers",), ("pretraining_tp", "num_labels")),
    (_one_of(ACTIVATIONS), ("hidden_act", "activation_function"), ("hidden_activation",)),
    (_one_of(_DTYPES), (), ("dtype", "torch_dtype")),
    (_OBJECT, (), ("rope_parameters", "rope_scaling", "id2label", "label2id", "auto_map")),
    (_TEXT, (), ("transformers_version",)),
    (
        ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)),
        (),
        ("architectures",),
    ),
)  # fmt: skip


def check_description(description: Any) -> list[str]:
    """What is wrong with the content of a config.json, each in words; nothing for a model that can be cut by layers."""
    if not isinstance(description, dict):
        return [f"config.json is {shown(description)}, not an object with the model's settings"]
    problems = []
    found = architecture(description)
    if found is None:
        try:
            architectures.find(description)
        except UserError as error:
            own = "; the code that it brings (auto_map) cannot be cut by layers" if "auto_map" in description else ""
            problems.append(f"{error}{own}")
    for key, optional, most in (
        ("num_hidden_layers", False, _MAX_LAYERS),
        ("hidden_size", False, MAX_SIZE),
        ("vocab_size", False, MAX_SIZE),
        ("num_attention_heads", False, MAX_SIZE),
        ((found or Architecture()).intermediate_size, False, MAX_SIZE),
        ("max_position_embeddings", False, MAX_SIZE),
        ("num_key_value_heads", True, MAX_SIZE),
        ("head_dim", True, MAX_SIZE),
    ):
        if key not in description:
            if key == "num_hidden_layers":
                problems.append("config.json has no num_hidden_layers")
        elif not (optional and description[key] is None) and not is_size(description[key], most):
            problems.append(not_allowed(key, description[key], f"an integer from 1 to {most}"))
    if not problems:
        problems += _check_sizes_together(description)
    problems += _check_kinds(description, _KINDS, "config.json")
    problems += [problem for key in ("rope_parameters", "rope_scaling") for problem in _check_rope(key, description)]
    methods = (description.get(key) for key in ("quantization_config", "compression_config"))
    for method in (method for method in methods if method is not None):
        kind = method.get("quant_method") if isinstance(method, dict) else method
        problems.append(f"it is a quantised checkpoint ({shown(kind)}), whose layers cannot be merged: dequantise it")
    return problems


def _check_kinds(settings: Mapping[str, Any], kinds: Kinds, file: str) -> list[str]:
    return [
        not_allowed(key, settings[key], f"{allowed}, or null," if key in or_null else allowed, file)
        for (allowed, fits), always, or_null in kinds
        for key in (*always, *or_null)
        if key in settings and not (key in or_null and settings[key] is None) and not fits(settings[key])
    ]


_WORD = (
    "a text or an object with a text as its content",
    lambda value: isinstance(value.get("content") if isinstance(value, dict) else value, str),
)
_TOKENIZER_KINDS: Kinds = (
    (_POSITIVE, (), ("model_max_length",)),
    (_TEXT, (), ("tokenizer_class",)),
    (_one_of(("left", "right")), (), ("padding_side", "truncation_side")),
    (_WORD, (), ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")),
    (_OBJECT, (), ("added_tokens_decoder", "auto_map")),
    (("a list", lambda value: isinstance(value, list)), (), ("additional_special_tokens",)),
    (("a list or an object", lambda value: isinstance(value, (list, dict))), (), ("extra_special_tokens",)),
    (("a text or a list", lambda value: isinstance(value, (str, list, dict))), (), ("chat_template",)),
)


def check_tokenizer_settings(file: str, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with a tokenizer_config.json or special_tokens_map.json, by value, each in words."""
    return _check_kinds(settings, _TOKENIZER_KINDS, file)


def _check_rope(key: str, description: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings of rotary positions: those of all layers, or of each kind of layer apart."""
    settings = description.get(key)
    if not isinstance(settings, dict):
        return []
    of_kinds = {f"{key}.{kind}": settings[kind] for kind in _LAYER_TYPES if kind in settings} or {key: settings}
    problems = []
    for place, values in of_kinds.items():
        if values is None:
            continue
        if not isinstance(values, dict):
            problems.append(not_allowed(place, values, "an object"))
            continue
        name = "rope_type" if "rope_type" in values else "type"
        allowed, fits = _one_of(tuple(ROPE_TYPES))
        if name in values and not fits(values[name]):
            problems.append(not_allowed(f"{place}.{name}", values[name], allowed))
            continue
        kind = values.get(name, "default")
        if lacking := [needed for needed in ROPE_TYPES[kind] if values.get(needed) is None]:
            problems.append(f"config.json has {place} of type {kind} without {', '.join(lacking)}")
        for number in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"):
            if values.get(number) is not None and not _is_positive(values[number]):
                problems.append(not_allowed(f"{place}.{number}", values[number], "a positive number"))
        for factors in ("short_factor", "long_factor"):
            if factors in ROPE_TYPES[kind] and not _are_numbers(values.get(factors, [])):
                problems.append(not_allowed(f"{place}.{factors}", values[factors], "a list of positive numbers"))
    return problems


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(_is_positive(value) for value in values)


def _check_sizes_together(description: Mapping[str, Any]) -> list[str]:
    problems = []
    hidden, heads = description.get("hidden_size"), description.get("num_attention_heads")
    if hidden and heads and description.get("head_dim") is None and hidden % heads:
        problems.append(f"config.json has num_attention_heads={heads}, which does not divide hidden_size={hidden}")
    groups = description.get("num_key_value_heads")
    if heads and groups and heads % groups:
        problems.append(f"config.json has num_key_value_heads={groups}, which does not divide its {heads} heads")
    types, num_layers = description.get("layer_types"), description["num_hidden_layers"]
    if types is not None and (not isinstance(types, list) or len(types) != num_layers):
        found = f"{len(types)} layer_types" if isinstance(types, list) else f"layer_types={shown(types)}"
        problems.append(f"config.json has {found} for num_hidden_layers={num_layers}")
    elif others := [kind for kind in types or () if kind not in _LAYER_TYPES]:
        problems.append(not_allowed("layer_types", others[0], _one_of(_LAYER_TYPES)[0]))
    last = description.get("vocab_size", MAX_SIZE) - 1
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        several = key == "eos_token_id" and isinstance(description.get(key), list)
        for token in description[key] if several else [description.get(key)]:
            if token is not None and not (type(token) is int and -1 <= token <= last):  # some write -1 for none
                problems.append(not_allowed(key, token, f"an integer from 0 to {last}, or null,"))
    return problems


def architecture(description: Any) -> Architecture | None:
    """The entry of a config.json's content; None if it has none."""
    try:
        return architectures.find(description) if isinstance(description, dict) else None
    except UserError:
        return None


def is_size(value: Any, most: int) -> bool:
    """Whether it is an integer from 1 to ``most``."""
    return type(value) is int and 1 <= value <= most


def not_allowed(key: str, value: Any, allowed: str, file: str = "config.json") -> str:
    """Words for a file that has such a value."""
    return f"{file} has {key}={shown(value)}: {allowed} is needed"


def shown(value: Any) -> str:
    """A value as JSON, in at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def num_parameters(description: Mapping[str, Any]) -> int | None:
    """About as many parameters as a model of this config.json has: those of `Sizes`; None if it lacks a size."""
    architecture = architectures.find(description)
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", architecture.intermediate_size)
    if not all(is_size(description.get(name), MAX_SIZE) for name in names):
        return None
    return Sizes.of(description, "float32", num_samples=1, seq_len=1).parameters
