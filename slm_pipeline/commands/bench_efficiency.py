"""``slm-bench efficiency``: what pruning buys in speed, beside what it could at most.

slm-bench efficiency                                  the shape of Llama-2-7B, random bfloat16 weights, CUDA graphs
slm-bench efficiency model=llama2_7b                  other weights, or another shape
slm-bench efficiency evaluation.efficiency.mode=eager evaluation.efficiency.grid=[1x32+64]

Depth: the last layers but one go, 20 and 35 % of them; the ideal is the dense model's layers over those that are left,
which no model reaches even in theory, for the head stays. Width: every feed-forward network keeps a multiple of 64
neurons, so many that as many parameters go as with 20 % of the layers; the ideal is the ratio of the bytes that a token
reads, all weights but the table of embeddings. In each row the dense model and the pruned one take turns in this
process; times are those of a token after the first, with one standard error. With CUDA graphs the narrower model, and
the dense one beside it, are compiled as well: what lies between the matrix products does not get narrower with them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_pipeline.commands.bench_results import SHAPE, Result, leave
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.alternated import Spread
from slm_pipeline.evaluation.efficiency import Efficiency, check_machine, efficiency
from slm_pipeline.jobs import command_line
from slm_pipeline.machine import memory
from slm_pipeline.show.tables import Table
from slm_pipeline.surgery.ops.base import Op
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.models.view import ModelView

_DEFAULTS = [
    *SHAPE,
    *("method=none", "pruning_ratio=none", "recovery=none", "evaluation=efficiency", "tracker=jsonl"),
    *("evaluation.efficiency.mode=graph", "evaluation.efficiency.grid=[1x32+128,64x32+128]"),
    *("evaluation.efficiency.num_runs=7", "evaluation.efficiency.num_warmup=2"),
]
_RATIOS = (0.2, 0.35)
_MULTIPLE = 64
_COLUMNS = ("pruned", "setting", "dense ms", "pruned ms", "speed-up", "ideal", "of the ideal", "time / bytes saved")


@dataclass(frozen=True)
class Variant:
    """What is timed beside the dense model.

    Attributes:
        ideal: the speed-up that it could have.
        bytes_kept: share of the bytes that a token reads.
        is_width: whether layers are narrower, not fewer.
    """

    name: str
    plan: Plan
    ideal: float
    bytes_kept: float
    is_width: bool = False


def benchmark(words: list[str]) -> None:
    """Measure, print and leave; ``words`` is the command line: overrides as for slm."""
    results = [*measure_speed(words)]
    leave("efficiency", command_line.compose_job(["slm-bench", "efficiency"], words, _DEFAULTS), words, results)


def measure_speed(words: list[str]) -> Iterator[Result]:
    """Measure and print; how much of each ideal is reached, each as soon as it is known."""
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.apply import apply_beside

    started = time.monotonic()
    job = command_line.compose_job(["slm-bench", "efficiency"], words, _DEFAULTS)
    measure = job.evaluation.measures["efficiency"]
    assert isinstance(measure, Efficiency)
    settings = {text: measure.setting(text) for text in measure.grid or [""]}
    if any(setting.new < 2 for setting in settings.values()):
        raise UserError("evaluation.efficiency.grid: slm-bench efficiency times tokens, so at least 2 new ones")
    for text in settings:
        measure.preflight(text, job.dense_tokenizer, job)
    dense, tokenizer = load_dense(job.source)
    view = ModelView(dense)
    print(
        f"{job.source.name}, {view.num_layers} layers, {job.config.model.dtype}, weights"
        f" {_bytes_read(view) / 1e9:.2f} GB without the table of embeddings, mode {measure.mode}",
        flush=True,
    )
    rows = []
    for variant in _variants(view):
        model = apply_beside(variant.plan, view)
        for mode, (text, setting) in itertools.product(_modes(variant, measure.mode), settings.items()):
            name = variant.name if mode == measure.mode else f"{variant.name}, {mode}d"
            try:
                check_machine("evaluation.efficiency.mode", mode, job.config.model.device)
                found = efficiency(
                    model,
                    tokenizer,
                    setting,
                    mode=mode,
                    num_runs=measure.num_runs,
                    num_warmup=measure.num_warmup,
                    prompt=measure.prompt,
                    dense=lambda: dense,
                )
            except (UserError, RuntimeError) as error:
                if mode == measure.mode:
                    raise
                yield Result(f"decoding {text}, {name}", None, how=str(error).strip().splitlines()[0])
                continue
            rows.append(_row(variant, name, text, found))
            print(f"{name}, {text}: {found['token_speedup']:.3f} times as fast", flush=True)
            yield _result(variant, name, text, found)
        del model
        memory.free()
    print("\n" + Table(_COLUMNS, rows).markdown())
    print(f"{found['device']}; {time.monotonic() - started:.0f} s in all")


def _modes(variant: Variant, asked: str) -> list[str]:
    return [asked, "compile"] if variant.is_width and asked == "graph" else [asked]


def _result(variant: Variant, name: str, text: str, found: dict[str, Any]) -> Result:
    """Depth: of the ideal. Width: of the bytes saved, asked for where a token waits for the weights alone."""
    speedup = found["token_speedup"]
    how = f"{speedup:.3f} times as fast, ideal {variant.ideal:.3f}"
    if not variant.is_width:
        return Result(f"decoding {text}, {name}, of the ideal", speedup / variant.ideal, at_least=0.98, how=how)
    saved = (1 - 1 / speedup) / (1 - variant.bytes_kept)
    asked = 0.9 if text.startswith("1x") else None
    return Result(f"decoding {text}, {name}, time over bytes saved", saved, at_least=asked, how=how)


def _row(variant: Variant, name: str, text: str, found: dict[str, Any]) -> list[str]:
    speedup = Spread(**found["spread"]["token_speedup"])
    error = "" if speedup.error is None else f" +-{speedup.error:.3f}"
    times = [1000 * Spread.of(found["runs"][of]["token_seconds"]).median for of in ("dense", "own")]
    return [
        name,
        text,
        *(f"{milliseconds:.3f}" for milliseconds in times),
        f"{speedup.median:.3f}{error}",
        f"{variant.ideal:.3f}",
        f"{speedup.median / variant.ideal:.3f}",
        f"{(1 - 1 / speedup.median) / (1 - variant.bytes_kept):.3f}",
    ]


def _variants(view: ModelView) -> Iterator[Variant]:
    import numpy as np

    from slm_pipeline.surgery.apply import layer_sizes

    number, sizes, read = view.num_layers, layer_sizes(view), _bytes_read(view)
    per_parameter = next(view.layers[0].parameters()).element_size()
    for ratio in _RATIOS:
        remove = max(1, round(ratio * number))
        gone = tuple(range(number - 1 - remove, number - 1))
        kept = 1 - sum(sizes[layer].whole for layer in gone) * per_parameter / read
        yield Variant(
            f"r{round(100 * ratio)}, {remove} layers", _plan(view, [Drop(gone)]), number / (number - remove), kept
        )
    remove = max(1, round(_RATIOS[0] * number)) * sum(size.whole for size in sizes) // number
    neurons = view.num_neurons - remove // sum(size.per_neuron for size in sizes)
    neurons = max(1, round(neurons / _MULTIPLE)) * _MULTIPLE if view.num_neurons > _MULTIPLE else max(1, neurons)
    ops = [Resize((layer,), f"resize.{layer}", neurons=neurons) for layer in range(number)]
    tensors = {f"resize.{layer}.neurons": np.arange(neurons) for layer in range(number)}
    lost = sum((view.num_neurons - neurons) * size.per_neuron for size in sizes) * per_parameter
    yield Variant(f"width, {neurons} neurons", _plan(view, ops, tensors), read / (read - lost), 1 - lost / read, True)


def _plan(view: ModelView, ops: Sequence[Op], tensors: dict[str, Any] | None = None) -> Plan:
    model = {"name": "dense", "fingerprint": "", "num_layers": view.num_layers}
    return Plan(model, "bench", {}, None, [*ops], tensors=tensors or {})


def _bytes_read(view: ModelView) -> int:
    """That a token reads: of all weights, but of the embeddings, unless they are the head too, only its row."""
    outside = 0 if view.ties_embeddings else view.model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in view.model.parameters()) - int(outside)
