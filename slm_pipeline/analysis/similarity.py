"""How alike the layers of a model are on different texts: maps of cosine similarity and CKA, their patches, and plans.

The maps of SLM (arXiv 2502.19159), which motivate merging neighbouring layers and play no part in its algorithm. There
each task gives one map, from the first 32 pairs of a question and one of its answer options, in minibatches of 16, the
padded states of a pair flattened to one row. Here a row is a whole question unless asked otherwise: the options of one
question share nearly all their tokens, so their rows are no independent samples, and CKA takes them for a likeness of
layers.

Indices are those of `slm_pipeline.engine.statistics.Statistics`: in a [L + 1, L + 1] map 0 is the embedding output, i
the output of layer i - 1, the last one before the final norm. Patches are runs of layers and leave the embeddings out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from slm_pipeline.analysis.cka import LEAST_ROWS, MinibatchCKA
from slm_pipeline.analysis.patches import agreement, contrast, patches, windows_in_patches
from slm_pipeline.analysis.token_metrics import TOKEN_METRICS
from slm_pipeline.data.calibration import Calibration
from slm_pipeline.data.tokens import tokenized
from slm_pipeline.engine.blocks import entering_and_leaving
from slm_pipeline.engine.statistics import MAX_BATCH_TOKENS, check_finite
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import zero_shot
from slm_pipeline.machine.ranks import Share
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.show.tables import Table
from slm_pipeline.surgery.plan import Plan, merged_windows

if TYPE_CHECKING:
    from slm_pipeline.config import CalibrationConfig
    from slm_pipeline.models.view import ModelView

MINIBATCH = {"mean_pooled": 64, "tokens": 256, "flattened": 64}  # by what a row is: rows of a minibatch, unless said
FEATURES = tuple(MINIBATCH)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        metrics: of `TOKEN_METRICS` (means over all tokens) and ``cka``.
        features: what a row is for CKA. ``mean_pooled``: the mean of a text's tokens; ``tokens``: a token;
            ``flattened``: all tokens of a text side by side, as published, for texts of one length.
        minibatch, estimator, kernel, bandwidth_factor: see `slm_pipeline.analysis.cka`.
        unit_length: scale each token's state to length 1 first. Nearly what each block's own norm does, so what the
            layers see. Without it a few tokens (in Llama-like models the first) have states a hundred times longer
            than all others, and linear CKA sees nothing else.
    """

    metrics: tuple[str, ...] = ("cosine", "cka")
    features: str = "mean_pooled"
    minibatch: int = 64
    estimator: str = "unbiased"
    kernel: str = "linear"
    bandwidth_factor: float = 1.0
    unit_length: bool = True


@dataclass(frozen=True)
class Text:
    """Token sequences that give one map: 1-D int64 tensors, each of at least one token; ``about`` says whence."""

    name: str
    sequences: Sequence[Tensor]
    about: Mapping[str, Any]


def calibration_text(name: str, config: CalibrationConfig, tokenizer: Any, data_dir: Path | None) -> Text:
    """Calibration samples as the calibrate stage draws them."""
    samples = Calibration(config, data_dir).sample(tokenizer)
    return Text(name, list(samples.input_ids), {"kind": "calibration", **asdict(config), "mode": samples.mode})


def task_text(
    task: str, tokenizer: Any, *, data: str, data_dir: Path | None, limit: int, per_option: bool, max_tokens: int
) -> Text:
    """The first ``limit`` examples of a task, each with all its answer options; ``per_option``: of lm-eval's requests,
    each a context and one option. ``data`` and ``data_dir`` as for `zero_shot.score_task`."""
    read = zero_shot.task_requests if per_option else zero_shot.task_documents
    texts = read(task, data=data, limit=limit, data_dir=data_dir)
    tokens = [tokenized(tokenizer, text, special=True)[:max_tokens] for text in texts]
    about = {"kind": "task", "data": data, "per_option": per_option, "max_tokens": max_tokens}
    return Text(task, [torch.tensor(ids, dtype=torch.int64) for ids in tokens], about)


def check_rows(text: Text, settings: Settings) -> None:
    """Raise `UserError` if a text has too few rows for one minibatch, or unequal lengths that cannot be flattened."""
    lengths = sorted({len(sequence) for sequence in text.sequences})
    rows = sum(map(len, text.sequences)) if settings.features == "tokens" else len(text.sequences)
    if "cka" in settings.metrics and rows < settings.minibatch:
        raise UserError(
            f"{text.name}: {rows} rows are fewer than analysis.minibatch={settings.minibatch}; give it more text"
        )
    if "cka" in settings.metrics and settings.features == "flattened" and len(lengths) > 1:
        raise UserError(
            f"{text.name}: --features=flattened needs texts of one length, these have {lengths[0]} to {lengths[-1]}"
            f" tokens; --max-tokens={lengths[0]} cuts them to one"
        )


def measure(view: ModelView, text: Text, settings: Settings) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The maps of one text, in one pass that keeps no states but those of a minibatch.

    Args:
        view: of L blocks; on a processor, a GPU, or spread over several.

    Returns:
        By metric a [L + 1, L + 1] float64 map on the CPU, NaN where undefined; and the numbers of sequences, tokens,
        rows and minibatches. Padding is in none of it.

    Raises:
        UserError: as `check_rows`, or states that are not finite.
    """
    check_rows(text, settings)
    size = view.num_layers + 1
    chosen = {name: TOKEN_METRICS[name].measure for name in settings.metrics if name in TOKEN_METRICS}
    sums = {name: torch.zeros(size, size, dtype=torch.float64) for name in chosen}
    alignment = MinibatchCKA(settings.minibatch, settings.estimator, settings.kernel, settings.bandwidth_factor)
    for batch in ProgressBar(list(_batches(text.sequences)), desc=f"similarity on {text.name}"):
        states, real = residual_states(view, batch)
        check_finite(states, text.name)
        for name, of_tokens in chosen.items():
            values = of_tokens(states)
            sums[name] += values[real.to(values.device)].sum(dim=0, dtype=torch.float64).cpu()
        if "cka" in settings.metrics:
            alignment.add(sample_rows(states, real, settings.features, settings.unit_length))
    num_tokens = sum(map(len, text.sequences))
    counts = {"num_sequences": len(text.sequences), "num_tokens": num_tokens}
    maps = {name: total / num_tokens for name, total in sums.items()}
    if "cka" in settings.metrics:
        maps["cka"] = alignment.result()
        counts |= {"num_rows": alignment.num_rows, "num_minibatches": alignment.num_minibatches}
    return maps, counts


def _batches(sequences: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Sequences in order, as many at a time as have `MAX_BATCH_TOKENS` tokens with their padding; at least one."""
    batch: list[Tensor] = []
    for sequence in sequences:
        longest = max(map(len, [*batch, sequence]))
        if batch and longest * (len(batch) + 1) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    yield batch


@torch.no_grad()
def residual_states(view: ModelView, sequences: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What enters each block and leaves the last one.

    Padding is on the right, where no real token of a causal model sees it.

    Returns:
        L + 1 states [batch, longest, d], each on its block's device, and [batch, longest] bool on the CPU: the tokens
        that are not padding.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    inputs = {"input_ids": pad_sequence(list(sequences), batch_first=True).to(view.device)}
    if not real.all():
        inputs["attention_mask"] = real.long().to(view.device)
    last = view.num_layers - 1
    entering, leaving, _ = entering_and_leaving(view, inputs, range(view.num_layers), [last], [])
    return [*(entering[layer] for layer in range(view.num_layers)), leaving[last]], real


def sample_rows(
    states: Sequence[Tensor], real: Tensor | None = None, features: str = "tokens", unit_length: bool = True
) -> list[Tensor]:
    """States as CKA's rows.

    Args:
        states: [batch, length, d] each.
        real: [batch, length] bool, False for padding; None: there is none.
        features, unit_length: see `Settings`. Tokens are shuffled, always alike, so that a minibatch has tokens of all
            sequences.

    Returns:
        [rows, features] of each state.
    """
    if real is None:
        real = torch.ones(states[0].shape[:2], dtype=torch.bool)
    order = torch.randperm(int(real.sum()), generator=torch.Generator().manual_seed(0))
    rows = []
    for state in states:
        state = normalize(state.float(), dim=-1) if unit_length else state
        mask = real.to(state.device)
        if features == "mean_pooled":
            pooled = state.double().masked_fill(~mask[..., None], 0.0).sum(dim=1)
            rows.append(pooled / mask.sum(dim=1, keepdim=True))
        elif features == "tokens":
            rows.append(state[mask][order.to(state.device)])
        else:
            rows.append(state.flatten(start_dim=1))
    return rows


class TokenAlignment:
    """CKA over the tokens that the calibration pass sees: what the picture of every run shows beside the cosine."""

    tokens_together = MINIBATCH["tokens"]

    def __init__(self) -> None:
        self._cka = MinibatchCKA(MINIBATCH["tokens"])

    def observe(self, states: Sequence[Tensor]) -> None:
        """Take in the L + 1 states ([batch, length, d]) of a batch without padding."""
        self._cka.add(sample_rows(states))
        self._size = len(states)

    def gather(self, share: Share) -> None:
        """Add what the other processes have seen."""
        self._cka.gather(share)

    def result(self) -> Tensor:
        """The map of `MinibatchCKA.result`; NaN throughout if there are fewer tokens than the estimator needs."""
        if self._cka.num_rows < LEAST_ROWS[self._cka.estimator]:
            return torch.full((self._size, self._size), torch.nan, dtype=torch.float64)
        return self._cka.result()

    def settings(self) -> dict[str, Any]:
        """How it was measured, as JSON."""
        settings = Settings(features="tokens", minibatch=self._cka.minibatch)
        counts = {"num_rows": self._cka.num_rows, "num_minibatches": self._cka.num_minibatches}
        return {**asdict(settings), "metrics": list(settings.metrics), **counts}


def map_summary(similarity: Tensor, num_patches: int | None = None) -> dict[str, Any]:
    """A [L + 1, L + 1] map as JSON: matrix (null where undefined), patches (first and last layer), `contrast`."""
    layers = similarity[1:, 1:]
    runs = patches(layers, num_patches)
    return {
        "matrix": [[_number(value) for value in row] for row in similarity.tolist()],
        "patches": [list(run) for run in runs],
        **{name: _number(value) for name, value in contrast(layers, runs).items()},
    }


def summarize(
    maps: Mapping[str, Mapping[str, Tensor]], plans: Mapping[str, Plan], num_patches: int | None = None
) -> dict[str, Any]:
    """What `measure` found, as JSON.

    Args:
        maps: text -> metric -> map, the same metrics for each.
        plans: path -> plan, for models of this depth.
        num_patches: see `slm_pipeline.analysis.patches.patches`.

    Returns:
        ``maps`` (text -> metric -> `map_summary`), ``agreement`` (metric -> [texts][texts] correlations over pairs of
        layers), ``plans`` (path, method, windows, dropped, and ``in_patches``: text -> metric -> how many windows lie
        in one patch, and how many would if they lay anywhere).
    """
    found = {
        text: {metric: map_summary(values, num_patches) for metric, values in of_text.items()}
        for text, of_text in maps.items()
    }
    metrics = list(next(iter(maps.values())))
    agreements = {metric: agreement([of_text[metric][1:, 1:] for of_text in maps.values()]) for metric in metrics}
    return {
        "maps": found,
        "agreement": {
            metric: [[_number(value) for value in row] for row in values.tolist()]
            for metric, values in agreements.items()
        },
        "plans": [_plan_summary(path, plan, found) for path, plan in plans.items()],
    }


def _plan_summary(path: str, plan: Plan, maps: Mapping[str, Any]) -> dict[str, Any]:
    windows = merged_windows(plan.layer_groups)

    def counted(runs: Sequence[Sequence[int]]) -> dict[str, float]:
        number, expected = windows_in_patches(windows, [(first, last) for first, last in runs])
        return {"windows": number, "expected": expected}

    return {
        "path": path,
        "method": plan.method,
        "windows": [list(window) for window in windows],
        "dropped": plan.dropped,
        "in_patches": {
            text: {metric: counted(one["patches"]) for metric, one in of_text.items()} for text, of_text in maps.items()
        },
    }


def label(metric: str) -> str:
    """What a metric is called."""
    return TOKEN_METRICS[metric].label if metric in TOKEN_METRICS else "CKA"


def describe(metric: str, settings: Settings) -> str:
    """What a metric's numbers are, in words."""
    if metric in TOKEN_METRICS:
        return TOKEN_METRICS[metric].words
    of = {
        "mean_pooled": "each text's mean state",
        "tokens": "single tokens",
        "flattened": "each text's states in a row",
    }
    scaled = "states scaled to length 1" if settings.unit_length else "states as they are"
    kernel = f"{settings.kernel} kernel"
    if settings.kernel == "rbf" and settings.bandwidth_factor != 1:
        kernel += f" of {settings.bandwidth_factor:g} median distances"
    return f"CKA of {of[settings.features]}, {settings.estimator}, {kernel}, {scaled}"


def describe_counts(counts: Mapping[str, int]) -> str:
    """What `measure` counted, in words."""
    words = f"{counts['num_tokens']} tokens in {counts['num_sequences']} sequences"
    if "num_rows" in counts:
        words += f", {counts['num_rows']} rows in {counts['num_minibatches']} minibatches"
    return words


def report(found: Mapping[str, Any]) -> str:
    """The tables, for the terminal. ``found`` is what `summarize` returns."""
    parts = [
        "inside, outside: mean similarity of two layers of one patch, of two; beyond: how much of the former is not\n"
        "the distance of the layers (0: neighbours are alike, and that is all)\n"
    ]
    for metric, values in found["agreement"].items():
        rows = [
            [text, *(_shown(one[metric][key]) for key in ("inside", "outside", "beyond_distance")), _runs(one[metric])]
            for text, one in found["maps"].items()
        ]
        columns = [label(metric), "inside", "outside", "beyond", "patches"]
        parts.append("\n" + Table(columns, rows).text())
        if len(values) > 1:
            rows = [[text, *map(_shown, row)] for text, row in zip(found["maps"], values, strict=True)]
            parts.append(f"\nCorrelation of the maps of {label(metric)}\n{Table(['', *found['maps']], rows).text()}")
    if found["plans"]:
        parts.append("\nMerged windows that lie in one patch (in brackets: anywhere in the stack so many would)\n")
        for plan in found["plans"]:
            windows = ", ".join(f"{first}-{last}" for first, last in plan["windows"]) or "none"
            parts.append(f"  {plan['method']}, {plan['path']}: merges {windows}{_dropped(plan['dropped'])}\n")
            if plan["windows"]:
                rows = [
                    [text, *(f"{c['windows']} of {len(plan['windows'])} ({c['expected']:.1f})" for c in one.values())]
                    for text, one in plan["in_patches"].items()
                ]
                columns = ["text", *(label(metric) for metric in found["agreement"])]
                parts.append(Table(columns, rows).text())
    return "".join(parts)


def _runs(summary: Mapping[str, Any]) -> str:
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in summary["patches"])


def _dropped(layers: Sequence[int]) -> str:
    return f"; drops {', '.join(map(str, layers))}" if layers else ""


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
