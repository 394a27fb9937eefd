"""A model folder, looked at once before anything is loaded: all that is wrong in it, and what identifies it. No torch.

What is looked at is what ``from_pretrained`` would read: config.json, the tokenizer's files, and the weights' headers,
which say each tensor's name, type and shape.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError
from slm_pipeline.models import architectures
from slm_pipeline.models.architectures import PRUNED, Architecture
from slm_pipeline.models.description import MAX_SIZE, check_description, check_tokenizer_settings, is_size, shown
from slm_pipeline.models.description import architecture as architecture_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"  # a folder of chat templates beside the first
SAMPLED_BYTES = 64 * 2**20  # of the weights, for the fingerprint
BLOCK_BYTES = 64 * 2**10

_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # that loading may read
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
               "generation_config.json")  # fmt: skip
_TEXT_FILES = ("merges.txt", "vocab.txt", "chat_template.jinja")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # have no special tokens but those named


@dataclass(frozen=True)
class Stored:
    """A tensor as a header says it: ``start`` and ``num_bytes`` of its values in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class ModelFolder:
    """A model folder in which nothing was found to be wrong.

    Attributes:
        description: config.json.
        tensors: by name, of the files that would be loaded.
        special_tokens: which of bos, eos, pad the tokenizer has; None if only loading it tells.
        warnings: what may not be as meant.
    """

    path: Path
    description: dict[str, Any]
    tensors: dict[str, Stored]
    special_tokens: frozenset[str] | None
    warnings: tuple[str, ...]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the content of what loading may read, and with no time stamp.

        The sha256 of every small file, every header, and the weights: all of them up to 64 MiB, else evenly spaced
        blocks of each tensor, 64 MiB in all. A training that changes a tensor changes nearly all of its values.
        """
        content = hashlib.sha256()
        templates = self.path / TEMPLATES
        small = [file for folder in (self.path, templates) for file in folder.glob("*") if file.suffix in _SMALL_FILES]
        for file in sorted(small):
            if file.is_file():
                content.update(f"{file.relative_to(self.path)}:{file.stat().st_size}:".encode() + file.read_bytes())
        whole = sum(tensor.num_bytes for tensor in self.tensors.values()) <= SAMPLED_BYTES
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            tensors = [tensor for tensor in self.tensors.values() if tensor.file == file]
            with open(file, "rb") as handle:
                header = handle.read(8 + struct.unpack("<Q", handle.read(8))[0])
                content.update(f"{file.name}:{file.stat().st_size}:".encode() + header)
                for tensor in sorted(tensors, key=lambda tensor: tensor.start):
                    share = tensor.num_bytes if whole else SAMPLED_BYTES // len(self.tensors)
                    for start, length in _blocks(tensor.num_bytes, share):
                        handle.seek(tensor.start + start)
                        content.update(handle.read(length))
        return content.hexdigest()[:16]


def _blocks(num_bytes: int, share: int) -> list[tuple[int, int]]:
    """(start, length) of evenly spaced blocks, ``share`` bytes in all, the first at the start, the last at the end."""
    if num_bytes <= share:
        return [(0, num_bytes)]
    size = min(BLOCK_BYTES, share)
    count = max(1, share // size)
    return [(index * (num_bytes - size) // max(1, count - 1), size) for index in range(count)]


def look(folder: Path, name: str, *, trust_remote_code: bool = False) -> ModelFolder:
    """Look at everything in a model folder that loading would read.

    Args:
        folder: exists.
        name: how messages call it.
        trust_remote_code: the folder's own code may call its tensors what it likes.

    Raises:
        UserError: one line with all that is wrong.
    """
    problems: list[str] = []
    warnings: list[str] = []
    description = _description(folder, problems)
    architecture = architecture_of(description)
    tensors = _tensors(folder, description, problems, warnings)
    if architecture is not None and not problems and not _names_its_own(description, trust_remote_code):
        problems += _check_tensors(description, architecture, tensors)
        if unused := _beyond_the_last_layer(description, architecture, tensors):
            warnings.append(not_used(name, unused))
    read = _small_files(folder, trust_remote_code, problems)
    num_tokens = _num_tokens(read.get("tokenizer.json"), problems)
    rows = _num_rows(description, architecture, tensors)
    if num_tokens is not None and rows is not None and num_tokens > rows:
        problems.append(more_tokens(num_tokens, rows))
    if adapter := sorted(file.name for file in folder.glob("adapter_*") if file.suffix in (".json", ".safetensors")):
        problems.append(
            f"it holds an adapter ({', '.join(adapter)}), and only you know whether it belongs to the weights beside"
            " it: merge it into them, or move its files away"
        )
    if problems:
        raise UserError(f"{name}: {'; '.join(problems)}")
    return ModelFolder(folder, description, tensors, _special_tokens(read), tuple(warnings))


def has_own_head(folder: Path) -> bool:
    """Whether the files hold an output head beside the embedding, with other values: whatever config.json says of them,
    transformers then leaves the two apart. ``folder`` is one in which `look` finds nothing wrong."""
    description = _description(folder, [])
    architecture = architectures.find(description)
    tensors = _tensors(folder, description, [], [])
    head = _find(f"{architecture.head}.weight", tensors)
    embedding = _find(f"{architecture.decoder}.{architecture.embedding}.weight", tensors)
    return head is not None and embedding is not None and not _are_equal(head, embedding)


def _are_equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors are stored as the same bytes."""
    if (one.dtype, one.shape, one.num_bytes) != (other.dtype, other.shape, other.num_bytes):
        return False
    with open(one.file, "rb") as first, open(other.file, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        lengths = (min(BLOCK_BYTES, one.num_bytes - start) for start in range(0, one.num_bytes, BLOCK_BYTES))
        return all(first.read(length) == second.read(length) for length in lengths)


def read_json(file: Path) -> Any:
    """The content of a JSON file as transformers reads it.

    Raises:
        ValueError: what is wrong with it, in words that follow its name.
    """
    if problem := _problem(file):
        raise ValueError(problem)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is UTF-16; transformers reads UTF-8")
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("begins with a byte order mark, which transformers does not read: save it without one")
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error


def _problem(file: Path) -> str | None:
    """Why ``file`` cannot be read, in words that follow its name; None if it can."""
    if file.is_symlink() and not file.exists():
        return f"is a link to {os.readlink(file)}, which is not there"
    if not file.exists():
        return "is not there"
    if file.is_dir():
        return "is a folder"
    if not file.is_file():
        return "is not a regular file"
    if not os.access(file, os.R_OK):
        return "may not be read by you"
    return None if file.stat().st_size else "is empty"


def _description(folder: Path, problems: list[str]) -> dict[str, Any]:
    """config.json; empty if it is of no use."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        problems.append("it has no config.json: it is not a transformers model folder")
        return {}
    try:
        description = read_json(file)
    except ValueError as error:
        problems.append(f"config.json {error}")
        return {}
    problems += check_description(description)
    return description if isinstance(description, dict) else {}


def _tensors(
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
    if problem := _problem(file):
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


def _check_tensors(
    description: Mapping[str, Any], architecture: Architecture, tensors: Mapping[str, Stored]
) -> list[str]:
    """What config.json asks for and the files do not hold, or hold in another shape or quantised."""
    expected = _expected(description, architecture)
    found = {name: _find(name, tensors) for name in expected}
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


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(b is None or a == b for a, b in zip(shape, expected, strict=True))


def _expected(description: Mapping[str, Any], architecture: Architecture) -> dict[str, tuple[int | None, ...]]:
    """Shapes, None where config.json does not tell, of the tensors that every model of this architecture has."""
    hidden, rows = description.get("hidden_size"), description.get("vocab_size")
    heads, head_dim = description.get("num_attention_heads"), description.get("head_dim")
    inner = heads * head_dim if heads and head_dim else None
    decoder = architecture.decoder
    expected: dict[str, tuple[int | None, ...]] = {f"{decoder}.{architecture.embedding}.weight": (rows, hidden)}
    for layer in range(description["num_hidden_layers"]):
        block = f"{decoder}.{architecture.layers}.{layer}"
        for norm in architecture.norms:
            expected[f"{block}.{norm}.weight"] = (hidden,)
        output_inputs = {architecture.attention_output: inner, architecture.mlp_output: _neurons(description)}
        for name in architecture.projections:
            expected[f"{block}.{name}.weight"] = (
                (hidden, output_inputs[name]) if name in output_inputs else (None, hidden)
            )
    expected[f"{decoder}.{architecture.final_norm}.weight"] = (hidden,)
    if description.get("tie_word_embeddings") is False:  # where it is absent, the class decides
        expected[f"{architecture.head}.weight"] = (rows, hidden)
    return expected


def _neurons(description: Mapping[str, Any]) -> int | None:
    size = description.get(architectures.find(description).intermediate_size)
    return size if size is None else int(size)


def _names_its_own(description: Mapping[str, Any], trust_remote_code: bool) -> bool:
    """Whether a model may have other tensors than its architecture: it lacks sublayers, or brings its own code."""
    return description["model_type"].startswith(PRUNED) or (trust_remote_code and "auto_map" in description)


def _find(name: str, tensors: Mapping[str, Stored]) -> Stored | None:
    """A tensor, also by the name that it has in a model without the head."""
    inner = name.partition(".")[2]
    return tensors.get(name, tensors.get(inner) if "." in inner else None)


def _beyond_the_last_layer(
    description: Mapping[str, Any], architecture: Architecture, tensors: Mapping[str, Stored]
) -> list[str]:
    """Tensors of layers that the files have and config.json does not count."""
    block = re.compile(re.escape(f"{architecture.decoder}.{architecture.layers}.") + r"([0-9]{1,9})\.")
    layers = {name: match for name in tensors if (match := block.match(name))}
    return [name for name, match in layers.items() if int(match[1]) >= description["num_hidden_layers"]]


def _small_files(folder: Path, trust_remote_code: bool, problems: list[str]) -> dict[str, Any]:
    """The JSON files beside config.json, by name, as far as they are there and whole."""
    read = {}
    for name in _JSON_FILES:
        if os.path.lexists(folder / name):
            try:
                read[name] = read_json(folder / name)
                if not isinstance(read[name], dict):
                    problems.append(f"{name} is {shown(read.pop(name))}, not an object")
            except ValueError as error:
                problems.append(f"{name} {error}")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        problems += check_tokenizer_settings(name, read.get(name, {}))
    for name in (*_TEXT_FILES, "tokenizer.model", "spiece.model"):
        if not os.path.lexists(folder / name):
            continue
        if problem := _problem(folder / name):
            problems.append(f"{name} {problem}")
        elif name in _TEXT_FILES:
            try:
                (folder / name).read_bytes().decode()
            except UnicodeDecodeError as error:
                problems.append(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}")
    if not any(os.path.lexists(folder / name) for name in _VOCABULARIES) and not [*folder.glob("*.tiktoken")]:
        own_code = "auto_map" in read.get("tokenizer_config.json", {})
        if own_code and not trust_remote_code:
            problems.append("its tokenizer is code of its own, which model.trust_remote_code=true runs")
        elif not own_code:
            problems.append(f"it has no tokenizer: none of {', '.join(_VOCABULARIES)}")
    return read


def _num_tokens(tokenizer: Any, problems: list[str]) -> int | None:
    """One more than the largest token id in a tokenizer.json; None where there is no such file or it is of no use."""
    if tokenizer is None:
        return None
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, (dict, list)) or not vocabulary:
        problems.append("tokenizer.json has no vocabulary: model.vocab is empty or missing")
        return None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    added = tokenizer.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return 1 + max((token for token in ids if type(token) is int), default=0)


def _num_rows(
    description: Mapping[str, Any], architecture: Architecture | None, tensors: Mapping[str, Stored]
) -> int | None:
    """Rows of the embedding, from its header or else from config.json."""
    if architecture is not None:
        embedding = _find(f"{architecture.decoder}.{architecture.embedding}.weight", tensors)
        if embedding is not None and embedding.shape:
            return embedding.shape[0]
    rows = description.get("vocab_size")
    return rows if is_size(rows, MAX_SIZE) else None


def _special_tokens(read: Mapping[str, Any]) -> frozenset[str] | None:
    settings = read.get("tokenizer_config.json", {})
    if settings.get("tokenizer_class") not in _PLAIN_TOKENIZERS:
        return None
    settings = {**read.get("special_tokens_map.json", {}), **settings}
    return frozenset(role for role in ("bos", "eos", "pad") if settings.get(f"{role}_token"))


def lacking(names: Iterable[str]) -> str:
    """Words for tensors that are missing."""
    names = list(names)
    return f"its files lack {_count(names)} of the model that config.json describes: {tensor_names(names)}"


def unequal(shapes: Mapping[str, tuple[Iterable[int], Iterable[int | None]]]) -> list[str]:
    """Words for tensors of another shape; ``shapes``: in the files, and as config.json has it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (found, expected) in shapes.items():
        groups.setdefault((_shape(found), _shape(expected)), []).append(name)
    return [
        f"its files hold {tensor_names(names)} as {found}, config.json says {expected}"
        for (found, expected), names in groups.items()
    ]


def _shape(sizes: Iterable[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"


def not_used(place: str, names: Iterable[str]) -> str:
    """Words for tensors of the files that are not part of the model."""
    names = list(names)
    return f"{place}: the model has no place for {_count(names)} of its files, not used: {tensor_names(names)}"


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def more_tokens(num_tokens: int, rows: int) -> str:
    """Words for token ids that have no embedding."""
    return f"its tokenizer has token ids up to {num_tokens - 1}, its embedding only {rows} rows"


def tensor_names(names: Iterable[str]) -> str:
    """Tensor names in short, those of several layers as one: ``model.layers.8-11.mlp.up_proj.weight``."""
    layers: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        first, number, rest = (*re.split(r"\.([0-9]{1,9})\.", name, maxsplit=1), "", "")[:3]
        layers.setdefault((first, rest) if number else (first,), set()).update([int(number)] if number else [])
    shown = [
        f"{parts[0]}.{_ranges(sorted(numbers))}.{parts[1]}" if numbers else parts[0]
        for parts, numbers in layers.items()
    ]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3,7``."""
    starts = [n for index, n in enumerate(numbers) if index == 0 or numbers[index - 1] != n - 1]
    ends = [n for index, n in enumerate(numbers) if index == len(numbers) - 1 or numbers[index + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
