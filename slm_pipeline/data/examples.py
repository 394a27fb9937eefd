"""Instruction examples for recovery training: where they come from and how they become tokens.

An example is a dict of three strings: ``instruction``, ``input`` (may be empty) and ``output``. Importing this module
stays cheap: no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline import assets
from slm_pipeline.artifacts import digest
from slm_pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SOURCES = ("bundled", "hub", "file")
BUNDLED_TEXTS = ("lambada", "squad", "drop", "sciq")  # neither an evaluation task nor the perplexity corpus
IGNORED = -100  # label of a token that bears no loss

# The templates of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py).
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")
_WORD_END = re.compile(r"\s+")


def load_examples(
    source: str, *, path: str | None, repo: str, revision: str, data_dir: Path | None
) -> list[dict[str, str]]:
    """All examples of a source, in its own order, without those whose output is empty.

    Args:
        source: ``bundled`` (passages to continue), ``file`` or ``hub``.
        path: ``file``: Alpaca-format JSON (one list of objects) or JSONL (one object a line).
        repo: ``hub``: a data set whose ``train`` split has the Alpaca columns, or a folder in the hub's layout.
        revision: ``hub``: commit, tag or branch.
        data_dir: where relative paths are looked up; None: the working directory.

    Raises:
        UserError: nothing there, not the Alpaca format (the message gives the row, counted from 1), or no example.
    """
    if source == "bundled":
        rows = _bundled_examples()
    elif source == "file":
        rows = _read_file(_find_file(path, data_dir))
    else:
        rows = _read_hub(repo, revision, data_dir)
    examples = [example for example in rows if example["output"].strip()]
    if dropped := len(rows) - len(examples):
        log.warning("%d of %d examples dropped: their output is empty", dropped, len(rows))
    if not examples:
        raise UserError(f"recovery.source={source}: none of the {len(rows)} examples has an output")
    return examples


def examples_fingerprint(source: str, *, path: str | None, repo: str, revision: str, data_dir: Path | None) -> str:
    """Short text that changes when the examples do. Takes the arguments of `load_examples`.

    A file is read, so that a mistake in it is found here, before anything expensive.

    Raises:
        UserError: the file is missing or malformed, or the hub cannot be reached.
    """
    if source == "bundled":
        return "bundled:" + digest({name: assets.texts_fingerprint(name) for name in BUNDLED_TEXTS})
    if source == "file":
        file = _find_file(path, data_dir)
        _read_file(file)
        return f"sha256:{_sha256(file)}"
    if folder := _local_repo(repo, data_dir):
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return "folder:" + digest({file.relative_to(folder).as_posix(): _sha256(file) for file in files})
    return f"{repo}@{_hub_commit(repo, revision)}"


def split_examples(
    examples: Sequence[dict[str, str]], *, validation_size: int, num_examples: int | None, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Shuffle and cut into training and validation examples that share nothing.

    Args:
        examples: repeated ones count once.
        validation_size: number of validation examples, taken first, so that they do not depend on ``num_examples``.
        num_examples: number of training examples; None: all that remain.
        seed: of the shuffle.

    Raises:
        UserError: too few examples.
    """
    unique = list({tuple(example.items()): example for example in examples}.values())
    if repeated := len(examples) - len(unique):
        log.warning("%d of %d examples dropped: they repeat another one", repeated, len(examples))
    if validation_size >= len(unique):
        raise UserError(
            f"recovery.validation_size={validation_size} leaves nothing to train on: there are {len(unique)} examples"
        )
    random.Random(seed).shuffle(unique)
    validation, train = unique[:validation_size], unique[validation_size:]
    if num_examples is not None and num_examples > len(train):
        raise UserError(
            f"recovery.num_examples={num_examples} is more than the {len(train)} examples"
            f" that recovery.validation_size={validation_size} leaves"
        )
    return train[:num_examples], validation


def prompt(example: dict[str, str]) -> str:
    """The Alpaca prompt of an example, up to where the output begins."""
    template = PROMPT_WITH_INPUT if example["input"] else PROMPT_WITHOUT_INPUT
    return template.format(instruction=example["instruction"], input=example["input"])


def tokenize_example(
    tokenizer: PreTrainedTokenizerBase, example: dict[str, str], cutoff_len: int
) -> dict[str, list[int]]:
    """Tokens of prompt and output, with labels on the output only.

    BOS comes first if the tokenizer itself puts it there, EOS last if it fits. No token straddles the boundary: where
    the tokenizer would join the end of the prompt with the start of the output, the two are tokenized apart, which is
    what the model sees when it generates.

    Returns:
        ``input_ids``, ``labels`` (`IGNORED` on the prompt) and ``attention_mask``: equally long lists, at most
        ``cutoff_len`` tokens.
    """
    begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    question, answer = prompt(example), example["output"]
    prompt_ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    ids = tokenizer(question + answer, add_special_tokens=False)["input_ids"]
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = begin + ids
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    ids = ids[:cutoff_len]
    num_prompt = min(len(begin) + len(prompt_ids), len(ids))
    return {
        "input_ids": ids,
        "labels": [IGNORED] * num_prompt + ids[num_prompt:],
        "attention_mask": [1] * len(ids),
    }


def tokenize_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, str]], cutoff_len: int
) -> list[dict[str, list[int]]]:
    """`tokenize_example` of each, without those whose prompt alone reaches the cut-off.

    Raises:
        UserError: no example is left.
    """
    from tqdm import tqdm

    rows = [tokenize_example(tokenizer, example, cutoff_len) for example in tqdm(examples, "tokenize", disable=None)]
    kept = [row for row in rows if row["labels"][-1] != IGNORED]
    if dropped := len(rows) - len(kept):
        log.warning("%d of %d examples dropped: prompt longer than cutoff_len=%d", dropped, len(rows), cutoff_len)
    if not kept:
        raise UserError(f"recovery.cutoff_len={cutoff_len} leaves no output in any of the {len(rows)} examples")
    return kept


@dataclass(frozen=True)
class LeftPadding:
    """Collator: rows of `tokenize_example` as a batch, padded on the left to the longest."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and ``attention_mask``, each [rows, longest] int64."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        return {
            name: torch.tensor([[value] * (longest - len(row[name])) + row[name] for row in rows])
            for name, value in padding.items()
        }


def _bundled_examples() -> list[dict[str, str]]:
    halves = [split_passage(text) for name in BUNDLED_TEXTS for text in assets.bundled_texts(name)]
    return [
        {"instruction": "Continue the passage.", "input": first, "output": second}
        for first, second in filter(None, halves)
    ]


def split_passage(text: str) -> tuple[str, str] | None:
    """A passage cut in two near its middle: at a sentence's end if one lies in the middle half, else between words.

    None if it is a single word.
    """
    text = text.strip()
    sentences = [match.end() for match in _SENTENCE_END.finditer(text)]
    cuts = [end for end in sentences if len(text) / 4 <= end <= len(text) * 3 / 4]
    cuts = cuts or [match.end() for match in _WORD_END.finditer(text)]
    if not cuts:
        return None
    cut = min(cuts, key=lambda end: abs(end - len(text) / 2))
    return text[:cut].rstrip(), text[cut:]


def _find_file(path: str | None, data_dir: Path | None) -> Path:
    if not path:
        raise UserError("recovery.source=file needs recovery.path=FILE, Alpaca-format .json or .jsonl")
    file = (data_dir or Path()) / Path(path).expanduser()
    if file.suffix not in (".json", ".jsonl"):
        raise UserError(f"recovery.path={path!r} is neither .json nor .jsonl")
    if not file.is_file():
        raise UserError(f"recovery.path={path!r}: there is no file {file.absolute()}")
    return file


def _read_file(file: Path) -> list[dict[str, str]]:
    try:
        if file.suffix == ".json":
            rows = json.loads(file.read_text(encoding="utf-8"))
        else:
            rows = _read_lines(file)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{file} is not valid {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{file} holds a JSON {type(rows).__name__}, not a list of examples")
    return [_check_row(row, number, str(file)) for number, row in enumerate(rows, start=1)]


def _read_lines(file: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            rows.append(json.loads(line or "null"))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows[:-1] if rows[-1] is None else rows


def _read_hub(repo: str, revision: str, data_dir: Path | None) -> list[dict[str, str]]:
    from datasets import load_dataset

    folder = _local_repo(repo, data_dir)
    try:
        rows = load_dataset(str(folder)) if folder else load_dataset(repo, revision=revision)
    except (OSError, ValueError) as error:
        raise _unreachable(repo, error) from error
    if "train" not in rows:
        raise UserError(f"recovery.repo={repo!r} has no train split; it has {', '.join(map(str, rows))}")
    return [_check_row(row, number, repo) for number, row in enumerate(rows["train"], start=1)]


def _check_row(row: Any, number: int, where: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise UserError(f"{where}, row {number}: expected an object with instruction and output, got {row!r:.80}")
    example: dict[str, Any] = {name: row.get(name) for name in ("instruction", "input", "output")}
    if example["input"] is None:
        example["input"] = ""
    for name, value in example.items():
        if not isinstance(value, str):
            raise UserError(f"{where}, row {number}: {name} must be a string, got {value!r:.80}")
    return example


def _local_repo(repo: str, data_dir: Path | None) -> Path | None:
    folder = (data_dir or Path()) / Path(repo).expanduser()
    return folder if folder.is_dir() else None


def _hub_commit(repo: str, revision: str) -> str:
    from huggingface_hub import hf_hub_download

    try:  # every repository has this small file
        file = hf_hub_download(repo, ".gitattributes", repo_type="dataset", revision=revision)
    except (OSError, ValueError) as error:
        raise _unreachable(repo, error) from error
    return Path(file).parent.name  # the hub's cache keeps files under snapshots/<commit>/


def _unreachable(repo: str, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(
        f"recovery.repo={repo!r} is no local folder and cannot be had from the hub ({reason});"
        " without a hub use recovery.source=bundled or recovery.source=file"
    )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
