"""Write a model of a stock class as one GGUF file, which llama.cpp and all that is built on it run."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slm_pipeline.errors import UserError
from slm_pipeline.export import llama_cpp, vocabulary
from slm_pipeline.export.vocabulary import Vocabulary
from slm_pipeline.models.view import ModelView

if TYPE_CHECKING:
    import gguf

TYPES = ("f16", "q8_0", "q4_0")  # 16, 8.5 and 4.5 bits for each weight of a matrix
_BLOCK = 32  # weights of one row that share a scale, of q8_0 and q4_0
_LARGEST = 65504.0  # float16 number
_EMPTY_MERGE = "\0 \0"  # llama.cpp wants merges; no text has a part that this one joins
_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unknown_token_id", "padding": "padding_token_id"}


def write(
    model: Any, tokenizer: Any, file: Path, kind: str, *, name: str = "", licence: str = "", pre: str | None = None
) -> list[str]:
    """Write ``model`` and ``tokenizer`` to ``file``: whole or not at all, one tensor at a time.

    Vectors stay float32. Of q4_0 the embedding and the head are q8_0: every token passes them, and llama.cpp's own
    files of that name have them in more bits too. A matrix whose rows are no multiple of 32 numbers is float16, and
    one with numbers beyond float16 is float32.

    Args:
        kind: one of `TYPES`.
        name, licence: general.name and general.license; left out where empty.
        pre: see `vocabulary.read`.

    Returns:
        What is not as asked, in words.

    Raises:
        UserError: llama.cpp does not run this model or this tokenizer as transformers does.
    """
    import gguf

    view = ModelView(model)
    family = llama_cpp.family_of(view.config.model_type)
    llama_cpp.check(view, family)
    words = vocabulary.read(tokenizer, int(view.model.get_input_embeddings().weight.shape[0]), pre)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    writer = gguf.GGUFWriter(None, family.name)
    try:
        _describe(writer, view, family, words, kind, name, licence)
        exceptions = _write_tensors(writer, view, family, kind, temporary)
        os.replace(temporary, file)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    windows = [window for window in view.attention_windows() if window]
    if windows and llama_cpp.context_length(view, family) < view.config.max_position_embeddings:
        exceptions.append(
            f"llama.cpp lets every layer of this model attend to the whole text: up to {min(windows)} tokens, the"
            " window of its sliding layers, that is the same, and the file names no longer context"
        )
    return exceptions


def _describe(
    writer: gguf.GGUFWriter,
    view: ModelView,
    family: llama_cpp.Family,
    words: Vocabulary,
    kind: str,
    name: str,
    licence: str,
) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    if name:
        writer.add_name(name)
    if licence:
        writer.add_license(licence)
    types = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in llama_cpp.metadata(view, family).items():
        add: Any = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{family.name}.{key}", value)
    if scaling := llama_cpp.scaling_type(view):
        writer.add_string(f"{family.name}.rope.scaling.type", scaling)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.model == "gpt2":
        writer.add_token_merges(words.merges or [_EMPTY_MERGE])
    else:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_first)
    for special, row in words.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_KEYS[special]}", row)
    for end, added in words.adds.items():
        writer.add_bool(f"tokenizer.ggml.add_{end}_token", added)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def _write_tensors(
    writer: gguf.GGUFWriter, view: ModelView, family: llama_cpp.Family, kind: str, file: Path
) -> list[str]:
    """Write everything: what each tensor is, then its values, so that no two are in memory at once beside the model."""
    import gguf

    names = gguf.get_tensor_name_map(_architecture(family.name), view.num_layers)
    exceptions: list[str] = []
    for name, value in _tensors(view, family, names):
        as_type, why = _type_of(name, value, kind)
        if why:
            exceptions.append(f"{name} is {as_type.name.lower()}: {why}")
        shape = tuple(value.shape)
        if as_type in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32):
            num_bytes = value.numel() * (2 if as_type is gguf.GGMLQuantizationType.F16 else 4)
        else:
            num_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, as_type)))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=as_type)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, value in _tensors(view, family, names):
        as_type, _ = _type_of(name, value, kind)
        writer.write_tensor_data(gguf.quants.quantize(value.float().cpu().numpy(), as_type))
    assert writer.fout is not None
    for stream in writer.fout:
        stream.flush()
        os.fsync(stream.fileno())
    return exceptions


def _tensors(view: ModelView, family: llama_cpp.Family, names: Any) -> Any:
    """(name in the file, values) of every tensor."""
    yield from llama_cpp.frequency_factors(view).items()
    for name, value in llama_cpp.tensors(view, family):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp's {family.name} has no tensor for {name}")
        yield found, value


def _architecture(name: str) -> Any:
    import gguf

    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _type_of(name: str, value: Any, kind: str) -> tuple[gguf.GGMLQuantizationType, str]:
    """What a tensor is kept as, and why it is not what was asked for; empty if it is."""
    import gguf

    types = gguf.GGMLQuantizationType
    if value.ndim == 1:
        return types.F32, ""
    if kind != "f16" and value.shape[-1] % _BLOCK == 0:
        outside = kind == "q4_0" and name in ("token_embd.weight", "output.weight")
        return (types.Q8_0 if outside or kind == "q8_0" else types.Q4_0), ""
    why = "" if kind == "f16" else f"its rows have {value.shape[-1]} numbers, no multiple of {_BLOCK}"
    largest = float(value.abs().max())
    if largest > _LARGEST:
        return types.F32, f"float16 does not hold its {largest:.3g}"
    return types.F16, why
