"""The tensors of a model folder as the headers of its files say them, and whether config.json describes them so.

Nothing is loaded: a header has each tensor's name, type, shape and place.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models import architectures
from slm_pipeline.models.architectures import Architecture
from slm_pipeline.models.description import shown
from slm_pipeline.models.fault_words import lacking, tensor_names, unequal
from slm_pipeline.models.json_files import file_problem, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK_BYTES = 64 * 2**10  # read at a time

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as model.dtype and as headers call them
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it


@dataclass(frozen=True)
class Stored:
    """A tensor as a header says it: ``start`` and ``num_bytes`` of its values in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


def stored_tensors(
    folder: Path, description: Mapping[str, Any], problems: list[str], warnings: list[str]
) -> dict[str, Stored]:
    """Every tensor of the files that transformers would load."""
    named = description.get("transformers_weights", WEIGHTS)
    if not _is_file_name(named):
        problems.append(f"config.json has transformers_weights={shown(named)}, which is not the name of a file in it")
        return {}
    index = folder / (named if named.endswith(".index.json") else INDEX)
    single = folder / named
    if single != index and os.path.lexists(single):
        if os.path.lexists(index):
            warnings.append(f"{single} is the whole model: {index.name} beside it is not read")
        shards, weight_map = [named], {}
    elif os.path.lexists(index):
        weight_map = _weight_map(index, problems)
        shards = sorted(set(weight_map.values()))
    else:
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        problems.append(
            f"it has no {WEIGHTS} and no {INDEX}, only {', '.join(others)}"
            if others
            else "it has no *.safetensors file; pickled weights are never loaded"
        )
        return {}
    tensors: dict[str, Stored] = {}
    for shard in shards:
        if not os.path.lexists(folder / shard):
            problems.append(f"it lacks {shard}, which {index.name} names")
            continue
        try:
            tensors |= _header(folder / shard)
        except ValueError as error:
            problems.append(f"{shard} {error}")
    if not problems and (holes := [name for name, shard in weight_map.items() if name not in tensors]):
        problems.append(f"{index.name} names {tensor_names(holes)}, which no file holds")
    return tensors


def _is_file_name(value: Any) -> bool:
    """Whether it names a file in the folder itself and not elsewhere."""
    return isinstance(value, str) and "\0" not in value and value not in ("", ".", "..") and Path(value).name == value


def _weight_map(index: Path, problems: list[str]) -> dict[str, str]:
    """Tensor name -> file name, as an index says; empty if it is of no use."""
    try:
        content = read_json(index)
    except ValueError as error:
        problems.append(f"{index.name} {error}")
        return {}
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{index.name} has no weight_map, which says where each tensor lies")
        return {}
    if not isinstance(content.get("metadata"), dict):
        problems.append(f"{index.name} has no metadata, without which transformers does not read it")
    if outside := [shard for shard in weight_map.values() if not _is_file_name(shard)]:
        problems.append(f"{index.name} names {shown(outside[0])}, which is not the name of a file beside it")
        return {}
    return weight_map


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: what is wrong with it, in words that follow its name.
    """
    if problem := file_problem(file):
        raise ValueError(problem)
    num_bytes = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(8)
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > num_bytes - 8:
            raise ValueError("is damaged or incomplete: its header is longer than the file")
        if length > _MAX_HEADER:
            raise ValueError(f"is not a safetensors file: a header of {length} bytes")
        header = handle.read(length)
    try:
        tensors = {
            name: Stored(
                str(about["dtype"]),
                tuple(int(size) for size in about["shape"]),
                file,
                8 + length + int(about["data_offsets"][0]),
                int(about["data_offsets"][1]) - int(about["data_offsets"][0]),
            )
            for name, about in json.loads(header).items()
            if name != "__metadata__"
        }
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a safetensors file: {error}") from error
    about_all = json.loads(header).get("__metadata__") or {}
    if not isinstance(about_all, dict) or not all(isinstance(value, str) for value in about_all.values()):
        raise ValueError("is not a safetensors file: its __metadata__ is no object of texts")
    if any(tensor.num_bytes < 0 or tensor.start < 8 + length for tensor in tensors.values()):
        raise ValueError("is not a safetensors file: it has a tensor that begins before the file or after its own end")
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=8 + length)
    if end != num_bytes:
        raise ValueError(f"is damaged or incomplete: {num_bytes} bytes, its header says {end}")
    return tensors


def are_equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors are stored as the same bytes."""
    if (one.dtype, one.shape, one.num_bytes) != (other.dtype, other.shape, other.num_bytes):
        return False
    with open(one.file, "rb") as first, open(other.file, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        lengths = (min(BLOCK_BYTES, one.num_bytes - start) for start in range(0, one.num_bytes, BLOCK_BYTES))
        return all(first.read(length) == second.read(length) for length in lengths)


def check_tensors(
    description: Mapping[str, Any], architecture: Architecture, tensors: Mapping[str, Stored]
) -> list[str]:
    """What config.json asks for and the files do not hold, or hold in another shape or quantised."""
    expected = _expected(description, architecture)
    found = {name: find(name, tensors) for name in expected}
    problems = []
    if missing := [name for name, tensor in found.items() if tensor is None]:
        nothing_found = len(missing) == len(expected) and tensors
        called = f"; what they hold is called {next(iter(tensors))} and so on" if nothing_found else ""
        problems.append(f"{lacking(missing)}{called}")
    present = {name: tensor for name, tensor in found.items() if tensor is not None}
    if quantised := [name for name, tensor in present.items() if tensor.dtype not in _FLOATS]:
        dtype = present[quantised[0]].dtype
        problems.append(f"its files hold {tensor_names(quantised)} as {dtype}: dequantise the checkpoint first")
    shapes = {name: (tensor.shape, expected[name]) for name, tensor in present.items()}
    problems += unequal({name: pair for name, pair in shapes.items() if not quantised and not _fits(*pair)})
    return problems


def check_stored_as(tensors: Iterable[Stored], config: ModelConfig) -> None:
    """Raise `UserError` unless tensors that are to be streamed are in ``model.dtype``: they are not converted."""
    found = {stored.dtype for stored in tensors}
    if found - {TYPES[config.dtype]}:
        names = [name for name, stored in TYPES.items() if stored in found]
        advice = f"use model.dtype={names[0]}" if len(found) == len(names) == 1 else "save the checkpoint in one type"
        raise UserError(
            f"model.device=stream reads weights as they are stored, {', '.join(names or sorted(found))};"
            f" model.dtype={config.dtype} is another type: {advice}"
        )


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(b is None or a == b for a, b in zip(shape, expected, strict=True))


def _expected(description: Mapping[str, Any], architecture: Architecture) -> dict[str, tuple[int | None, ...]]:
    """Shapes, None where config.json does not tell, of the tensors that every model of this architecture has."""
    hidden, rows = description.get("hidden_size"), description.get("vocab_size")
    heads, head_dim = description.get("num_attention_heads"), description.get("head_dim")
    inner = heads * head_dim if heads and head_dim else None
    decoder = architecture.decoder
    has_gains = description.get("layer_norm_elementwise_affine") is not False  # OPT's word for norms without weights
    expected: dict[str, tuple[int | None, ...]] = {f"{decoder}.{architecture.embedding}.weight": (rows, hidden)}
    for layer in range(description["num_hidden_layers"]):
        block = f"{decoder}.{architecture.layers}.{layer}"
        for norm in architecture.norms if has_gains else ():
            expected[f"{block}.{norm}.weight"] = (hidden,)
        output_inputs = {architecture.attention_output: inner, architecture.mlp_output: _neurons(description)}
        for name in architecture.projections:
            expected[f"{block}.{name}.weight"] = (
                (hidden, output_inputs[name]) if name in output_inputs else (None, hidden)
            )
    if has_gains:
        expected[f"{decoder}.{architecture.final_norm}.weight"] = (hidden,)
    if description.get("tie_word_embeddings") is False:  # where it is absent, the class decides
        expected[f"{architecture.head}.weight"] = (rows, hidden)
    return expected


def _neurons(description: Mapping[str, Any]) -> int | None:
    size = description.get(architectures.find(description).intermediate_size)
    return size if size is None else int(size)


def find(name: str, tensors: Mapping[str, Stored]) -> Stored | None:
    """A tensor, also by the name that it has in a model without the head."""
    inner = name.partition(".")[2]
    return tensors.get(name, tensors.get(inner) if "." in inner else None)


def beyond_the_last_layer(
    description: Mapping[str, Any], architecture: Architecture, tensors: Mapping[str, Stored]
) -> list[str]:
    """Tensors of layers that the files have and config.json does not count."""
    block = re.compile(re.escape(f"{architecture.decoder}.{architecture.layers}.") + r"([0-9]{1,9})\.")
    layers = {name: match for name in tensors if (match := block.match(name))}
    return [name for name, match in layers.items() if int(match[1]) >= description["num_hidden_layers"]]
