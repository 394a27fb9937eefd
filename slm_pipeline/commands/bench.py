"""``slm-bench search``: the cached window search beside the published loop, on one model in one run.

slm-bench search                                              SmolLM2, T = 0.9
slm-bench search model=llama2_7b threshold.value=0.81 method.merge_rule=base_difference
slm-bench search threshold=auto pruning_ratio=r20             against ten halvings, each a published loop
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_pipeline import cli
from slm_pipeline.errors import UserError
from slm_pipeline.job import Job
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.slm import SlidingLayerMerging, Window
from slm_pipeline.surgery.plan import format_groups, groups_of_windows

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView

_DEFAULTS = ["recovery=none", "evaluation=none", "tracker=jsonl"]
_FIXED = ["threshold=fixed", "threshold.value=0.9", "pruning_ratio=none"]


@dataclass
class Measurement:
    """One side of a comparison."""

    name: str
    windows: list[Window]
    block_evaluations: int
    seconds: float
    peak_memory_gb: float


class PublishedLoop:
    """SLM's search as its authors released it: a copy of the whole model and a whole forward pass per candidate.

    Faithful in its cost, not in its faults: similarities are per sample and in float32, `>=` decides, the window that
    is open at the end is merged and protected layers are respected, so that decisions can be compared.
    """

    def __init__(self, view: ModelView, input_ids: Tensor, method: SlidingLayerMerging):
        self.model = view.model
        self.input_ids = input_ids.to(view.device)
        self.method = method
        self.num_layers = view.num_layers
        self.block_evaluations = 0
        self.reference = self._states(self.model)
        self.block_evaluations = 0  # the reference pass is not counted, on either side

    def __call__(self, threshold: float, num_remove: int | None = None) -> list[Window]:
        current = self.model
        windows: list[Window] = []
        high = self.num_layers - 1 - self.method.protect_last
        low = high - 1
        limit = self.method.max_window or self.num_layers
        while low >= self.method.protect_first:
            passed = False
            if high - low + 1 <= limit:
                candidate = self._merged(current, low, high)
                passed = self._similarity(candidate) >= threshold
            if passed:
                low -= 1
                if _removed(windows) + high - (low + 1) == num_remove:
                    break
            elif low + 1 != high:
                current = self._merged(current, low + 1, high)
                windows.append((low + 1, high))
                high = low
            else:
                high -= 1
                low -= 1
        return [*windows, (low + 1, high)] if high > low + 1 else windows

    def auto(self, num_remove: int) -> list[Window]:
        """Ten halvings of [0, 1], the way a user of the published code finds a threshold for a wanted size."""
        low, high, best = 0.0, 1.0, None
        for _ in range(10):
            middle = (low + high) / 2
            windows = self(middle)
            removed = _removed(windows)
            low, high = (middle, high) if removed >= num_remove else (low, middle)
            best = windows if removed == num_remove else best
        if best is None:
            raise UserError(f"ten halvings met no threshold that removes {num_remove} layers")
        return best

    def _merged(self, model: Any, low: int, high: int) -> Any:
        """A copy of ``model`` with [low..high] merged; layers below the window still have their original indices."""
        from slm_pipeline.models.view import ModelView
        from slm_pipeline.surgery.block import Block
        from slm_pipeline.surgery.merge_rules import merge

        candidate = ModelView(copy.deepcopy(model))
        merged = merge(candidate, [Block(layer) for layer in range(low, high + 1)], self.method.merge_rule)
        block = candidate.layers[merged.body]
        for name, value in merged.replaced.items():
            block.get_parameter(name).data = value.clone()
        layers = list(candidate.layers)
        sources = [*range(low), merged.body, *range(high + 1, len(layers))]
        candidate.rebuild([*layers[:low], block, *layers[high + 1 :]], sources)
        return candidate.model

    def _states(self, model: Any) -> list[Tensor]:
        import torch

        from slm_pipeline.models.view import ModelView

        view = ModelView(model)
        self.block_evaluations += view.num_layers
        with torch.no_grad():
            return [
                view.decoder(input_ids=row[None], use_cache=False).last_hidden_state.cpu() for row in self.input_ids
            ]

    def _similarity(self, model: Any) -> float:
        import torch

        pairs = zip(self.reference, self._states(model), strict=True)
        values = [torch.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0) for a, b in pairs]
        return float(torch.stack(values).mean())


def _removed(windows: list[Window]) -> int:
    return sum(high - low for low, high in windows)


def search(overrides: list[str]) -> None:
    """Run both searches, check that they decide alike, print what each cost."""
    from slm_pipeline.data.calibration import sample
    from slm_pipeline.engine.statistics import collect
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView

    fixed = "threshold=auto" not in overrides
    job = cli.compose_job(["slm-bench", "search"], overrides, _DEFAULTS + (_FIXED if fixed else []))
    if not isinstance(job.method, SlidingLayerMerging) or job.method.similarity != "final_hidden":
        raise UserError("slm-bench search compares method=slm with method.similarity=final_hidden")
    model, tokenizer = load_dense(job.source)
    view = ModelView(model)
    input_ids = sample(job.config.calibration, tokenizer, job.data_dir).input_ids
    num_remove = None if job.threshold is not None else job.num_layers_to_remove(view.num_layers)
    problem = PruningProblem(
        source=job.source,
        view=view,
        input_ids=input_ids,
        statistics=collect(view, input_ids[:1]),  # SLM does not look at it
        num_remove=num_remove,
        threshold=job.threshold,
        refine=job.config.threshold.refine,
        exhaustive=job.config.threshold.exhaustive,
        calibration={},
    )
    ours = _measure("cached search", lambda: _cached(job.method, problem))
    method = job.method

    def published() -> tuple[list[Window], int]:
        loop = PublishedLoop(view, input_ids, method)
        windows = loop(job.threshold) if job.threshold is not None else loop.auto(num_remove or 0)
        return windows, loop.block_evaluations

    theirs = _measure("published loop", published)
    _print(job, view, ours, theirs)


def _cached(method: Any, problem: PruningProblem) -> tuple[list[Window], int]:
    plan = method.plan(problem)
    windows = [(op["layers"][0], op["layers"][-1]) for op in plan.ops]
    return windows, plan.scores["num_block_evaluations"]


def _measure(name: str, run: Callable[[], tuple[list[Window], int]]) -> Measurement:
    _reset_peak_memory()
    started = time.perf_counter()
    windows, block_evaluations = run()
    return Measurement(name, sorted(windows), block_evaluations, time.perf_counter() - started, _peak_memory_gb())


def _reset_peak_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: start a new measurement of the peak resident size


def _peak_memory_gb() -> float:
    import torch

    from slm_pipeline import provenance

    if not torch.cuda.is_available() and os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e9
    return provenance.peak_memory_gb()


def _print(job: Job, view: ModelView, ours: Measurement, theirs: Measurement) -> None:
    weights = sum(p.numel() * p.element_size() for p in view.model.parameters()) / 1e9
    calibration = job.config.calibration
    print(
        f"{job.source.name}, {calibration.num_samples} x {calibration.seq_len} tokens of {calibration.source},"
        f" {job.config.model.dtype}, weights {weights:.2f} GB, "
        + (f"threshold {job.threshold}" if job.threshold is not None else "threshold searched for")
    )
    print(f"{'':<16}{'block evaluations':>18}{'seconds':>10}{'peak memory':>13}   layers")
    for side in (theirs, ours):
        layers = format_groups(groups_of_windows(side.windows, view.num_layers))
        print(
            f"{side.name:<16}{side.block_evaluations:>18}{side.seconds:>10.2f}{side.peak_memory_gb:>10.2f} GB  {layers}"
        )
    print(
        f"{'ratio':<16}{theirs.block_evaluations / ours.block_evaluations:>17.2f}x"
        f"{theirs.seconds / ours.seconds:>9.2f}x"
        f"{theirs.peak_memory_gb / ours.peak_memory_gb:>9.2f}x"
    )
    if job.threshold is not None:
        if ours.windows != theirs.windows:
            raise UserError(f"the searches decide differently: {ours.windows} and {theirs.windows}")
        print("same decisions")
    else:
        removed = {_removed(side.windows) for side in (ours, theirs)}
        if len(removed) > 1:
            raise UserError(f"the searches remove different numbers of layers: {sorted(removed)}")
        print("each found its own threshold; both removed the same number of layers")


def main() -> None:
    """Console entry point."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    if arguments[0] != "search":
        print(f"error: unknown benchmark {arguments[0]!r}; there is: search", file=sys.stderr)
        sys.exit(2)
    with cli.errors_in_one_line():
        search(arguments[1:])


if __name__ == "__main__":
    main()
