"""SLM: slide a window from the top of the stack down and merge what the model does not miss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from tqdm import tqdm

from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, Method, PruningProblem
from slm_pipeline.surgery.merge_rules import RULES
from slm_pipeline.surgery.plan import Plan, groups_of_windows

SIMILARITIES = ("final_hidden", "last_token", "per_token", "logits_kl")
Window = tuple[int, int]  # closed range (low, high) of original layers
Similarity = Callable[[tuple[Window, ...], Window], float]  # (committed windows, open window) -> similarity


@dataclass(kw_only=True)
class SlidingLayerMerging(Method):
    """Sliding Layer Merging (SLM, later Sliding-Window Merging), arXiv 2502.19159, figure 2 and released code.

    The window starts at the two highest unprotected layers and grows downwards while the merged model's final states
    stay at least ``threshold`` similar to the dense model's. When they do not, the window that still passed is
    merged into one layer and the next window starts at the layer that failed. One pass, no backtracking; the
    threshold is a floor on the similarity of the whole model, so an early window eats the slack of later ones.

    Departures from the published code, none of which changes a decision unless said:
        - no model is ever copied, no window evaluated twice (`slm_pipeline.engine.windows`);
        - a window still open when the pass ends is merged; the published code loses it and may return the dense
          model for a small threshold (changes the outcome there);
        - `>=` as in the paper's figure, not `>`; cosine per sample and in float32, not float16 and over the batch;
        - the first layer is protected too (``protect_first=0`` for the published behaviour);
        - biases, q/k norms and the layer type follow their projections.

    Options:
        merge_rule: see `slm_pipeline.surgery.merge_rules`. `official` is what the authors released.
        similarity: final_hidden (published: cosine of the flattened final-normed states), last_token, per_token, or
            logits_kl (exp of minus the mean KL divergence from dense to pruned).
        protect_first, protect_last: layers at the input and output side that are never merged.
        max_window: most layers merged into one; 2 makes `official` and `base_difference` the same rule.

    Scores in the plan:
        steps: {low, high, similarity, accepted} of the search that gave the plan, in the order evaluated.
        searches: {threshold, num_removed} of every threshold tried, in order.
        num_evaluations, num_block_evaluations: windows and blocks run in all, the dense pass not counted.
        exact: whether the threshold is known to be the highest on the grid that reaches the target.
    """

    merge_rule: str = "official"
    similarity: str = "final_hidden"
    protect_first: int = 1
    protect_last: int = 1
    max_window: int | None = None
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 128))

    name: ClassVar[str] = "slm"
    takes_threshold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.merge_rule not in RULES:
            raise UserError(f"method.merge_rule={self.merge_rule!r} is not one of {', '.join(RULES)}")
        if self.similarity not in SIMILARITIES:
            raise UserError(f"method.similarity={self.similarity!r} is not one of {', '.join(SIMILARITIES)}")
        for option in ("protect_first", "protect_last"):
            if getattr(self, option) < 0:
                raise UserError(f"method.{option}={getattr(self, option)} must be at least 0")
        if self.max_window is not None and self.max_window < 2:
            raise UserError(f"method.max_window={self.max_window} must be at least 2, or null for no limit")

    @property
    def num_protected(self) -> int:
        return self.protect_first + self.protect_last

    def plan(self, problem: PruningProblem) -> Plan:
        from slm_pipeline.engine.windows import WindowSimilarity

        similarity = WindowSimilarity(problem.view, problem.input_ids, self.merge_rule, self.similarity)
        slide = _Slide(similarity, problem.view.num_layers, self.protect_first, self.protect_last, self.max_window)
        if problem.threshold is not None:
            with tqdm(total=slide.length, desc="sliding window", unit="window", disable=None) as progress:
                chosen = slide(problem.threshold, progress=progress)
            searches, exact = [chosen], True
        else:
            assert problem.num_remove is not None
            searches, exact = find_threshold(slide, problem.num_remove, problem.refine, problem.exhaustive)
            chosen = max(
                (search for search in searches if search.num_removed == problem.num_remove),
                key=lambda search: search.threshold,
            )
        windows = sorted(chosen.windows)
        return self._new_plan(
            problem,
            threshold=chosen.threshold,
            layer_groups=groups_of_windows(windows, problem.view.num_layers),
            ops=[
                {"op": "merge", "layers": list(range(low, high + 1)), "rule": self.merge_rule} for low, high in windows
            ],
            scores={
                "steps": [vars(step) for step in chosen.steps],
                "searches": [{"threshold": s.threshold, "num_removed": s.num_removed} for s in searches],
                "num_evaluations": len(similarity.known),
                "num_block_evaluations": similarity.num_block_evaluations,
                "exact": exact,
            },
        )


@dataclass
class Step:
    """One window evaluated."""

    low: int
    high: int
    similarity: float
    accepted: bool


@dataclass
class Search:
    """One pass of the window down the stack."""

    threshold: float
    windows: list[Window]
    steps: list[Step]

    @property
    def num_removed(self) -> int:
        return sum(high - low for low, high in self.windows)


@dataclass
class _Slide:
    """The sliding pass over a given stack."""

    similarity: Similarity
    num_layers: int
    protect_first: int
    protect_last: int
    max_window: int | None

    @property
    def length(self) -> int:
        """Most windows that a pass looks at: each look moves the lower end down by one layer."""
        return max(0, self.num_layers - 1 - self.protect_last - self.protect_first)

    def __call__(self, threshold: float, num_remove: int | None = None, progress: tqdm | None = None) -> Search:
        """Slide once; with ``num_remove``, stop as soon as that many layers are gone."""
        search = Search(threshold, [], [])
        high = self.num_layers - 1 - self.protect_last
        low = high - 1
        while low >= self.protect_first:
            # [low + 1 .. high] is the window that passed so far; a single layer when nothing has.
            if self.max_window is None or high - low < self.max_window:
                step = self._look(search, low, high)
                if progress is not None:
                    progress.update()
                    progress.set_postfix_str(f"T={threshold:.2f} layers {low}..{high}: {step.similarity:.3f}")
                passed = step.accepted
            else:
                passed = False
            if passed:
                low -= 1
                if search.num_removed + high - (low + 1) == num_remove:
                    break
            else:
                if low + 1 < high:
                    search.windows.append((low + 1, high))
                high = low if low + 1 < high else high - 1
                low = high - 1
        if low + 1 < high:
            search.windows.append((low + 1, high))
        return search

    def _look(self, search: Search, low: int, high: int) -> Step:
        similarity = self.similarity(tuple(search.windows), (low, high))
        step = Step(low, high, similarity, similarity >= search.threshold)
        search.steps.append(step)
        return step


def find_threshold(slide: _Slide, num_remove: int, refine: int, exhaustive: bool) -> tuple[list[Search], bool]:
    """Look for a high threshold, in hundredths, at which the pass removes ``num_remove`` layers.

    Layers removed do not fall steadily as the threshold rises, so halving may miss a higher one: seven halvings of
    [0, 1], then ``refine`` grid points above the best found, from the top. All passes share one memo of windows.

    Returns:
        Every search done, and whether the highest that reached the target is surely the highest there is.

    Raises:
        UserError: no threshold tried reaches the target; names the nearest size that one did.
    """
    searches: dict[int, Search] = {}
    count = 100 if exhaustive else 7 + refine
    with tqdm(total=count * slide.length, desc="threshold search", unit="window", disable=None) as progress:

        def reaches(hundredths: int) -> bool:
            if hundredths not in searches:
                searches[hundredths] = slide(hundredths / 100, num_remove, progress)
            progress.n = min(len(searches), count) * slide.length
            progress.refresh()
            return searches[hundredths].num_removed == num_remove

        if exhaustive:
            next((t for t in range(99, -1, -1) if reaches(t)), None)
        else:
            best, failed = 0, 100
            for _ in range(7):
                middle = (best + failed) // 2
                best, failed = (middle, failed) if reaches(middle) else (best, middle)
            if reaches(best):
                next((t for t in range(min(99, best + refine), best, -1) if reaches(t)), None)
    done = list(searches.values())
    if all(search.num_removed != num_remove for search in done):
        nearest = max(search.num_removed for search in done)
        raise UserError(
            f"no threshold removes {num_remove} of {slide.num_layers} layers: the nearest removes {nearest}"
            f" (pruning_ratio=layers pruning_ratio.num_layers={slide.num_layers - nearest});"
            " threshold.exhaustive=true tries every threshold, another merge_rule or max_window reaches other sizes"
        )
    return done, exhaustive
