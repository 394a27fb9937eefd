"""Perplexity of running text, cut into windows.

Without a stride the windows do not overlap and each predicts all its tokens but the first: the convention of GPTQ,
SLEB and CoMe (window 2048) and of the SLM authors' script (window 128). With a stride the windows overlap and only
tokens that no earlier window predicted are scored, so that every token has a long context.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import BatchSize, Count, FilePath, Range, Tokens
from slm_pipeline.data.corpora import corpus_fingerprint, corpus_labels, corpus_tokens
from slm_pipeline.data.overlap import word_passages
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.measure import Measure, Scored
from slm_pipeline.machine.ranks import Share
from slm_pipeline.models.context import Context
from slm_pipeline.results.number import Number
from slm_pipeline.show.progress import ProgressBar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pipeline.models.sizes import Sizes

log = logging.getLogger(__name__)

MAX_ELEMENTS = 1 << 26  # logits in float32 at a time: 256 MB
MAX_NLL = 700.0  # nats; exp of more is not a float


@dataclass(kw_only=True)
class Perplexity(Measure):
    """Perplexity of each corpus, a part each. Options: see `perplexity` and `corpus_tokens`."""

    corpora: list[FilePath] = field(default_factory=list)  # bundled | wikitext2 | c4 | ptb | a text file
    window: Annotated[int, Range(at_least=2, at_most=2**20)] = 2048  # tokens
    stride: Tokens | None = None  # null: windows do not overlap; else only a window's last `stride` tokens are scored
    bos: bool | None = None  # put the BOS token before every window; null: where the model needs it
    max_tokens: Count | None = None  # null: the whole text
    batch_size: BatchSize = 4

    name: ClassVar[str] = "perplexity"
    shares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.window, self.stride, self.max_tokens)

    def parts(self) -> list[str]:
        return self.corpora

    def label(self, part: str) -> str:
        return f"{self.name}/{corpus_labels(self.corpora)[part]}"

    def names(self, part: str) -> list[str]:
        return [""]

    def check(self, context: Context) -> None:
        if self.bos and context.source.special_tokens is not None and "bos" not in context.source.special_tokens:
            raise UserError(f"evaluation.perplexity.bos=true: the tokenizer of {context.source.name} has no BOS token")

    def warnings(self, context: Context) -> list[str]:
        return context.source.lacks_bos(self.bos, "evaluation.perplexity.bos")

    def lengths(self) -> dict[str, int]:
        return {"evaluation.perplexity.window": self.window}

    def identity(self, part: str, context: Context) -> dict[str, Any]:
        return {
            **self.settings("corpora"),
            "bos": context.source.puts_bos(self.bos),
            "text": corpus_fingerprint(part, context.data_dir),
        }

    def preflight(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> None:
        bos = context.source.puts_bos(self.bos)
        if bos and tokenizer.bos_token_id is None:
            raise UserError("evaluation.perplexity.bos=true: the model's tokenizer has no BOS token")
        ids, _ = corpus_tokens(tokenizer, part, window=self.window, max_tokens=self.window, data_dir=context.data_dir)
        _check_length(len(ids), self.window - bos, Path(part).stem, self.window)

    def memory(self, part: str, sizes: Sizes) -> int:
        """A batch in a block, its logits, and some of them in float32, twice."""
        tokens = min(self.batch_size * self.window, self.max_tokens or self.batch_size * self.window)
        pieces = 8 * min(MAX_ELEMENTS, self.window * sizes.vocabulary)
        return max(sizes.running(tokens), sizes.logits(tokens) + pieces)

    def run(self, part: str, scored: Scored, context: Context) -> dict[str, Any]:
        input_ids, about = self._tokens(part, scored.tokenizer, context)
        result = perplexity(
            scored.model,
            input_ids,
            window=self.window,
            stride=self.stride,
            bos_token_id=scored.tokenizer.bos_token_id if context.source.puts_bos(self.bos) else None,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            label=Path(part).stem,
        )
        return {**about, **result}

    def numbers(self, part: str, found: Mapping[str, Any]) -> list[Number]:
        overlap = "not overlapping" if found["stride"] is None else f"the last {found['stride']} tokens of each scored"
        split = "" if found["split"] == "file" else f"{found['split']} split, "
        how = (
            f"{split}{found['num_tokens']} tokens scored, windows of {found['window']} tokens, {overlap},"
            f" {'BOS before each' if found['bos'] else 'no BOS'}"
        )
        settings = {name: value for name, value in found.items() if name not in ("perplexity", "nll")}
        measured = {"how": how, **settings}
        return [Number("", found["perplexity"], "perplexity", higher_is_better=False, measured=measured)]

    def texts(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> list[str]:
        input_ids, _ = self._tokens(part, tokenizer, context)
        return word_passages(str(tokenizer.decode(input_ids, clean_up_tokenization_spaces=False)))

    def _tokens(
        self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return corpus_tokens(tokenizer, part, window=self.window, max_tokens=self.max_tokens, data_dir=context.data_dir)


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

    Processes that work together share out the batches, which are those of one process.

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
    share = Share.of(-(-len(spans) // batch_size))
    own = range(share.numbers.start * batch_size, min(share.numbers.stop * batch_size, len(spans)))
    totals = torch.zeros(len(spans), dtype=torch.float64)  # of each window
    numbers = torch.zeros(len(spans), dtype=torch.int64)
    with torch.inference_mode(), ProgressBar(total=len(own), desc=f"perplexity of {label}") as progress:
        for first in own[::batch_size]:
            number = first
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
                    totals[number], numbers[number] = new.sum(dtype=torch.float64), len(new)
                    number += 1
                progress.update(len(batch))
            if not bool(totals[first:number].isfinite().all()):
                break  # said below, in all processes alike
    totals, numbers = share.summed(totals), share.summed(numbers)
    if bool((bad := ~totals.isfinite()).any()):
        window_number = int(bad.nonzero()[0])
        raise UserError(
            f"{label}: the loss is {float(totals[window_number])} in the window at token {spans[window_number][0]}: the"
            " model gives logits that are not finite; if its weights are sound, try model.dtype=bfloat16 or float32"
        )
    num_tokens = int(numbers.sum())
    nll = sum(totals.tolist()) / num_tokens
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
