"""Dynamic layer selection: how few layers would do if every sequence could choose how many it goes through.

The study of "Dynamic layer selection in decoder-only transformers" (arXiv 2410.20022): layers are skipped in an evenly
spaced pattern, and an oracle that knows the outcome gives each sequence the fewest layers that serve it as well as the
whole model does. No per-sequence controller that chooses among these patterns can do better; a static plan, which is
free to keep other layers, may. Nothing is pruned and no checkpoint is written.

Departure: the paper judges text that the model generates; here it is the loss of given text, so that no decoding and
no task data are needed.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, batches
from slm_pipeline.engine.keep_sets import keep_set_losses
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.show.tables import Table
from slm_pipeline.surgery.apply import PlannedBlocks
from slm_pipeline.surgery.plan import Plan

_SAMPLE_TOKENS = 2048  # tokens of text walked at once: the states of all keep-sets are in memory


def evenly_spaced(num_layers: int) -> list[list[int]]:
    """For k = 1 ... num_layers the k layers that are kept, ascending.

    They lie at j (num_layers - 1) / (k - 1), j = 0 ... k - 1, rounded to the nearest layer, halves up: from two on the
    first and the last layer are among them, and no two positions fall together. A single one is layer 0, which
    all others keep too.
    """
    last = num_layers - 1
    return [[0], *([(2 * j * last + k - 1) // (2 * (k - 1)) for j in range(k)] for k in range(2, num_layers + 1))]


def measure(view: ModelView, input_ids: Tensor, plans: Sequence[Plan] = ()) -> tuple[Tensor, Tensor]:
    """Mean next-token loss of each sequence under every evenly spaced keep-set and every plan.

    Args:
        view: the dense model, of L layers; never changed.
        input_ids: [N, T] int64, T at least 2.
        plans: for models of this depth.

    Returns:
        [L, N] and [plans, N] float64 on the CPU, nats per predicted token; infinity where a loss is not finite. Row
        L - 1 of the first is the dense model.

    Raises:
        UserError: a plan for another depth, or the dense model's own loss is not finite.
    """
    stacks = [PlannedBlocks(plan, view) for plan in plans]
    keep_sets = evenly_spaced(view.num_layers)
    spaced: list[Tensor] = []
    planned: list[list[Tensor]] = [[] for _ in stacks]
    for batch in ProgressBar(batches(input_ids.to(view.device), _SAMPLE_TOKENS), desc="dynamic skip"):
        runner = BlockRunner(view, batch)
        spaced.append(keep_set_losses(runner, keep_sets, batch).cpu())
        for stack, found in zip(stacks, planned, strict=True):
            hidden = runner.states[0]
            for block in stack:
                hidden = runner.run(block, hidden)
            found.append(runner.losses(hidden, batch).cpu())
    num_predicted = input_ids.shape[1] - 1
    losses = torch.cat(spaced, dim=1) / num_predicted
    if not losses[-1].isfinite().all():
        raise UserError(
            "the dense model's loss is not finite: it overflows in its dtype; try model.dtype=bfloat16 or float32"
        )
    plan_losses = losses.new_empty(len(stacks), len(input_ids))
    for row, found in zip(plan_losses, planned, strict=True):
        row.copy_(torch.cat(found) / num_predicted)
    return losses.where(losses.isfinite(), math.inf), plan_losses.where(plan_losses.isfinite(), math.inf)


def fewest_layers(losses: Tensor, tolerance: float) -> list[int]:
    """For each sequence the smallest k whose loss is at most (1 + tolerance) times the whole model's.

    Args:
        losses: [L, N], row k - 1 for k layers.
        tolerance: at least 0.
    """
    good = losses <= losses[-1] * (1 + tolerance)
    return [int(number) + 1 for number in good.int().argmax(dim=0)]  # argmax gives the first of equals


def best_of_fewer(losses: Tensor) -> Tensor:
    """[L, N]: for each sequence its lowest loss with at most k layers, row k - 1 for k."""
    return losses.cummin(dim=0).values


def summarize(losses: Tensor, plan_losses: Tensor, plans: Mapping[str, Plan], tolerance: float) -> dict[str, Any]:
    """What `measure` found, as JSON.

    Args:
        losses, plan_losses: as `measure` returns them.
        plans: path -> plan, in the order of ``plan_losses``.
        tolerance: of the oracle, see `fewest_layers`.

    Returns:
        num_layers, tolerance, keep_sets, losses ([L][N]); ``static`` and ``at_most`` (one keep-set for everybody, and
        each sequence's best of at most k layers: [L] of loss and perplexity); ``oracle`` (num_layers [N] and their
        mean and median, mean_fraction of all layers, counts of k, loss, perplexity); ``plans`` (path, method,
        num_layers, of which some may lack a sublayer, losses [N], loss, perplexity). Losses in nats per token; null
        for what is not finite.
    """
    depth, num_sequences = losses.shape
    chosen = fewest_layers(losses, tolerance)
    served = losses[torch.tensor(chosen) - 1, torch.arange(num_sequences)]
    counts = Counter(chosen)
    return {
        "num_layers": depth,
        "tolerance": tolerance,
        "keep_sets": evenly_spaced(depth),
        "losses": [[_number(loss) for loss in row] for row in losses.tolist()],
        "static": [_quality(row) for row in losses],
        "at_most": [_quality(row) for row in best_of_fewer(losses)],
        "oracle": {
            "num_layers": chosen,
            "mean_num_layers": statistics.fmean(chosen),
            "median_num_layers": statistics.median(chosen),
            "mean_fraction": statistics.fmean(chosen) / depth,
            "counts": [counts[k] for k in range(1, depth + 1)],
            **_quality(served),
        },
        "plans": [
            {
                "path": path,
                "method": plan.method,
                "num_layers": plan.num_layers,
                "losses": [_number(loss) for loss in row.tolist()],
                **_quality(row),
            }
            for (path, plan), row in zip(plans.items(), plan_losses, strict=True)
        ],
    }


def _quality(losses: Tensor) -> dict[str, float | None]:
    """Loss and perplexity of all sequences together: they are of equal length."""
    mean = losses.mean()
    return {"loss": _number(float(mean)), "perplexity": _number(float(mean.exp()))}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report(found: Mapping[str, Any]) -> str:
    """The tables and the sentence between them, for the terminal. ``found`` is what `summarize` returns."""
    depth, oracle = found["num_layers"], found["oracle"]
    curves = zip(found["static"], found["at_most"], oracle["counts"], strict=True)
    rows = [[str(k), *_cells(same), *_cells(own), str(count)] for k, (same, own, count) in enumerate(curves, start=1)]
    columns = ["layers", "loss", "perplexity", "oracle loss", "oracle perplexity", "enough for"]
    needed, tolerance = oracle["num_layers"], found["tolerance"]
    within = f" (loss at most {100 * tolerance:g}% higher)" if tolerance else ""
    parts = [
        "loss: the same k evenly spaced layers for all; oracle: the best of at most k for each sequence;\n"
        f"enough for: sequences as good as with the whole model{within}, and not with fewer layers\n",
        Table(columns, rows).text(),
        f"\nEach sequence with the fewest layers enough for it: {oracle['mean_num_layers']:.1f} of {depth} on average"
        f" ({100 * oracle['mean_fraction']:.1f}%),\nmedian {oracle['median_num_layers']:g}, {min(needed)} to"
        f" {max(needed)}; perplexity {_shown(oracle['perplexity'])}, the whole model's"
        f" {_shown(found['static'][-1]['perplexity'])}\n",
    ]
    if found["plans"]:
        columns = ["plan", "layers", "loss", "perplexity", "evenly spaced", "oracle", "file"]
        table = Table(columns, [_plan_row(plan, found) for plan in found["plans"]])
        parts.append(
            f"\nPlans, and the perplexity of evenly spaced layers and of the oracle at their depth\n{table.text()}"
        )
    return "".join(parts)


def _plan_row(plan: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    depth = plan["num_layers"]
    same_depth = [_shown(found[curve][depth - 1]["perplexity"]) if depth else "" for curve in ("static", "at_most")]
    return [plan["method"], str(depth), *_cells(plan), *same_depth, plan["path"]]


def _cells(quality: Mapping[str, Any]) -> list[str]:
    return [_shown(quality["loss"]), _shown(quality["perplexity"])]


def _shown(value: float | None) -> str:
    """Four digits; a dash for what is not finite."""
    return "-" if value is None else f"{value:.4g}"
