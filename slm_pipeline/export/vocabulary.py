"""A tokenizer as GGUF keeps it, read from the tokenizer.json that transformers runs. No torch.

llama.cpp has two kinds that the supported architectures use: byte-level BPE, whose first cut of the text is known to
llama.cpp by name and never written to the file, and SentencePiece-like BPE, which has scores in the place of merges.
What neither can express is refused. llama.cpp does no Unicode normalisation: where a tokenizer does (Qwen's NFC), texts
that are not normalised give other token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slm_pipeline.errors import UserError

# The first cut of byte-level BPE, by the pattern that makes it; llama.cpp's names.
_GPT2 = "byte-level"  # the pattern of GPT-2, which the tokenizers library calls ByteLevel(use_regex=True)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FIRST_CUTS = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "dbrx",
}
_MERGED_FIRST = {"dbrx": "llama-bpe"}  # the same cut; a cut that is a token is left whole (ignore_merges)

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's blank
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's kinds of token
_NO_SCORE = -1e6  # of what no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """What goes below ``tokenizer.ggml`` in a GGUF file.

    Attributes:
        model: ``gpt2`` (byte-level) or ``llama`` (SentencePiece-like).
        pre: llama.cpp's name of the first cut.
        tokens, kinds: of each row of the embedding; rows that the tokenizer does not know are unused.
        merges: of ``gpt2``, else empty.
        scores: of ``llama``, else empty: minus the rank of the merge that makes a token.
        special: bos, eos, unknown, padding -> id, of those that there are.
        adds: bos, eos -> whether every text begins or ends with it.
        space_first: whether ``llama`` puts a blank before a text.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    adds: dict[str, bool]
    space_first: bool
    chat_template: str | None


def read(tokenizer: Any, num_rows: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of a fast tokenizer of transformers.

    Args:
        num_rows: of the embedding.
        pre: llama.cpp's name of the first cut of byte-level BPE, for those that are not recognised.

    Raises:
        UserError: it is none of the two kinds, or its first cut is not known by any name here.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"a GGUF file needs a tokenizer with tokenizer.json; this one is a {type(tokenizer).__name__}")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"llama.cpp runs BPE for these architectures; this tokenizer is a {model['type']} model")
    parts = _parts(described.get("pre_tokenizer"), "pretokenizers")
    byte_level = any(part["type"] == "ByteLevel" for part in parts)
    if not byte_level and not model.get("byte_fallback"):
        raise UserError("this BPE is neither byte-level nor falls back to bytes, and llama.cpp has no other")
    if byte_level:
        pre = pre or _first_cut(parts, bool(model.get("ignore_merges")))
    elif pre is not None:
        raise UserError(f"--pre-tokenizer={pre} is for byte-level BPE; this tokenizer is SentencePiece-like")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, kinds = _tokens(model, described["added_tokens"], num_rows, byte_level)
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=pre or "default",
        tokens=tokens,
        kinds=kinds,
        merges=merges if byte_level else [],
        scores=[] if byte_level else _scores(tokens, merges),
        special=_special(tokenizer),
        adds=_adds(tokenizer),
        space_first=not byte_level and _puts_space_first(described),
        chat_template=_chat_template(tokenizer),
    )


def _parts(described: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or normaliser, which may be none, one or a sequence."""
    if described is None:
        return []
    if described["type"] != "Sequence":
        return [described]
    return [part for inner in described[key] for part in _parts(inner, key)]


def _first_cut(parts: Sequence[Mapping[str, Any]], ignores_merges: bool) -> str:
    """llama.cpp's name of what a pre-tokenizer does before the merges."""
    cut: list[str] = []
    for part in parts:
        if part["type"] == "ByteLevel":
            if part.get("add_prefix_space"):
                raise UserError("this tokenizer puts a blank before a text, which llama.cpp's byte-level BPE does not")
            cut += [_GPT2] if part.get("use_regex", True) else []
        elif part["type"] == "Digits" and part["individual_digits"]:
            cut.append("digits")
        elif part["type"] == "Split" and "Regex" in part["pattern"] and part["behavior"] == "Isolated":
            cut.append(part["pattern"]["Regex"])
        else:
            cut.append(part["type"])
    name = _FIRST_CUTS.get(tuple(cut))
    if name is None:
        raise UserError(
            f"the first cut of this byte-level BPE, {cut}, is none of {', '.join(_FIRST_CUTS.values())}: name"
            " llama.cpp's own with --pre-tokenizer (the names are in its src/llama-vocab.cpp)"
        )
    return _MERGED_FIRST.get(name, name) if ignores_merges else name


def _tokens(
    model: Mapping[str, Any], added: Sequence[Mapping[str, Any]], num_rows: int, byte_level: bool
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{row}]" for row in range(num_rows)]
    kinds = [_UNUSED] * num_rows
    for token, row in model["vocab"].items():
        tokens[row] = token
        is_byte = not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        kinds[row] = _BYTE if is_byte else _NORMAL
    for entry in added:
        row, token = entry["id"], entry["content"]
        tokens[row] = token if byte_level else token.replace(_SPACE, " ")  # it is looked for in the text as it comes
        kinds[row] = _CONTROL if entry["special"] else _USER_DEFINED
    unknown = model.get("unk_token")
    if not byte_level and unknown in model["vocab"]:
        kinds[model["vocab"][unknown]] = _UNKNOWN
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """SentencePiece joins the pair whose outcome has the highest score: the one that the earliest merge makes."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [float(-ranks[token]) if token in ranks else _NO_SCORE for token in tokens]


def _special(tokenizer: Any) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {name: getattr(tokenizer, f"{short}_token_id") for name, short in names.items()}
    return {name: int(row) for name, row in found.items() if row is not None}


def _adds(tokenizer: Any) -> dict[str, bool]:
    ids = tokenizer("a")["input_ids"]
    ends = {"bos": ids[0], "eos": ids[-1]}
    return {name: end == getattr(tokenizer, f"{name}_token_id") for name, end in ends.items()}


def _puts_space_first(described: Mapping[str, Any]) -> bool:
    steps = _parts(described.get("normalizer"), "normalizers") + _parts(described.get("pre_tokenizer"), "pretokenizers")
    return any(
        (step["type"] == "Prepend" and step["prepend"] == _SPACE)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template
