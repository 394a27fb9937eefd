"""Examples for recovery training: where they come from. How they become tokens: `tokens`.

An example is a dict of one of three kinds:

- an instruction: ``instruction``, ``input`` (may be empty) and ``output``, three strings;
- a chat: ``messages``, a list of {role, content}, two strings, the role system, user or assistant;
- a text: ``text``, a string.

Which one a row of a file or data set is, its columns say, in this order: ``instruction`` (with ``output``, and
``input`` or nothing; databricks-dolly's ``response`` and ``context`` are read as these two), ``messages``,
``conversations`` (ShareGPT's {from, value}), ``text``. A column that is null is not there. Importing this module stays
cheap: no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_pipeline.assets import texts
from slm_pipeline.data import hub
from slm_pipeline.data.files import check_text, json_rows, listed, read_bytes, read_text, shown, with_plain_newlines
from slm_pipeline.errors import UserError
from slm_pipeline.store.checksums import digest

log = logging.getLogger(__name__)

SOURCES = ("bundled", "hub", "file")
BUNDLED_TEXTS = ("lambada", "squad", "drop", "sciq")  # neither an evaluation task nor the perplexity corpus
SUFFIXES = (".json", ".jsonl", ".txt")
INSTEAD = "recovery.source=bundled or recovery.source=file"  # of a hub
PASSAGE_LEN = 2000  # characters; a book is cut into passages of that many, so that some of it can be held out
ROLES = {role: role for role in ("system", "user", "assistant")}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **ROLES}

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")
_WORD_END = re.compile(r"\s+")
_BLANK_LINES = re.compile(r"\n\s*\n")

Example = dict[str, Any]


def load_examples(source: str, *, path: str | None, repo: str, revision: str, data_dir: Path | None) -> list[Example]:
    """All examples of a source, in its own order, without those in which there is nothing to learn.

    Args:
        source: ``bundled`` (passages to continue), ``file`` or ``hub``.
        path: ``file``: a .json (one list of rows), a .jsonl (one row a line), a .txt (see `passages`), or a folder, of
            which all such files are read in the order of their names. A row is an object of one of the three kinds or
            a string, which is a text.
        repo: ``hub``: a data set with a ``train`` split of such rows, or a folder in the hub's layout.
        revision: ``hub``: commit, tag or branch.
        data_dir: where relative paths are looked up; None: the working directory.

    Raises:
        UserError: nothing there, a row of no known kind (the message gives its file and its row or line),
            or no example.
    """
    if source == "bundled":
        rows = _bundled_examples()
    elif source == "file":
        rows = [row for file in _find_files(path, data_dir) for row in _read_file(file)]
    else:
        rows = _read_hub(repo, revision, data_dir)
    examples = [example for example in rows if any(text.strip() for text in _to_learn(example))]
    if dropped := len(rows) - len(examples):
        log.warning("%d of %d examples dropped: their output, text or assistant's part is empty", dropped, len(rows))
    if not examples:
        raise UserError(
            f"recovery.source={source}: none of the {len(rows)} examples has an output, a text or an assistant's part"
        )
    return examples


def _to_learn(example: Example) -> list[str]:
    """An instruction's output, the assistant's part of a chat, or the text."""
    if "messages" in example:
        return [message["content"] for message in example["messages"] if message["role"] == "assistant"]
    return [example["text"] if "text" in example else example["output"]]


def examples_fingerprint(source: str, *, path: str | None, repo: str, revision: str, data_dir: Path | None) -> str:
    """Short text that changes when the examples do. Takes the arguments of `load_examples`.

    Files are read, so that a mistake in them is found here, before anything expensive.

    Raises:
        UserError: a file is missing or malformed, or the hub cannot be reached.
    """
    if source == "bundled":
        return "bundled:" + digest({name: texts.texts_fingerprint(name) for name in BUNDLED_TEXTS})
    if source == "file":
        found = _find_files(path, data_dir)
        for file in found:
            _read_file(file)
        if len(found) == 1:
            return f"sha256:{_sha256(found[0])}{found[0].suffix}"  # by which it is read
        return "files:" + digest({file.name: _sha256(file) for file in found})
    if folder := _local_repo(repo, data_dir):
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return "folder:" + digest({file.relative_to(folder).as_posix(): _sha256(file) for file in files})
    return f"{repo}@{hub.commit(repo, f'recovery.repo={repo!r}', INSTEAD, revision=revision)}"


def split_examples(
    examples: Sequence[Example], *, validation_size: int, num_examples: int | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """Shuffle and cut into training and validation examples that share nothing.

    Args:
        examples: repeated ones count once.
        validation_size: number of validation examples, taken first, so that they do not depend on ``num_examples``.
        num_examples: number of training examples; None: all that remain.
        seed: of the shuffle.

    Raises:
        UserError: too few examples.
    """
    unique = list({json.dumps(example): example for example in examples}.values())
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


def _bundled_examples() -> list[Example]:
    halves = [split_passage(text) for name in BUNDLED_TEXTS for text in texts.bundled_texts(name)]
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


def passages(text: str) -> list[str]:
    """A long text cut at blank lines: whole paragraphs, as many as make `PASSAGE_LEN` characters; the last is shorter.

    Paragraphs stay apart by one blank line. A text without blank lines is one passage.
    """
    found: list[str] = []
    paragraphs: list[str] = []
    for paragraph in _BLANK_LINES.split(text.strip()):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= PASSAGE_LEN:
            found.append("\n\n".join(paragraphs))
            paragraphs = []
    return [*found, "\n\n".join(paragraphs)] if paragraphs else found


def _find_files(path: str | None, data_dir: Path | None) -> list[Path]:
    if not path:
        raise UserError(f"recovery.source=file needs recovery.path=, a {', '.join(SUFFIXES)} file or a folder of them")
    given = (data_dir or Path()) / Path(path).expanduser()
    if given.is_dir():
        files = sorted(file for file in given.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"recovery.path={path!r}: the folder {given.absolute()} has no {', '.join(SUFFIXES)} file")
        return files
    if given.suffix not in SUFFIXES:
        raise UserError(f"recovery.path={path!r} is neither a folder nor a {', '.join(SUFFIXES)} file")
    if not given.is_file():
        raise UserError(f"recovery.path={path!r}: there is no file {given.absolute()}")
    return [given]


def _read_file(file: Path) -> list[Example]:
    if file.suffix == ".txt":
        return [{"text": passage} for passage in passages(with_plain_newlines(read_text(file)))]
    return [_example(row, where) for where, row in json_rows(file)]


def _read_hub(repo: str, revision: str, data_dir: Path | None) -> list[Example]:
    option = f"recovery.repo={repo!r}"
    folder = _local_repo(repo, data_dir)
    options = {} if folder else {"revision": revision}
    rows = hub.load(str(folder or repo), option, INSTEAD, **options)
    if "train" not in rows:
        raise UserError(f"{option} has no train split; it has {listed(rows)}")
    return [_example(row, f"{repo}, row {number}") for number, row in enumerate(rows["train"], start=1)]


def _example(row: Any, where: str) -> Example:
    if isinstance(row, str):
        check_text(row, where, empty=True)
        return {"text": row}
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object or a string, got {shown(row)}")
    row = {name: value for name, value in row.items() if value is not None}
    if "instruction" in row:
        found = {
            "instruction": row["instruction"],
            "input": row.get("input", row.get("context", "")),
            "output": row.get("output", row.get("response")),
        }
    elif "messages" in row:
        return {"messages": _messages(row["messages"], "role", "content", ROLES, f"{where}: messages")}
    elif "conversations" in row:
        return {"messages": _messages(row["conversations"], "from", "value", SHAREGPT_ROLES, f"{where}: conversations")}
    elif "text" in row:
        found = {"text": row["text"]}
    else:
        raise UserError(
            f"{where}: expected instruction and output, or messages, or conversations, or text; its columns are"
            f" {listed(row) or 'empty'}"
        )
    for name, value in found.items():
        check_text(value, f"{where}: {name}", empty=True)
    return found


def _messages(turns: Any, who: str, what: str, roles: Mapping[str, str], where: str) -> list[dict[str, str]]:
    """The turns of a chat as {role, content}; ``who`` and ``what`` are the names that the row has for these."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where} must be a list of {{{who}, {what}}}, got {shown(turns)}")
    for turn in turns:
        if turn.get(who) not in list(roles):
            raise UserError(f"{where}: {who} {shown(turn.get(who))} is not one of {', '.join(roles)}")
        check_text(turn.get(what), f"{where}: {what}", empty=True)
    return [{"role": roles[turn[who]], "content": turn[what]} for turn in turns]


def _local_repo(repo: str, data_dir: Path | None) -> Path | None:
    folder = (data_dir or Path()) / Path(repo).expanduser()
    return folder if folder.is_dir() else None


def _sha256(file: Path) -> str:
    return hashlib.sha256(read_bytes(file)).hexdigest()
