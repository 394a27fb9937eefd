"""``slm-bench``: ours beside theirs, in one run. This is about searches, ``slm-bench recovery --help`` about training,
``slm-bench sweep --help`` about what the jobs of a study share, ``slm-bench efficiency --help`` about what pruning buys
in speed.

``slm-bench methods``: each method's search beside the loop that its authors published, on one model.

slm-bench methods                                              all methods at the default ratio, SmolLM2
slm-bench methods sleb come pruning_ratio=r35                  some of them, with overrides as for slm
slm-bench methods slm threshold=fixed threshold.value=0.81 pruning_ratio=none model=llama2_7b

Not there: mka, whose published code merges nothing, and the methods that look at no text. A row has seconds, block
evaluations (blocks run on all calibration tokens, the dense pass among them) and peak memory of both sides; where they
decide differently, that is an error, unless each searches a threshold of its own or a shortlist is set. The last line
compares the pass that feeds all one-pass methods with a plain forward pass over the same tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_pipeline.cli import VERSION, errors_in_one_line
from slm_pipeline.commands import bench_efficiency, bench_recovery, bench_sweep
from slm_pipeline.commands.arguments import answer_shell
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line
from slm_pipeline.machine import memory
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.target import Floor
from slm_pipeline.show.tables import Table

if TYPE_CHECKING:
    from slm_pipeline.jobs.job import Job
    from slm_pipeline.models.view import ModelView

METHODS = (
    *("slm", "laco", "come", "come_posterior", "sleb", "shortened_ppl", "finercut"),
    *("shortgpt", "angular", "streamline", "replaceme", "shortened_taylor"),
)
_DEFAULTS = ["recovery=none", "evaluation=none", "tracker=jsonl"]


@dataclass
class Measurement:
    """One side of a comparison.

    Attributes:
        block_evaluations: blocks run, in units of all calibration tokens.
        peak_memory_gb: of the GPU, else of the process.
    """

    result: Any
    seconds: float
    block_evaluations: float
    peak_memory_gb: float


def methods(words: list[str]) -> None:
    """Compare the methods named, or all, and print a row for each; ``words`` is the command line."""
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView

    names = [word for word in words if "=" not in word] or list(METHODS)
    overrides = [word for word in words if "=" in word]
    if unknown := sorted(set(names) - set(METHODS)):
        raise UserError(f"{unknown[0]!r} has no published loop to compare with; there are: {', '.join(METHODS)}")
    program = ["slm-bench", "methods"]
    jobs = {name: command_line.compose_job(program, [*overrides, f"method={name}"], _DEFAULTS) for name in names}
    source = next(iter(jobs.values())).source
    model, tokenizer = load_dense(source)
    view = ModelView(model)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e9
    print(f"{source.name}, {view.num_layers} layers, {source.config.dtype}, weights {weights:.2f} GB", flush=True)
    rows = []
    for name, job in jobs.items():
        problem = _problem(job, view, tokenizer)
        ours, theirs = _compare(job, problem)
        rows.append(_row(name, problem, ours, theirs))
        print(f"{name}: {theirs.seconds:.2f} s against {ours.seconds:.2f} s", flush=True)  # the table may take an hour
    print("\n" + Table(_COLUMNS, rows).markdown())
    _one_pass(problem)


_COLUMNS = ("method", "tokens", "seconds theirs", "ours", "ratio", "blocks theirs", "ours", "GB theirs", "ours", "same")


def _problem(job: Job, view: ModelView, tokenizer: Any) -> PruningProblem:
    input_ids = job.calibration.sample(tokenizer).input_ids
    no_statistics: Any = None  # made, and timed, with the methods that read them
    return job.pruning_problem(view, input_ids, no_statistics, {})


def _compare(job: Job, problem: PruningProblem) -> tuple[Measurement, Measurement]:
    from slm_pipeline.commands.published_loops import LOOPS, READ_STATISTICS, decision_of
    from slm_pipeline.engine.statistics import collect

    method = job.method

    def ours() -> Any:
        if isinstance(method, READ_STATISTICS):
            problem.statistics = collect(problem.view, problem.input_ids)
        return decision_of(method, method.plan(problem))

    found = _measure(problem, ours)
    published = _measure(problem, lambda: LOOPS[type(method)](problem, method))
    # Each side looks for a threshold in its own way; a shortlist may miss the best.
    may_differ = (Floor in method.targets and job.threshold.floor is None) or getattr(
        method, "shortlist", None
    ) is not None
    if found.result != published.result and not may_differ:
        raise UserError(f"method={method.name} decides {found.result}, the published loop {published.result}")
    return found, published


def _row(name: str, problem: PruningProblem, ours: Measurement, theirs: Measurement) -> list[str]:
    num_samples, length = problem.input_ids.shape
    return [
        name,
        f"{num_samples} x {length}",
        *(f"{side.seconds:.2f}" for side in (theirs, ours)),
        f"{theirs.seconds / ours.seconds:.2f}",
        *(f"{side.block_evaluations:.0f}" for side in (theirs, ours)),
        *(f"{side.peak_memory_gb:.2f}" for side in (theirs, ours)),
        _agreement(ours.result, theirs.result),
    ]


def _agreement(ours: list[Any], theirs: list[Any]) -> str:
    """yes, or how many of the removals are shared."""
    if ours == theirs:
        return "yes"
    return f"{len(set(ours) & set(theirs))} of {len(theirs)}"


def _one_pass(problem: PruningProblem) -> None:
    """All one-pass scores together, and a plain forward pass over the same tokens."""
    import torch

    from slm_pipeline.engine.blocks import batches
    from slm_pipeline.engine.statistics import MAX_BATCH_TOKENS, collect

    @torch.no_grad()
    def plain() -> None:
        for batch in batches(problem.input_ids.to(problem.view.device), MAX_BATCH_TOKENS):
            problem.view.model(input_ids=batch, use_cache=False)

    passes = [_measure(problem, plain).seconds for _ in range(3)]
    collected = [_measure(problem, lambda: collect(problem.view, problem.input_ids)).seconds for _ in range(3)]
    print(
        f"all one-pass scores together: {min(collected):.2f} s, a plain forward pass over the same tokens"
        f" {min(passes):.2f} s (best of 3 each): {min(collected) / min(passes):.2f} times"
    )


def _measure(problem: PruningProblem, run: Callable[[], Any]) -> Measurement:
    _warm_up(problem)
    memory.reset_peak()
    with _blocks_counted(problem) as count:
        started = time.perf_counter()
        result = run()
        _synchronize()
        seconds = time.perf_counter() - started
    return Measurement(result, seconds, count(), memory.peak_gb())


def _warm_up(problem: PruningProblem) -> None:
    """A pass over one sample and one over many: libraries load and choose their kernels on first use."""
    import torch

    from slm_pipeline.engine.blocks import batches

    with torch.no_grad():
        for ids in (problem.input_ids[:1], batches(problem.input_ids, 8192)[0]):
            problem.view.decoder(input_ids=ids.to(problem.view.device), use_cache=False)
    _synchronize()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _blocks_counted(problem: PruningProblem) -> Iterator[Callable[[], float]]:
    """Counts blocks run, of copies of the model too: a copy keeps the hooks."""
    tokens = [0]

    def count(module: Any, args: Any) -> None:
        tokens[0] += args[0].shape[0] * args[0].shape[1]

    hooks = [block.register_forward_pre_hook(count) for block in problem.view.layers]
    try:
        yield lambda: tokens[0] / problem.input_ids.numel()
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    """Console entry point."""
    arguments = sys.argv[1:]
    benchmarks = {
        "methods": (methods, __doc__),
        "recovery": (bench_recovery.recovery, bench_recovery.__doc__),
        "sweep": (bench_sweep.sweep, bench_sweep.__doc__),
        "efficiency": (bench_efficiency.benchmark, bench_efficiency.__doc__),
    }
    answer_shell(benchmarks, lambda name: [*(METHODS if name == "methods" else ()), "model=", "pruning_ratio="])
    run, about = benchmarks.get(arguments[0] if arguments else "methods", (None, None))
    if not arguments or {"-h", "--help"} & set(arguments):
        print(about or __doc__)
        sys.exit(0 if arguments else 2)
    if "--version" in arguments:
        print(VERSION)
        return
    if run is None:
        print(f"error: unknown benchmark {arguments[0]!r}; there are: {', '.join(benchmarks)}", file=sys.stderr)
        sys.exit(2)
    with errors_in_one_line():
        run(arguments[1:])


if __name__ == "__main__":
    main()
