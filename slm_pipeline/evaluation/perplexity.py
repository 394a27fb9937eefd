"""Perplexity of running text, cut into windows.

Without a stride the windows do not overlap and each predicts all its tokens but the first: the convention of GPTQ,
SLEB and CoMe (window 2048) and of the SLM authors' script (window 128). With a stride the windows overlap and only
tokens that no earlier window predicted are scored, so that every token has a long context.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from slm_pipeline.assets import texts
from slm_pipeline.data import hub
from slm_pipeline.data.files import check_text, read_text
from slm_pipeline.data.tokens import text_tokens
from slm_pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MAX_ELEMENTS = 1 << 26  # logits in float32 at a time: 256 MB
MAX_NLL = 700.0  # nats; exp of more is not a float


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


def perplexity(
    model: PreTrainedModel,
    input_ids: torch.Tensor | np.ndarray,
    *,
    window: int,
    stride: int | None,
    bos_token_id: int | None,
    batch_size: int,
    max_tokens: int | None,
    label: str,
) -> dict[str, Any]:
    """Perplexity of a text: exp of the mean negative log-likelihood of the tokens that are predicted.

    Args:
        model: any causal language model; is left in evaluation mode.
        input_ids: [num_tokens] integers, the tokenised text without special tokens.
        window: tokens of one forward pass, BOS included.
        stride: None: windows do not overlap and a tail shorter than a window is left out. Else each window starts
            ``stride`` tokens after the one before it, only its new tokens are scored, and nothing is left out.
        bos_token_id: put before every window, so that its first token is predicted too; None: no BOS.
        batch_size: windows scored at once.
        max_tokens: use the first ``max_tokens`` tokens of the text; None: all.
        label: what the progress bar and messages call this text.

    Returns:
        perplexity, nll (mean, nats per predicted token), num_tokens (predicted), num_windows, num_dropped (tokens of
        the tail), window, stride, bos (whether), batch_size, max_tokens. Logits are summed up in float32.

    Raises:
        UserError: unusable settings, a text shorter than one window, a loss that is not finite, or the batch does
            not fit into memory.
    """
    import torch

    check(window, stride, max_tokens)
    capacity = window - (bos_token_id is not None)  # tokens of the text in one window
    ids = torch.as_tensor(input_ids, dtype=torch.long)[:max_tokens]
    _check_length(len(ids), capacity, label, window)
    spans = _spans(len(ids), capacity, stride)
    model.eval()
    total, num_tokens = 0.0, 0
    with torch.inference_mode(), tqdm(total=len(spans), desc=f"perplexity of {label}", disable=None) as progress:
        for first in range(0, len(spans), batch_size):
            for batch in _equal_lengths(spans[first : first + batch_size]):
                rows = torch.stack([ids[start:end] for start, end, _ in batch])
                if bos_token_id is not None:
                    rows = torch.cat([torch.full((len(batch), 1), bos_token_id), rows], dim=1)
                try:
                    losses = _losses(model, rows.to(model.device))
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"{label} does not fit into memory with evaluation.perplexity.batch_size={batch_size} and"
                        f" evaluation.perplexity.window={window}; try a batch_size of {max(1, batch_size // 2)}"
                    ) from error
                for row, (start, end, scored_from) in zip(losses, batch, strict=True):
                    # the last loss is that of token end - 1; the first token of a window without BOS has none
                    new = row[-(end - max(scored_from, start + (bos_token_id is None))) :]
                    total += new.sum(dtype=torch.float64).item()
                    num_tokens += len(new)
                    if not math.isfinite(total):
                        raise UserError(
                            f"{label}: the loss is {total} in the window at token {start}: the model gives logits that"
                            " are not finite; if its weights are sound, try model.dtype=bfloat16 or float32"
                        )
                progress.update(len(batch))
    nll = total / num_tokens
    if nll > MAX_NLL:
        raise UserError(f"{label}: the mean loss is {nll:.4g} nats a token, its exponential is not a finite number")
    log.info("perplexity of %s: %.4f over %d tokens", label, math.exp(nll), num_tokens)
    return {
        "perplexity": math.exp(nll),
        "nll": nll,
        "num_tokens": num_tokens,
        "num_windows": len(spans),
        "num_dropped": len(ids) - spans[-1][1],
        "window": window,
        "stride": stride,
        "bos": bos_token_id is not None,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
    }


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
        [num_tokens] int64, and what the text is: corpus, source, split, join and the sha256 of the text.

    Raises:
        UserError: unknown name, missing or unreadable file, or neither the hub nor its cache has the text.
    """
    import torch

    limits = [max_tokens] if max_tokens is not None else []
    if corpus == "bundled":
        text = "\n\n".join(texts.bundled_texts(BUNDLED_TEXT))
        about = {"source": BUNDLED_TEXT, "split": "validation", "join": "\n\n"}
    elif corpus in HUB_CORPORA:
        of_hub = HUB_CORPORA[corpus]
        text = of_hub.separator.join(hub_rows(corpus, option))
        about = {"source": of_hub.repo, "split": of_hub.split, "join": of_hub.separator}
        if of_hub.max_windows is not None:
            limits.append(of_hub.max_windows * window)
    else:
        file = _file(corpus, data_dir, option)
        text = read_text(file, option)
        about = {"source": file.name, "split": "file", "join": ""}
    ids = torch.tensor(text_tokens(tokenizer, text, min(limits, default=None)), dtype=torch.long)
    return ids, {"corpus": corpus, **about, "sha256": hashlib.sha256(text.encode()).hexdigest()}


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


def preflight(
    tokenizer: PreTrainedTokenizerBase,
    corpora: list[str],
    *,
    window: int,
    bos: bool,
    data_dir: Path | None,
) -> None:
    """Check with the tokenizer alone that every text can be scored: it can be had, and has a window of tokens.

    Raises:
        UserError: it cannot.
    """
    if corpora and bos and tokenizer.bos_token_id is None:
        raise UserError("evaluation.perplexity.bos=true: the model's tokenizer has no BOS token")
    for corpus in corpora:
        ids, _ = corpus_tokens(tokenizer, corpus, window=window, max_tokens=window, data_dir=data_dir)
        _check_length(len(ids), window - bos, Path(corpus).stem, window)


def _check_length(num_tokens: int, capacity: int, label: str, window: int) -> None:
    if num_tokens < capacity:
        raise UserError(f"{label}: {num_tokens} tokens are less than one window; evaluation.perplexity.window={window}")


def check(window: int, stride: int | None, max_tokens: int | None) -> None:
    """Raise `UserError` where the settings of ``perplexity`` do not go together."""
    if stride is not None and stride >= window:
        raise UserError(
            f"evaluation.perplexity.stride={stride} must be in 1..{window - 1}, or null for windows that do not overlap"
        )
    if max_tokens is not None and max_tokens < window:
        raise UserError(
            f"evaluation.perplexity.max_tokens={max_tokens} is less than one window:"
            f" evaluation.perplexity.window={window}"
        )


def _spans(num_tokens: int, capacity: int, stride: int | None) -> list[tuple[int, int, int]]:
    """(start, end, first token that is scored here) of every window over a text of ``num_tokens``."""
    if stride is None:
        return [(start, start + capacity, start) for start in range(0, num_tokens - capacity + 1, capacity)]
    spans = [(0, capacity, 0)]
    while spans[-1][1] < num_tokens:
        start, end, _ = spans[-1]
        spans.append((start + stride, min(start + stride + capacity, num_tokens), end))
    return spans


def _equal_lengths(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Only the last window of a text can be shorter: it then goes alone."""
    last = spans[-1]
    if last[1] - last[0] == spans[0][1] - spans[0][0]:
        return [spans]
    return [spans[:-1], [last]]


def _losses(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """[batch, tokens - 1] float32: negative log-likelihood of every token but the first, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    logits = model(rows, use_cache=False).logits
    # float32 for some positions at a time: of all of them it would be gigabytes with a large vocabulary
    num_positions = max(1, MAX_ELEMENTS // logits.shape[-1])
    losses = []
    for row_logits, row in zip(logits, rows.to(logits.device), strict=True):
        pieces = zip(row_logits[:-1].split(num_positions), row[1:].split(num_positions), strict=True)
        losses.append(torch.cat([cross_entropy(piece.float(), ids, reduction="none") for piece, ids in pieces]))
    return torch.stack(losses)


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
