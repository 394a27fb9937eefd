"""Agreement with the dense model on held-out text: how far a compressed model's predictions are from those it had.

Both models read the same tokens, and at each of them the two distributions of the next one are compared: no label
enters, so that far fewer tokens tell two models apart than accuracies need. KL(dense || model) and the share of equal
first choices are llama.cpp's "KL divergence" and "same top p"; Dutta et al., arXiv 2407.09141, argue for both.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from slm_pipeline.assets import texts
from slm_pipeline.data.tokens import text_tokens
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.perplexity import BUNDLED_TEXT, HUB_CORPORA, corpus_tokens, hub_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pipeline.models.view import ModelView

log = logging.getLogger(__name__)

OPTION = "evaluation.fidelity.corpora"
MAX_ELEMENTS = 1 << 25  # logits of each model in float32 at a time: 128 MB
TAIL = 0.99  # the quantile that is reported


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
    with torch.inference_mode(), tqdm(total=len(windows), desc=f"fidelity on {label}", disable=None) as progress:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            rows = [piece if bos_token_id is None else _after(bos_token_id, piece) for _, piece in batch]
            try:
                found = _compared(*views, rows)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{label} does not fit into memory with evaluation.fidelity.batch_size={batch_size} and"
                    f" evaluation.fidelity.window={window}; try a batch_size of {max(1, batch_size // 2)}"
                ) from error
            for (number, _), (divergence, same) in zip(batch, found, strict=True):
                if not np.isfinite(divergence).all():
                    raise UserError(
                        f"{label}: the divergence is not finite in document {number + 1}: one of the two models gives"
                        " logits that are not finite; if its weights are sound, try model.dtype=bfloat16 or float32"
                    )
                divergences[number].append(divergence)
                agreements[number] += same
            progress.update(len(batch))
    numbers = _statistics([np.concatenate(found) for found in divergences.values()], list(agreements.values()))
    log.info(
        "fidelity on %s: KL %.4f nats a token, the same first choice at %.2f%% of %d tokens",
        label, numbers["kl"], numbers["top1_agreement"], numbers["num_tokens"],
    )  # fmt: skip
    return {**numbers, "window": window, "bos": has_bos, "batch_size": batch_size}


def corpus_documents(
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    *,
    window: int,
    max_tokens: int | None = None,
    data_dir: Path | None = None,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """An evaluation text as documents, for `fidelity`: those that it has, or windows where it is running text.

    Args:
        tokenizer: the model's.
        corpus: as for `corpus_tokens`. ``bundled`` has stories and ``c4`` web pages; ``wikitext2``, ``ptb`` and files
            are cut into windows.
        window: tokens of one window, where the text is cut into these; a shorter tail is left out.
        max_tokens: of all documents together; the last one may be cut. None: all.
        data_dir: where a relative file is looked up; None: the working directory.

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
        written = hub_rows(corpus, OPTION)
        about = {"source": of_hub.repo, "split": of_hub.split, "documents": "row"}
    else:
        ids, of_text = corpus_tokens(
            tokenizer, corpus, window=window, max_tokens=max_tokens, data_dir=data_dir, option=OPTION
        )
        if len(ids) < window:
            raise UserError(
                f"{corpus}: {len(ids)} tokens are less than one window; evaluation.fidelity.window={window}"
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


def preflight(
    tokenizer: PreTrainedTokenizerBase, corpora: list[str], *, window: int, bos: bool, data_dir: Path | None
) -> None:
    """Check with the tokenizer alone that every text can be had and has a token to predict.

    Raises:
        UserError: it cannot.
    """
    if corpora and bos and tokenizer.bos_token_id is None:
        raise UserError("evaluation.fidelity.bos=true: the model's tokenizer has no BOS token")
    for corpus in corpora:
        documents, _ = corpus_documents(tokenizer, corpus, window=window, max_tokens=window, data_dir=data_dir)
        if all(len(ids) + bos < 2 for ids in documents):
            raise UserError(f"{OPTION}={corpus}: no document has a token to predict")


def _after(bos_token_id: int, ids: Tensor) -> Tensor:
    import torch

    return torch.cat([torch.tensor([bos_token_id]), ids])


def _compared(dense: ModelView, model: ModelView, rows: Sequence[Tensor]) -> list[tuple[np.ndarray, int]]:
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
    return [(divergence.numpy(), int(same.sum())) for divergence, same in found]


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
