"""Transformer layers as painters: what becomes of the loss if the middle layers are run otherwise (arXiv 2407.09298).

The study of Sun et al.: the layers at both ends stay, of the middle ones more and more, from the centre outwards, are
skipped, repeated, reordered or run side by side. If the middle layers work in one common space, the model bears it.

Departures: what is measured is the loss of given text, not the score of benchmarks; `swap` exchanges the two ends of
the range (the paper exchanges neighbours, which is a range of two).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, batches
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.show.tables import Table
from slm_pipeline.surgery.block import Block

_SAMPLE_TOKENS = 2048  # tokens of text whose states of all layers are in memory at once

VARIANTS = {
    "skip": "they are left out",
    "repeat": "the centre layer in the place of each",
    "reverse": "in reverse order",
    "random": "in random order, mean over several",
    "parallel": "each on what enters the first; the mean of their outputs goes on",
    "looped": "parallel, several times over",
    "swap": "the first and the last change places",
}

Schedule = list[tuple[int, ...]]
"""What runs in the place of the model's stack, step by step: the layers that are all given the state so far; the mean
of their outputs is the next state. The dense model is [(0,), (1,), ...]."""


def middle(num_layers: int, keep_ends: int, most: int = 8) -> list[range]:
    """The ranges of middle layers that are changed, from the centre outwards.

    All are in the exact middle, so each has 2, 4, ... layers if ``num_layers`` is even and 3, 5, ... if it is odd; the
    last one leaves ``keep_ends`` layers at each end. If they are more than ``most``, only every second (third, ...) of
    them, the last one included.

    Raises:
        UserError: there are fewer than two layers in the middle.
    """
    ranges = [range(start, num_layers - start) for start in range(keep_ends, (num_layers + 1) // 2)]
    ranges = [layers for layers in reversed(ranges) if len(layers) > 1]
    if not ranges:
        raise UserError(f"--keep-ends={keep_ends} leaves fewer than 2 of {num_layers} layers in the middle")
    step = -(-len(ranges) // most)
    return ranges[::-1][::step][::-1]


def schedules(variant: str, layers: range, num_layers: int, *, loops: int, orders: int, seed: int) -> list[Schedule]:
    """The ways to run the stack with ``layers`` changed: one, or one for each random order."""
    changed: list[Schedule]
    if variant == "random":
        generator = random.Random(f"{seed} {len(layers)}")
        changed = [[(layer,) for layer in generator.sample(layers, len(layers))] for _ in range(orders)]
    else:
        ends = (layers[-1], *layers[1:-1], layers[0])
        ways: dict[str, Schedule] = {
            "skip": [],
            "repeat": [(num_layers // 2,)] * len(layers),
            "reverse": [(layer,) for layer in reversed(layers)],
            "parallel": [tuple(layers)],
            "looped": [tuple(layers)] * loops,
            "swap": [(layer,) for layer in ends],
        }
        changed = [ways[variant]]
    below: Schedule = [(layer,) for layer in range(layers.start)]
    above: Schedule = [(layer,) for layer in range(layers.stop, num_layers)]
    return [[*below, *steps, *above] for steps in changed]


@torch.no_grad()
def run_schedule(runner: BlockRunner, schedule: Schedule) -> Tensor:
    """The last state, [batch, length, d]; steps that are the dense model's at the bottom are not run again."""
    known = next((i for i, step in enumerate(schedule) if step != (i,)), len(schedule))
    hidden = runner.states[known]
    for step in schedule[known:]:
        outputs = [runner.run(Block(layer), hidden.to(runner.states[layer].device)) for layer in step]
        hidden = outputs[0]
        if len(outputs) > 1:
            total = torch.stack([output.to(hidden.device) for output in outputs]).float()
            hidden = total.mean(dim=0).to(hidden.dtype)
    return hidden


def measure(
    view: ModelView,
    input_ids: Tensor,
    *,
    keep_ends: int = 1,
    num_ranges: int = 8,
    loops: int = 3,
    orders: int = 3,
    seed: int = 1234,
) -> dict[str, Any]:
    """Loss of the text under every variant, for every range of middle layers.

    Args:
        view: the dense model; never changed.
        input_ids: [N, T] int64, T at least 2.
        keep_ends: layers at each end that are never changed.
        num_ranges: at most so many ranges, see `middle`.
        loops: of the variant ``looped``.
        orders: random orders of which ``random`` is the mean; drawn from ``seed``.

    Returns:
        As JSON: num_layers, keep_ends, loops, orders, seed; ``dense`` (loss, perplexity); ``ranges`` (first and last
        layer, both inclusive); ``variants``: name -> for each range loss and perplexity, of ``random`` also ``losses``
        of each order. Losses in nats per predicted token, those of ``random`` averaged; null for what is not finite.

    Raises:
        UserError: too few middle layers, or the dense model's own loss is not finite.
    """
    depth = view.num_layers
    ranges = middle(depth, keep_ends, num_ranges)
    options: dict[str, Any] = {"loops": loops, "orders": orders, "seed": seed}
    planned = {name: [schedules(name, layers, depth, **options) for layers in ranges] for name in VARIANTS}
    dense = 0.0
    sums = {name: [[0.0] * len(ways) for ways in of_range] for name, of_range in planned.items()}
    groups = batches(input_ids.to(view.device), _SAMPLE_TOKENS)
    total = len(groups) * sum(len(ways) for of_range in planned.values() for ways in of_range)
    with ProgressBar(total=total, desc="painters") as progress:
        for batch in groups:
            runner = BlockRunner(view, batch)
            dense += runner.loss(runner.states[-1], batch)
            for name, of_range in planned.items():
                for number, ways in enumerate(of_range):
                    for way, schedule in enumerate(ways):
                        sums[name][number][way] += runner.loss(run_schedule(runner, schedule), batch)
                        progress.update()
    num_predicted = input_ids.numel() - len(input_ids)
    if not math.isfinite(dense):
        raise UserError(
            "the dense model's loss is not finite: it overflows in its dtype; try model.dtype=bfloat16 or float32"
        )
    variants = {
        name: [_quality([value / num_predicted for value in ways], name == "random") for ways in of_range]
        for name, of_range in sums.items()
    }
    return {
        "num_layers": depth,
        "keep_ends": keep_ends,
        **options,
        "dense": _quality([dense / num_predicted]),
        "ranges": [[layers[0], layers[-1]] for layers in ranges],
        "variants": variants,
    }


def _quality(losses: Sequence[float], keep_all: bool = False) -> dict[str, Any]:
    mean = statistics.fmean(losses)
    found: dict[str, Any] = {"loss": _number(mean), "perplexity": _number(math.exp(mean) if mean < 700 else math.inf)}
    return found | {"losses": [_number(loss) for loss in losses]} if keep_all else found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report(found: Mapping[str, Any]) -> str:
    """The tables and what their columns mean, for the terminal. ``found`` is what `measure` returns."""
    names = list(found["variants"])
    rows = [
        [
            f"{first}-{last}",
            str(last - first + 1),
            *(_shown(found["variants"][name][i]["perplexity"]) for name in names),
        ]
        for i, (first, last) in enumerate(found["ranges"])
    ]
    width = max(map(len, names))
    numbers = {"random": f" {found['orders']}", "looped": f" {found['loops']}"}
    what = [f"  {name.ljust(width)}  {VARIANTS[name].replace(' several', numbers.get(name, ''))}\n" for name in names]
    return (
        "Perplexity with the layers of the middle run otherwise; the whole model's"
        f" {_shown(found['dense']['perplexity'])} ({_shown(found['dense']['loss'])} nats a token)\n{''.join(what)}\n"
        f"{Table(['layers', 'number', *names], rows).text()}"
    )


def _shown(value: float | None) -> str:
    """Four digits; a dash for what is not finite."""
    return "-" if value is None else f"{value:.4g}"
