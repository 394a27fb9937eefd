"""``slm-bench performance``: the table of docs/performance.md, with what is asked beside what was got.

slm-bench performance                                   all pieces, one after the other
slm-bench performance slm sleb output_dir=o             some of them, on a GPU that nothing else uses
slm-bench performance table output_dir=o                what all pieces in o found, as Markdown
slm-bench performance decode model.num_layers=4 ...     another shape; words with a = are overrides as for slm

| piece | |
|---|---|
| slm | one threshold and the automatic one beside the published pass, with and without `method.compile` |
| sleb | beside the published loop, likewise |
| end_to_end | load, calibrate, SLM, save and verify in one command, from weights on disk; needs 40 GB there |
| decode | `slm-bench efficiency` |
| joint, joint_custom | depth and width together, with one width and with widths by layer, and the refit |
| stream | 70B, blocks on disk: ShortGPT, SLM, refit; needs 16 GB of disk and of page cache |
| memory | what each stage takes beside what was estimated before, at this shape and at that of TinyLlama-1.1B |
| two_gpus | calibration, refit and SLEB by ``slm`` alone and under ``torchrun``, without the making of weights |
| two_gpus_lora | LoRA on two GPUs beside one |

Weights are random, of the shape of Llama-2-7B in bfloat16 (stream: 70B), and so is the text; nothing is downloaded.
Each piece leaves its numbers when it is done, and several may share an output folder. The published passes run as they
are: nothing is extrapolated.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from slm_pipeline.commands import bench_efficiency, bench_methods, bench_recovery, bench_results, bench_shards
from slm_pipeline.commands.bench_results import QUIET, SHAPE, Result
from slm_pipeline.commands.bench_stages import around, of_stages, run_slm, scratch
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line, needs
from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.steps import steps
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.store.files import write_text

_GROUP = "performance"
_FEW, _MANY = 8, 264  # calibration samples: the seconds of the latter less those of the former are work
_ONE_WALK = ["repair.ridges=[0.1]", "repair.weighting=none", "repair.shares=[]", "repair.reads=[]"]
_PLAN_ONLY = ["recovery=none", "keep=plan", *QUIET]


def performance(words: list[str]) -> None:
    """Run pieces, print a table of each and leave it; ``words`` is the command line."""
    named = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if unknown := sorted(set(named) - {*PIECES, "table"}):
        raise UserError(f"{unknown[0]!r} is no piece of this table; there are: {', '.join(PIECES)}, table")
    job = _job([*SHAPE, *_text(overrides), *overrides])
    folder = Path(job.config.output_dir).expanduser() / "bench" / _GROUP
    for name in [name for name in named if name != "table"] or ([] if named else [*PIECES]):
        started = time.monotonic()
        results: list[Result] = []
        try:
            for result in PIECES[name]([*_text(overrides), *overrides]):
                results.append(result)
                print(", ".join(filter(None, result.cells())), flush=True)
                # a piece takes minutes: however it ends, what it had found is there
                bench_results.write(_GROUP, job, [name, *overrides], results, folder / name)
            results.append(Result(f"{name}: the whole piece", time.monotonic() - started, "s"))
            bench_results.write(_GROUP, job, [name, *overrides], results, folder / name)
        finally:
            if results:
                bench_results.draw(_GROUP, results, folder / name)
    print(table(folder))


def table(folder: Path) -> str:
    """All pieces below a folder as Markdown, each with its date, command, device and versions.

    Raises:
        UserError: there is none.
    """
    found = [file for name in PIECES if (file := folder / name / f"bench_{_GROUP}.json").is_file()]
    if not found:
        raise UserError(f"{folder} has no piece of the table; slm-bench performance makes them")
    results, conditions = [], []
    for file in found:
        about, numbers = bench_results.read(file)
        results += numbers
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        conditions.append(f"- `{about['command']}`: {about['date']}, {about['device']}; {versions}\n")
    return f"{bench_results.table(results)}\n{''.join(conditions)}"


def _job(words: Sequence[str]) -> Job:
    return around(words, _GROUP)


def _text(overrides: Sequence[str]) -> list[str]:
    """Random words to calibrate and to train on, in the output folder; unless another text is said."""
    if any(word.startswith("calibration=") for word in overrides):
        return []
    folder = Path(_job([*SHAPE, *overrides]).config.output_dir).expanduser().absolute() / "bench"
    draw = random.Random(1234)
    letters = "etaoinshrdlu"
    vocabulary = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(2000)]
    text, rows = folder / "random_words.txt", folder / "random_words.json"
    if not rows.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(text, "\n\n".join(" ".join(draw.choices(vocabulary, k=400)) for _ in range(260)))
        examples = [
            {
                "instruction": " ".join(draw.choices(vocabulary, k=15)),
                "output": " ".join(draw.choices(vocabulary, k=60)),
            }
            for _ in range(3000)
        ]
        write_text(rows, json.dumps(examples))  # after the text: several processes may look
    return ["calibration=text_file", f"calibration.path={text}"]


def slm(words: list[str]) -> Iterator[Result]:
    """Ours at one threshold, and the automatic one against ten halvings."""
    fixed = ["method=slm", "threshold=fixed", "threshold.value=0.81", "pruning_ratio=none"]
    automatic = ["method=slm", "pruning_ratio=r20"]
    yield from _beside(words, fixed, "SLM, one threshold, against the published pass", 20.0, repeats=5)
    yield from _beside(words, automatic, "SLM, automatic threshold, against ten halvings of it", 30.0, repeats=3)


def sleb(words: list[str]) -> Iterator[Result]:
    size = [] if any(word.startswith("calibration.seq_len") for word in words) else ["calibration.num_samples=10"]
    asked = ["method=sleb", "method.strict=true", "pruning_ratio=r25", *size]
    shortlist = ("the best 8 after the first sample measured on all", "method.shortlist=8")
    yield from _beside(words, asked, "SLEB, a quarter of the layers", 2.2, variants=(shortlist, _COMPILED))


_COMPILED = ("compiled", "method.compile=true")


def _beside(
    words: Sequence[str],
    asked: Sequence[str],
    what: str,
    at_least: float,
    repeats: int = 1,
    variants: Sequence[tuple[str, str]] = (_COMPILED,),
) -> Iterator[Result]:
    """Ours, and variants of it, (name, override), beside the published loop, on one model."""
    words = [*SHAPE, *words]
    job = bench_methods.job_of([*asked, *words])
    bench = bench_methods.SideBySide(job)
    problem = bench.problem(job)
    theirs = bench_methods.theirs(job.method, problem)
    yield bench_methods.result(what, bench_methods.ours(job.method, problem, repeats), theirs, at_least)
    for name, override in variants:
        variant = bench_methods.job_of([*asked, *words, override])
        try:
            ours = bench_methods.ours(variant.method, problem, repeats)
        except (UserError, RuntimeError) as error:  # torch finds no C compiler, for one
            yield Result(f"{what}, {name}", None, at_least=at_least, how=_why(error))
        else:
            asked_of = at_least if ours.result == theirs.result else None  # other decisions meet nothing
            yield bench_methods.result(f"{what}, {name}", ours, theirs, asked_of)


def _why(error: Exception) -> str:
    """The end of its message, on one line that a table can hold."""
    return " ".join(str(error).replace("|", "/").split())[-200:] or type(error).__name__


def end_to_end(words: list[str]) -> Iterator[Result]:
    """One command, from weights on disk to a verified checkpoint on disk."""
    from slm_pipeline.models.loading import load_dense

    with scratch([*SHAPE, *words], _GROUP) as folder:
        model, tokenizer = load_dense(_job([*SHAPE, *words]).source)
        gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
        model.save_pretrained(folder / "dense")
        tokenizer.save_pretrained(folder / "dense")
        del model
        _free()
        text = [word for word in words if word.startswith("calibration")]
        local = ["model=local", f"model.path={folder / 'dense'}", "model.dtype=bfloat16", *text]
        costs = run_slm(
            [*local, "method=slm", "pruning_ratio=r20", "stages=[calibrate,merge]", "recovery=none", *QUIET],
            folder / "o",
        )
    seconds, peak = costs["command"].seconds, costs["command"].peak_gb
    how = f"calibrate {costs['calibrate'].seconds:.1f} s, merge and save {costs['merge'].seconds:.1f} s"
    how += ", the rest is Python's start"
    yield Result("load, calibrate, SLM, save and verify", seconds, "s", at_most=60, how=how)
    yield Result("its peak, of the weights", peak / gigabytes, at_most=1.25, how=f"{peak:.2f} of {gigabytes:.2f} GB")


def decode(words: list[str]) -> Iterator[Result]:
    yield from bench_efficiency.measure_speed([word for word in words if not word.startswith("calibration")])


def joint(words: list[str], export: str = "stock") -> Iterator[Result]:
    """The search and its refit."""
    name, stages = f"joint, {export}, r20", ["calibrate", "merge", "repair"]
    with scratch([*SHAPE, *words], _GROUP) as folder:
        asked = ["method=joint", f"method.export={export}", "pruning_ratio=r20", "repair=refit", *_PLAN_ONLY]
        costs = run_slm([*asked, *SHAPE, *words], folder)
    yield from of_stages(name, costs, stages)
    yield Result(f"{name}: all of it", sum(costs[stage].seconds for stage in stages), "s", at_most=900)
    sizes = needs.sizes_of(_job([*SHAPE, *words]))
    assert sizes is not None  # random weights have a shape
    peak, weights = costs["command"].peak_gb, sizes.weights / 1e9
    how = f"{peak:.2f} of {weights:.2f} GB"
    yield Result(f"{name}: its peak, of the weights", peak / weights, at_most=1.6, how=how)


def stream(words: list[str]) -> Iterator[Result]:
    """ShortGPT, SLM and a refit of a model whose blocks stay on disk, beside reading its weights."""
    model = _job([*SHAPE, *words]).config.model
    shape = bench_shards.Shape()
    if any(word.startswith("model.num_layers=") for word in words):
        shape = bench_shards.Shape.of(model)
    with scratch([*SHAPE, *words], _GROUP) as folder:
        bench_shards.write(folder / "dense", shape)
        text = [word for word in words if word.startswith("calibration")]
        local = ["model=local", f"model.path={folder / 'dense'}", "model.dtype=bfloat16", "model.device=stream", *text]
        reading = bench_shards.seconds_of_a_pass(_job(local).source)
        yield Result("stream: all blocks brought once, nothing run", reading, "s")
        upper = min(30, shape.layers // 2)  # a search through all of 80 layers reads the weights some 40 times
        jobs = {
            "ShortGPT": ["method=shortgpt", "pruning_ratio=r20"],
            f"SLM in the upper {upper} layers": ["method=slm", "threshold=fixed", "threshold.value=0.9",
                    "pruning_ratio=none", f"method.protect_first={shape.layers - upper}"],
            "refit": ["method=shortgpt", "pruning_ratio=r20", "repair=refit", "repair.calibration.num_samples=16",
                    *_ONE_WALK],  # each reads the weights once
        }  # fmt: skip
        for name, asked in jobs.items():
            what = f"stream: {name}, time over that of reading as often"
            try:
                costs = run_slm([*asked, "stages=[calibrate,merge,repair]", *_PLAN_ONLY, *local], folder / name[:3])
            except UserError as error:
                yield Result(what, None, at_most=1.5, how=_why(error))
                continue
            seconds = sum(cost.seconds for stage, cost in costs.items() if stage != "command")
            passes = _blocks_read((folder / name[:3] / "said.txt").read_text(encoding="utf-8")) / shape.layers
            stages = ", ".join(f"{stage} {cost.seconds:.1f} s" for stage, cost in costs.items())
            how = f"{stages}; weights read {passes:.1f} times; peak {costs['command'].peak_gb:.1f} GB"
            yield Result(what, seconds / (passes * reading), at_most=1.5, how=how)


def _blocks_read(said: str) -> int:
    """By all models of a command; each counts on."""
    counts = [int(count) for count in re.findall(r": (\d+) blocks read", said)]
    return sum(count for count, following in zip(counts, [*counts[1:], 0], strict=True) if following <= count)


_SMALLER = (  # TinyLlama-1.1B's
    *("model.num_layers=22", "model.hidden_size=2048", "model.intermediate_size=5632"),
    *("model.num_heads=32", "model.num_kv_heads=4"),
)


def memory(words: list[str]) -> Iterator[Result]:
    """What `needs` says of each stage over the peak that it notes, at two sizes, or at another shape alone."""
    jobs = {
        "ShortGPT": ["method=shortgpt", "repair=refit", *_ONE_WALK, *_training(words)],
        "SLEB": ["method=sleb", "calibration.num_samples=10"],
        "joint": ["method=joint", "method.swaps=0", "method.depths=2"],
    }
    sizes = {"7B": [], "1.1B": _SMALLER}
    if any(word.startswith("model.num_layers=") for word in words):
        sizes = {"this shape": []}
    for size, shape in sizes.items():
        for name, asked in jobs.items():
            recovery = [] if name == "ShortGPT" else ["recovery=none"]
            asked = [*SHAPE, *words, *shape, *asked, *recovery, "pruning_ratio=r10", *QUIET]
            with scratch(asked, _GROUP) as folder:
                try:
                    costs = run_slm([*asked, "keep=plan"], folder)
                except UserError as error:
                    yield Result(f"memory, {size}, {name}", None, at_least=0.85, at_most=1.15, how=_why(error))
                    continue
            job = command_line.compose_job(["slm"], asked, [])
            for stage in (step.stage for step in steps(job) if step.stage.stage in costs):
                taken, estimate = costs[stage.stage].peak_gb, (needs.need(stage, job).num_bytes or 0) / 1e9
                how = f"estimated {estimate:.2f} GB, taken {taken:.2f}"
                what = f"memory, {size}, {name}: {stage.stage}, estimate over peak"
                yield Result(what, estimate / taken, at_least=0.85, at_most=1.15, how=how)


def two_gpus(words: list[str]) -> Iterator[Result]:
    """The work on one GPU over that of two processes on two: what both spend alike, on making random weights, is left
    out."""
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = [
        "method=sleb",
        "pruning_ratio=r10",
        "repair=refit",
        *_ONE_WALK,
        *_PLAN_ONLY,
        *SHAPE,
        "calibration.seq_len=2048",
        *words,
    ]
    jobs = {
        "SLEB and refit": ["stages=[calibrate,merge,repair]", "calibration.num_samples=16"],
        f"calibration, {_MANY} samples": ["stages=[calibrate]", f"calibration.num_samples={_MANY}"],
        f"calibration, {_FEW} samples": ["stages=[calibrate]", f"calibration.num_samples={_FEW}"],
    }
    work: dict[str, list[float]] = {}  # of each, on one GPU and on two
    calibrations = []
    for name, asked in jobs.items():
        with scratch(words, _GROUP) as folder:
            try:
                costs = [run_slm([*words, *asked], folder / "one"), run_slm([*words, *asked], folder / "two", two)]
            except UserError as error:
                yield Result(f"two GPUs, {name}", None, at_least=1.8, how=_why(error))
                continue
        if name == "SLEB and refit":
            found = {
                "SLEB, a tenth of the layers": [cost["merge"].work or 0.0 for cost in costs],
                "refit": [cost["repair"].work or 0.0 for cost in costs],
            }
        else:
            calibrations.append([cost["calibrate"].seconds for cost in costs])
            if len(calibrations) < 2:
                continue
            difference = [more - less for more, less in zip(*calibrations, strict=True)]
            found = {f"calibration, {_MANY - _FEW} samples": difference}
        yield from (_scaling(name, *seconds) for name, seconds in found.items())
        work |= found
    if len(work) == 3:
        yield _scaling("all three", *map(sum, zip(*work.values(), strict=True)))


def _scaling(name: str, alone: float, together: float) -> Result:
    ratio = alone / together if min(alone, together) > 0 else None  # a difference may drown in noise
    return Result(f"two GPUs, {name}", ratio, at_least=1.8, how=f"{alone:.1f} and {together:.1f} s")


def two_gpus_lora(words: list[str]) -> Iterator[Result]:
    two = ["recovery.max_steps=20", "recovery.num_processes=2"]
    others = [word for word in words if not word.startswith("calibration")]
    job = bench_recovery.job_of([*SHAPE, *_training(words), *two, *others])
    assert isinstance(job.recovery, Lora)
    yield bench_recovery.scaling(job, job.recovery)


def _training(words: Sequence[str]) -> list[str]:
    """LoRA on the random rows that lie beside the random words, a few steps of it."""
    text = next(word for word in words if word.startswith("calibration.path=")).partition("=")[2]
    rows = ["recovery=lora", "recovery.source=file", f"recovery.path={Path(text).with_suffix('.json')}"]
    return [*rows, "recovery.num_examples=2560", "recovery.validation_size=8", "recovery.max_steps=2"]


def _free() -> None:
    from slm_pipeline.machine import memory

    memory.free()


PIECES: dict[str, Callable[[list[str]], Iterable[Result]]] = {
    "slm": slm,
    "sleb": sleb,
    "end_to_end": end_to_end,
    "decode": decode,
    "joint": joint,
    "joint_custom": partial(joint, export="custom"),
    "stream": stream,
    "memory": memory,
    "two_gpus": two_gpus,
    "two_gpus_lora": two_gpus_lora,
}
