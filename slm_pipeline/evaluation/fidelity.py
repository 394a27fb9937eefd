"""Agreement with the dense model on held-out text: how far a compressed model's predictions are from those it had.

Both models read the same tokens, and at each of them the two distributions of the next one are compared: no label
enters, so that far fewer tokens tell two models apart than accuracies need. KL(dense || model) and the share of equal
first choices are llama.cpp's "KL divergence" and "same top p"; Dutta et al., arXiv 2407.09141, argue for both.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from slm_pipeline.config.ranges import BatchSize, Count, FilePath, Range
from slm_pipeline.data.corpora import corpus_documents, corpus_fingerprint, corpus_labels
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.measure import Measure, Scored
from slm_pipeline.machine.ranks import Share
from slm_pipeline.models.context import Context
from slm_pipeline.results.number import PERCENT, Number
from slm_pipeline.show.progress import ProgressBar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.view import ModelView

log = logging.getLogger(__name__)

OPTION = "evaluation.fidelity.corpora"
MAX_ELEMENTS = 1 << 25  # logits of each model in float32 at a time: 128 MB
TAIL = 0.99  # the quantile that is reported


@dataclass(kw_only=True)
class Fidelity(Measure):
    """Agreement with the dense model on each corpus, a part each. See `fidelity` and `corpus_documents`."""

    corpora: list[FilePath] = field(default_factory=list)  # bundled | wikitext2 | c4 | ptb | a text file
    window: Annotated[int, Range(at_least=2, at_most=2**20)] = 2048  # tokens
    bos: bool | None = None  # put the BOS token before every window; null: where the model needs it
    max_tokens: Count | None = None  # null: the whole text
    batch_size: BatchSize = 4

    name: ClassVar[str] = "fidelity"
    shares_samples: ClassVar[bool] = True
    of: ClassVar[Sequence[str]] = ("pruned", "repaired", "recovered")

    @property
    def reads_dense(self) -> bool:
        return True

    def parts(self) -> list[str]:
        return self.corpora

    def label(self, part: str) -> str:
        return f"{self.name}/{corpus_labels(self.corpora)[part]}"

    def names(self, part: str) -> list[str]:
        return ["kl", "kl_p99", "top1_agreement"]

    def check(self, context: Context) -> None:
        if self.bos and context.source.special_tokens is not None and "bos" not in context.source.special_tokens:
            raise UserError(f"evaluation.fidelity.bos=true: the tokenizer of {context.source.name} has no BOS token")

    def warnings(self, context: Context) -> list[str]:
        return context.source.lacks_bos(self.bos, "evaluation.fidelity.bos")

    def lengths(self) -> dict[str, int]:
        return {"evaluation.fidelity.window": self.window}

    def identity(self, part: str, context: Context) -> dict[str, Any]:
        return {
            **self.settings("corpora"),
            "bos": context.source.puts_bos(self.bos),
            "text": corpus_fingerprint(part, context.data_dir, OPTION),
        }

    def preflight(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> None:
        bos = context.source.puts_bos(self.bos)
        if bos and tokenizer.bos_token_id is None:
            raise UserError("evaluation.fidelity.bos=true: the model's tokenizer has no BOS token")
        documents, _ = self._documents(part, tokenizer, context, most=self.window)
        if all(len(ids) + bos < 2 for ids in documents):
            raise UserError(f"{OPTION}={part}: no document has a token to predict")

    def memory(self, part: str, sizes: Sizes) -> int:
        """A batch in a block of either model, or pieces of logits of both in float32, some times over."""
        tokens = self.batch_size * self.window
        pieces = (6 * 4 + sizes.item_bytes) * min(MAX_ELEMENTS, tokens * sizes.vocabulary)
        return sizes.states(tokens, 2) + max(sizes.running(tokens), pieces)

    def run(self, part: str, scored: Scored, context: Context) -> dict[str, Any]:
        documents, about = self._documents(part, scored.tokenizer, context, most=self.max_tokens)
        result = fidelity(
            scored.model,
            scored.dense,
            documents,
            window=self.window,
            bos_token_id=scored.tokenizer.bos_token_id if context.source.puts_bos(self.bos) else None,
            batch_size=self.batch_size,
            label=Path(part).stem,
        )
        return {**about, **result}

    def numbers(self, part: str, found: Mapping[str, Any]) -> list[Number]:
        split = "" if found["split"] == "file" else f"{found['split']} split, "
        bos = "BOS before each" if found["bos"] else "no BOS"
        how = (
            f"{split}{found['num_tokens']} tokens of {found['num_documents']} documents ({found['documents']}),"
            f" windows of {found['window']} tokens, {bos}"
        )
        names = ("num_tokens", "num_documents", "documents", "split", "window", "bos", "batch_size", "max_tokens")
        measured = {"how": how, **{name: found[name] for name in names}, "sha256": found["sha256"]}
        kinds = (("kl", "nats/token", False), ("kl_p99", "nats/token", False), ("top1_agreement", PERCENT, True))
        return [
            Number(name, found[name], unit, found[f"{name}_stderr"], higher, measured, detail=name == "kl_p99")
            for name, unit, higher in kinds
        ]

    def _documents(
        self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context, most: int | None
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        return corpus_documents(
            tokenizer, part, window=self.window, max_tokens=most, data_dir=context.data_dir, option=OPTION
        )


def fidelity(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    documents: Sequence[torch.Tensor | np.ndarray],
    *,
    window: int,
    bos_token_id: int | None,
    batch_size: int,
    label: str,
) -> dict[str, Any]:
    """Compare the next-token distributions of two models, at every token that has one before it.

    Processes that work together share out the batches, which are those of one process.

    Args:
        model: any causal language model that `ModelView` knows; is left in evaluation mode.
        dense: the model that it is compared with, of the same vocabulary; may be on other devices, and be ``model``.
        documents: [num_tokens] integers each, tokenised without special tokens. A long one is cut into windows that do
            not overlap; a last shorter window is kept. No window spans two documents.
        window: tokens of one forward pass, BOS included.
        bos_token_id: put before every window, so that its first token is predicted too; None: no BOS.
        batch_size: windows compared at once. Shorter ones are filled up on the right, where a causal model looks at
            them only from tokens that do not count.
        label: what the progress bar and messages call this text.

    Returns:
        kl (mean of KL(dense || model), nats per predicted token), kl_p99 (its 99th percentile over all tokens, linear
        between order statistics), top1_agreement (percent of tokens at which the likeliest token is the same), each
        with <name>_stderr, num_tokens (predicted), num_documents (that have any), window, bos (whether), batch_size.

        Standard errors take documents as the sample, as tokens of one document are alike: with sums y_d over the n_d
        tokens of D documents and the mean R = sum y_d / sum n_d, that of the ratio estimator,
        sqrt(D / (D - 1) * sum (y_d - R n_d)^2) / sum n_d (Cochran, Sampling Techniques, 1977, section 2.11). That of
        the percentile is Woodruff's (1952): half the distance of the quantiles one standard error of the share of
        tokens beyond it above and below. None with a single document.

    Raises:
        UserError: no document has a token to predict, logits that are not finite, or the batch does not fit into
            memory.
    """
    import torch

    from slm_pipeline.models.view import ModelView

    has_bos = bos_token_id is not None
    windows = [
        (number, piece)
        for number, ids in enumerate(documents)
        for piece in torch.as_tensor(ids, dtype=torch.long).split(window - has_bos)
        if len(piece) + has_bos > 1
    ]
    if not windows:
        raise UserError(f"{label}: none of the {len(documents)} documents has a token to predict")
    views = ModelView(dense.eval()), ModelView(model.eval())
    divergences: dict[int, list[np.ndarray]] = {number: [] for number, _ in windows}
    agreements = dict.fromkeys(divergences, 0)
    windows.sort(key=lambda entry: -len(entry[1]))  # little to fill up, and memory runs out at once or never
    share = Share.of(-(-len(windows) // batch_size))
    own = range(share.numbers.start * batch_size, min(share.numbers.stop * batch_size, len(windows)))
    lengths = [len(piece) + has_bos - 1 for _, piece in windows]
    of_windows = [torch.zeros(length) for length in lengths]
    same = torch.zeros(len(windows), dtype=torch.int64)
    with torch.inference_mode(), ProgressBar(total=len(own), desc=f"fidelity on {label}") as progress:
        for first in own[::batch_size]:
            batch = windows[first : first + batch_size]
            rows = [piece if bos_token_id is None else _after(bos_token_id, piece) for _, piece in batch]
            try:
                found = _compared(*views, rows)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{label} does not fit into memory with evaluation.fidelity.batch_size={batch_size} and"
                    f" evaluation.fidelity.window={window}; try a batch_size of {max(1, batch_size // 2)}"
                ) from error
            for place, (divergence, agreeing) in enumerate(found, start=first):
                of_windows[place], same[place] = divergence, agreeing
            progress.update(len(batch))
            if not all(bool(divergence.isfinite().all()) for divergence, _ in found):
                break  # said below, in all processes alike
    found_by_all = share.summed(torch.cat(of_windows)).split(lengths)
    for (number, _), divergence, agreeing in zip(windows, found_by_all, share.summed(same).tolist(), strict=True):
        if not bool(divergence.isfinite().all()):
            raise UserError(
                f"{label}: the divergence is not finite in document {number + 1}: one of the two models gives logits"
                " that are not finite; if its weights are sound, try model.dtype=bfloat16 or float32"
            )
        divergences[number].append(divergence.numpy())
        agreements[number] += agreeing
    numbers = _statistics([np.concatenate(found) for found in divergences.values()], list(agreements.values()))
    log.info(
        "fidelity on %s: KL %.4f nats a token, the same first choice at %.2f%% of %d tokens",
        label, numbers["kl"], numbers["top1_agreement"], numbers["num_tokens"],
    )  # fmt: skip
    return {**numbers, "window": window, "bos": has_bos, "batch_size": batch_size}


def _after(bos_token_id: int, ids: Tensor) -> Tensor:
    import torch

    return torch.cat([torch.tensor([bos_token_id]), ids])


def _compared(dense: ModelView, model: ModelView, rows: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """For each row the divergence at every token but the last, [tokens - 1] float32, and how many first choices agree.

    Rows are filled up with copies of their last token. Logits are made for some positions at a time: of all they would
    be gigabytes with a large vocabulary, twice.
    """
    import torch

    longest = max(map(len, rows))
    filled = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])
    lengths = [len(row) - 1 for row in rows]
    counted = torch.arange(longest - 1) < torch.tensor(lengths)[:, None]
    num_positions = max(1, MAX_ELEMENTS // dense.config.vocab_size)
    pieces = zip(*(_states(view, filled, counted).split(num_positions) for view in (dense, model)), strict=True)
    divergences, agreements = [], []
    for dense_states, states in pieces:
        logits = model.logits(states).float()
        reference = dense.logits(dense_states).float().to(logits.device)
        agreements.append((reference.argmax(-1) == logits.argmax(-1)).cpu())
        log_reference, log_model = reference.log_softmax(-1), logits.log_softmax(-1)
        divergence = (log_reference.exp() * (log_reference - log_model)).sum(-1)
        divergences.append(divergence.clamp_min(0).cpu())  # rounding can put it a little below
    found = zip(torch.cat(divergences).split(lengths), torch.cat(agreements).split(lengths), strict=True)
    return [(divergence, int(same.sum())) for divergence, same in found]


def _states(view: ModelView, rows: Tensor, counted: Tensor) -> Tensor:
    """Final-normed states of the counted tokens: [tokens, d]."""
    states = view.decoder(input_ids=rows.to(view.device), use_cache=False).last_hidden_state
    return states[:, :-1][counted.to(states.device)]


def _statistics(divergences: Sequence[np.ndarray], agreements: Sequence[int]) -> dict[str, Any]:
    """The numbers of `fidelity` from each document's divergences and number of equal first choices."""
    counts = np.array([len(found) for found in divergences])
    values = np.concatenate(divergences).astype(np.float64)
    starts = np.cumsum(counts) - counts
    kl, kl_stderr = _ratio(np.add.reduceat(values, starts), counts)
    same, same_stderr = _ratio(np.array(agreements), counts)
    tail = float(np.quantile(values, TAIL))
    _, beyond = _ratio(np.add.reduceat(values > tail, starts, dtype=np.int64), counts)
    tail_stderr = None
    if beyond is not None:
        low, high = np.quantile(values, [max(0.0, TAIL - beyond), min(1.0, TAIL + beyond)])
        tail_stderr = float(high - low) / 2
    return {
        "kl": kl,
        "kl_stderr": kl_stderr,
        "kl_p99": tail,
        "kl_p99_stderr": tail_stderr,
        "top1_agreement": 100 * same,
        "top1_agreement_stderr": None if same_stderr is None else 100 * same_stderr,
        "num_tokens": len(values),
        "num_documents": len(divergences),
    }


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """The mean over all tokens, and its standard error over documents; None with a single one."""
    ratio = float(sums.sum() / counts.sum())
    number = len(counts)
    if number == 1:
        return ratio, None
    squares = float(np.square(sums - ratio * counts).sum())
    return ratio, (number / (number - 1) * squares) ** 0.5 / float(counts.sum())
