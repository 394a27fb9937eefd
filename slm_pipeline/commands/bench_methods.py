"""``slm-bench methods``: each method's search beside the loop that its authors published, on one model.

slm-bench methods                                              all methods at the default ratio, SmolLM2
slm-bench methods sleb come pruning_ratio=r35                  some of them, with overrides as for slm
slm-bench methods slm threshold=fixed threshold.value=0.81 pruning_ratio=none model=llama2_7b
slm-bench search                                               those alone that try candidates

Not there: the methods that look at no text. A row has seconds, block evaluations (blocks run on all calibration tokens,
the dense pass among them) and peak memory of both sides; where they decide differently, that is an error, unless each
searches a threshold of its own, a shortlist is set, or rounding decides (mka). The last line compares the pass that
feeds all one-pass methods with a plain forward pass over the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_pipeline.commands.bench_results import Result, leave
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line
from slm_pipeline.machine import memory
from slm_pipeline.methods.base import Method, PruningProblem
from slm_pipeline.methods.target import Floor
from slm_pipeline.show.tables import Table

if TYPE_CHECKING:
    from slm_pipeline.jobs.job import Job

SEARCHES = ("slm", "laco", "come", "come_posterior", "sleb", "shortened_ppl", "finercut")
METHODS = (
    *SEARCHES,
    *("shortgpt", "angular", "streamline", "replaceme", "shortened_taylor", "mka"),
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


class SideBySide:
    """Searches on one model, which is loaded once."""

    def __init__(self, job: Job):
        from slm_pipeline.models.loading import load_dense
        from slm_pipeline.models.view import ModelView

        model, self.tokenizer = load_dense(job.source)
        self.view = ModelView(model)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e9
        about = f"{self.view.num_layers} layers, {job.source.config.dtype}, weights {weights:.2f} GB"
        print(f"{job.source.name}, {about}", flush=True)

    def problem(self, job: Job) -> PruningProblem:
        input_ids = job.calibration.sample(self.tokenizer).input_ids
        no_statistics: Any = None  # made, and timed, with the methods that read them
        return job.pruning_problem(self.view, input_ids, no_statistics, {})


def search(words: list[str]) -> None:
    """`methods` for those that try candidates."""
    named = [word for word in words if "=" not in word] or SEARCHES
    methods([*named, *(word for word in words if "=" in word)], "search")


def methods(words: list[str], group: str = "methods") -> None:
    """Compare the methods named, or all, and print a row for each; ``words`` is the command line."""
    names = [word for word in words if "=" not in word] or list(METHODS)
    overrides = [word for word in words if "=" in word]
    if unknown := sorted(set(names) - set(METHODS)):
        raise UserError(f"{unknown[0]!r} has no published loop to compare with; there are: {', '.join(METHODS)}")
    jobs = {name: job_of([*overrides, f"method={name}"], group) for name in names}
    bench = SideBySide(next(iter(jobs.values())))
    rows, results = [], []
    for name, job in jobs.items():
        problem = bench.problem(job)
        ours, theirs = _compare(job, problem)
        rows.append(_row(name, problem, ours, theirs))
        results.append(result(name, ours, theirs))
        print(f"{name}: {theirs.seconds:.2f} s against {ours.seconds:.2f} s", flush=True)  # the table may take an hour
    print("\n" + Table(_COLUMNS, rows).markdown())
    results.append(_one_pass(problem))
    leave(group, job, words, results)


def job_of(overrides: list[str], group: str = "methods") -> Job:
    return command_line.compose_job(["slm-bench", group], overrides, _DEFAULTS)


def result(what: str, ours: Measurement, theirs: Measurement, at_least: float | None = None) -> Result:
    """How many times as fast ours is."""
    sides = [f"{side.seconds:.2f} s, {side.peak_memory_gb:.1f} GB" for side in (theirs, ours)]
    how = f"{sides[0]} against {sides[1]}; same decisions: {_agreement(ours.result, theirs.result)}"
    return Result(what, theirs.seconds / ours.seconds, at_least=at_least, how=how)


_COLUMNS = ("method", "tokens", "seconds theirs", "ours", "ratio", "blocks theirs", "ours", "GB theirs", "ours", "same")


def _compare(job: Job, problem: PruningProblem) -> tuple[Measurement, Measurement]:
    method = job.method
    found, published = ours(method, problem), theirs(method, problem)
    # Each side looks for a threshold in its own way; a shortlist may miss the best; alike layers are told by rounding.
    may_differ = (
        (Floor in method.targets and job.threshold.floor is None)
        or getattr(method, "shortlist", None) is not None
        or method.name == "mka"
    )
    if found.result != published.result and not may_differ:
        raise UserError(f"method={method.name} decides {found.result}, the published loop {published.result}")
    return found, published


def ours(method: Method, problem: PruningProblem, repeats: int = 1) -> Measurement:
    """Our search, the median of ``repeats``; what torch compiles for it is compiled before."""
    from slm_pipeline.commands.published.loops import READ_STATISTICS, decision_of
    from slm_pipeline.engine.statistics import collect

    def search() -> Any:
        if isinstance(method, READ_STATISTICS):
            problem.statistics = collect(problem.view, problem.input_ids)
        return decision_of(method, method.plan(problem))

    if getattr(method, "compile", False):
        print(f"{method.name}: the first search, which compiles: {_measure(problem, search).seconds:.1f} s", flush=True)
    runs = sorted((_measure(problem, search) for _ in range(repeats)), key=lambda run: run.seconds)
    return runs[len(runs) // 2]


def theirs(method: Method, problem: PruningProblem) -> Measurement:
    """The published loop."""
    from slm_pipeline.commands.published.loops import LOOPS

    return _measure(problem, lambda: LOOPS[type(method)](problem, method))


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


def _one_pass(problem: PruningProblem) -> Result:
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
    how = f"{min(collected):.2f} s against {min(passes):.2f} s, best of 3 each"
    ratio = min(collected) / min(passes)
    print(f"all one-pass scores together, over a plain forward pass over the same tokens: {ratio:.2f} times, {how}")
    return Result("one-pass scores, of a forward pass", ratio, how=how)


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
