"""Texts that models are scored on, by the conventions of the papers: a bundled one, some on the hub, files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.assets import texts
from slm_pipeline.data import hub
from slm_pipeline.data.files import check_text, read_text
from slm_pipeline.data.tokens import text_tokens
from slm_pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HubCorpus:
    """An evaluation text on the hub and the convention by which papers join and cut it."""

    repo: str
    files: str  # pattern of the split's files
    split: str
    separator: str
    column: str = "text"
    revision: str | None = None
    num_documents: int | None = None  # the first ones; None: all
    max_windows: int | None = None  # the first ones; None: all
    documents: bool = False  # each row is a text of its own


HUB_CORPORA = {
    "wikitext2": HubCorpus("Salesforce/wikitext", "wikitext-2-raw-v1/test-*.parquet", "test", "\n\n"),
    "c4": HubCorpus(
        "allenai/c4",
        "en/c4-validation.00000-of-00008.json.gz",
        "validation",
        " ",
        num_documents=1100,
        max_windows=256,
        documents=True,
    ),
    # a loading script, which datasets no longer runs: the parquet files that the hub made of it
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank/test/*.parquet",
        "test",
        " ",
        column="sentence",
        revision="refs/convert/parquet",
    ),
}
BUNDLED_TEXT = "coqa"
OPTION = "evaluation.perplexity.corpora"
INSTEAD = "bundled or a text file"  # of a hub


def corpus_labels(corpora: Iterable[str]) -> dict[str, str]:
    """What numbers call each corpus: the name of its file, or its whole path where two files have one name."""
    names = {corpus: Path(corpus).name for corpus in corpora}
    counts = Counter(names.values())
    return {corpus: name if counts[name] == 1 else corpus for corpus, name in names.items()}


def corpus_tokens(
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    *,
    window: int,
    max_tokens: int | None = None,
    data_dir: Path | None = None,
    option: str = OPTION,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """An evaluation text as tokens, those of one tokenizer call without special tokens.

    Args:
        tokenizer: the model's.
        corpus: ``bundled`` (the stories of CoQA's validation split, joined by blank lines), a text file, or one of
            the hub's ``wikitext2`` (test split, rows joined by blank lines), ``c4`` (validation, its first 1,100
            documents joined by spaces, 256 windows of them), ``ptb`` (test, sentences joined by spaces).
        window: tokens of one window, for corpora that are cut by windows.
        max_tokens: the first so many are enough; None: all.
        data_dir: where a relative file is looked up; None: the working directory.
        option: what named the text, for messages.

    Returns:
        [num_tokens] int64, and what the text is: source (of a file, none: it says what is in it, not where it lies),
        split, join and the sha256 of the text.

    Raises:
        UserError: unknown name, missing or unreadable file, or neither the hub nor its cache has the text.
    """
    import torch

    limits = [max_tokens] if max_tokens is not None else []
    if corpus == "bundled":
        text = "\n\n".join(texts.bundled_texts(BUNDLED_TEXT))
        about: dict[str, Any] = {"source": BUNDLED_TEXT, "split": "validation", "join": "\n\n"}
    elif corpus in HUB_CORPORA:
        of_hub = HUB_CORPORA[corpus]
        text = of_hub.separator.join(hub_rows(corpus, option))
        about = {"source": of_hub.repo, "split": of_hub.split, "join": of_hub.separator}
        if of_hub.max_windows is not None:
            limits.append(of_hub.max_windows * window)
    else:
        file = _file(corpus, data_dir, option)
        text = read_text(file, option)
        about = {"source": None, "split": "file", "join": ""}
    ids = torch.tensor(text_tokens(tokenizer, text, min(limits, default=None)), dtype=torch.long)
    return ids, {**about, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def corpus_fingerprint(corpus: str, data_dir: Path | None = None, option: str = OPTION) -> str:
    """What identifies an evaluation text: pinned for ``bundled``, the file's sha256, the hub's commit and files.

    ``option``: what named the text, for messages.

    Raises:
        UserError: neither a known name nor a file, a file that is empty or not UTF-8, or the hub cannot be reached.
    """
    if corpus == "bundled":
        return texts.texts_fingerprint(BUNDLED_TEXT)
    if corpus in HUB_CORPORA:
        of_hub = HUB_CORPORA[corpus]
        place = hub.identity(
            of_hub.repo, f"{option}={corpus}", INSTEAD, files=of_hub.files, revision=of_hub.revision or "main"
        )
        return f"hub {place} {of_hub.files}"
    file = _file(corpus, data_dir, option)
    if not (text := read_text(file, option)).strip():
        raise UserError(f"{option}: {file} is empty")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def corpus_documents(
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    *,
    window: int,
    max_tokens: int | None = None,
    data_dir: Path | None = None,
    option: str = OPTION,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """An evaluation text as documents: those that it has, or windows where it is running text.

    Args:
        tokenizer: the model's.
        corpus: as for `corpus_tokens`. ``bundled`` has stories and ``c4`` web pages; ``wikitext2``, ``ptb`` and files
            are cut into windows.
        window: tokens of one window, where the text is cut into these; a shorter tail is left out.
        max_tokens: of all documents together; the last one may be cut. None: all.
        data_dir: where a relative file is looked up; None: the working directory.
        option: what named the text, for messages.

    Returns:
        [num_tokens] int64 each, and what the text is: source, split, documents (what one is), max_tokens and the
        sha256 of the text.

    Raises:
        UserError: as `corpus_tokens`, or running text shorter than one window.
    """
    import torch

    of_hub = HUB_CORPORA.get(corpus)
    if corpus == "bundled":
        written = texts.bundled_texts(BUNDLED_TEXT)
        about = {"source": BUNDLED_TEXT, "split": "validation", "documents": "story"}
    elif of_hub is not None and of_hub.documents:
        written = hub_rows(corpus, option)
        about = {"source": of_hub.repo, "split": of_hub.split, "documents": "row"}
    else:
        ids, of_text = corpus_tokens(
            tokenizer, corpus, window=window, max_tokens=max_tokens, data_dir=data_dir, option=option
        )
        if len(ids) < window:
            raise UserError(
                f"{corpus}: {len(ids)} tokens are less than one window; {option.rpartition('.')[0]}.window={window}"
            )
        about = {name: of_text[name] for name in ("source", "split", "sha256")}
        whole = len(ids) // window * window
        return list(ids[:whole].split(window)), {**about, "documents": "window", "max_tokens": max_tokens}
    documents: list[torch.Tensor] = []
    left = max_tokens
    for text in written:
        if left == 0:
            break
        documents.append(torch.tensor(text_tokens(tokenizer, text, left), dtype=torch.long))
        left = None if left is None else left - len(documents[-1])
    sha256 = hashlib.sha256("\0".join(written).encode()).hexdigest()
    return documents, {**about, "max_tokens": max_tokens, "sha256": sha256}


def hub_rows(corpus: str, option: str = OPTION) -> list[str]:
    """The rows of one of `HUB_CORPORA`, as many as papers take.

    Raises:
        UserError: neither the hub nor its cache has them, or a row is no text.
    """
    of_hub = HUB_CORPORA[corpus]
    option = f"{option}={corpus}"
    rows = hub.load(
        of_hub.repo,
        option,
        INSTEAD,
        data_files={of_hub.split: of_hub.files},
        split=of_hub.split,
        revision=None if Path(of_hub.repo).is_dir() else of_hub.revision,
    )
    texts = list(hub.column(rows, of_hub.column, option)[: of_hub.num_documents])
    for number, text in enumerate(texts, start=1):
        check_text(text, f"{option}: {of_hub.repo}, row {number}, column {of_hub.column}", empty=True)
    return texts


def _file(corpus: str, data_dir: Path | None, option: str) -> Path:
    file = (data_dir or Path.cwd()) / Path(corpus).expanduser()
    if not file.exists():
        raise UserError(
            f"{option}: {corpus!r} is not a file in {data_dir or Path.cwd()} and not one of"
            f" bundled, {', '.join(HUB_CORPORA)}"
        )
    return file
