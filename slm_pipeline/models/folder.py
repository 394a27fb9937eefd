"""A model folder, looked at once before anything is loaded: all that is wrong in it, and what identifies it. No torch.

What is looked at is what ``from_pretrained`` would read: config.json, the tokenizer's files, and the weights' headers,
which say each tensor's name, type and shape.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError
from slm_pipeline.models import architectures
from slm_pipeline.models.architectures import PRUNED, Architecture
from slm_pipeline.models.description import MAX_SIZE, check_description, check_tokenizer_settings, is_size, shown
from slm_pipeline.models.description import architecture as architecture_of
from slm_pipeline.models.fault_words import more_tokens, not_used
from slm_pipeline.models.json_files import file_problem, read_json
from slm_pipeline.models.stored_tensors import (
    BLOCK_BYTES,
    Stored,
    are_equal,
    beyond_the_last_layer,
    check_tensors,
    find,
    stored_tensors,
)

TEMPLATES = "additional_chat_templates"  # a folder of chat templates beside the first
SAMPLED_BYTES = 64 * 2**20  # of the weights, for the fingerprint

_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # that loading may read
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
               "generation_config.json")  # fmt: skip
_TEXT_FILES = ("merges.txt", "vocab.txt", "chat_template.jinja")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # have no special tokens but those named


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
    tensors = stored_tensors(folder, description, problems, warnings)
    if architecture is not None and not problems and not _names_its_own(description, trust_remote_code):
        problems += check_tensors(description, architecture, tensors)
        if unused := beyond_the_last_layer(description, architecture, tensors):
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
    tensors = stored_tensors(folder, description, [], [])
    head = find(f"{architecture.head}.weight", tensors)
    embedding = find(f"{architecture.decoder}.{architecture.embedding}.weight", tensors)
    return head is not None and embedding is not None and not are_equal(head, embedding)


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


def _names_its_own(description: Mapping[str, Any], trust_remote_code: bool) -> bool:
    """Whether a model may have other tensors than its architecture: its layers differ, or it brings its own code."""
    return description["model_type"].startswith(PRUNED) or (trust_remote_code and "auto_map" in description)


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
        if problem := file_problem(folder / name):
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
        embedding = find(f"{architecture.decoder}.{architecture.embedding}.weight", tensors)
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
