"""Searches driven by a similarity floor, and how to find a floor that reaches a pruning ratio."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from slm_pipeline.config import plugins
from slm_pipeline.engine import compiled
from slm_pipeline.engine.similarities import SIMILARITIES
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import Method, PruningProblem
from slm_pipeline.methods.target import Floor, Layers
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.surgery.merge_rules import RULES
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes

Window = tuple[int, int]  # closed range (low, high) of original layers
Similarity = Callable[[tuple[Any, ...]], float]  # of the stack from some layer up


@dataclass
class Step:
    """One window evaluated."""

    low: int
    high: int
    similarity: float
    accepted: bool


@dataclass
class Search:
    """One pass at one threshold.

    Attributes:
        progress: told of every window looked at.
        windows: merged ones, in the order of merging; a later one may contain earlier ones.
        steps: windows evaluated, in order.
        num_removed: layers fewer than at the start.
    """

    threshold: float
    progress: ProgressBar | None = field(default=None, repr=False)
    windows: list[Window] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    num_removed: int = 0

    def look(self, window: Window, similarity: float) -> bool:
        """Note a window's similarity; whether it passes."""
        accepted = similarity >= self.threshold
        self.steps.append(Step(*window, similarity, accepted))
        if self.progress is not None:
            self.progress.update()
            self.progress.set_postfix_str(f"T={self.threshold:.2f} layers {window[0]}..{window[1]}: {similarity:.3f}")
        return accepted

    def commit(self, window: Window, num_removed: int | None = None) -> None:
        """Merge a window; it removes all its layers but one unless said otherwise."""
        self.windows.append(window)
        self.num_removed += window[1] - window[0] if num_removed is None else num_removed


class Pass(Protocol):
    """A method's pass down the stack.

    Attributes:
        num_layers: of the dense model.
        length: most windows that a pass looks at.
    """

    num_layers: int

    @property
    def length(self) -> int: ...

    def __call__(self, search: Search, num_remove: int | None) -> None:
        """Look at windows and commit them; with ``num_remove``, stop as soon as that many layers are gone."""


@dataclass(kw_only=True)
class ThresholdMerging(Method):
    """Base of the methods that merge windows while the model stays similar enough to the dense one.

    Scores in the plan:
        steps: {low, high, similarity, accepted} of the search that gave the plan, in the order evaluated.
        searches: {threshold, num_removed} of every threshold tried, in order.
        num_evaluations: different stacks looked at; num_evaluated: those among them that no earlier search with the
            same samples had left in the store; num_block_evaluations: blocks run for these, the dense pass not counted.
        exact: whether the threshold is known to be the highest on the grid that reaches the target.
    """

    merge_rule: str = "official"  # one of `slm_pipeline.surgery.merge_rules`
    # final_hidden | last_token | per_token | logits_kl: cosine of the flattened final-normed states, of the last
    # token's, the mean of each token's; or exp of minus the mean KL divergence from dense to pruned. Or a plugin's.
    similarity: str = "final_hidden"
    compile: bool = False  # blocks compiled by torch: faster on a GPU after some seconds; the last digits differ

    targets: ClassVar[tuple[type, ...]] = (Layers, Floor)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_rule not in RULES:
            raise UserError(f"method.merge_rule={self.merge_rule!r} is not one of {', '.join(RULES)}")
        if self.similarity not in SIMILARITIES:
            raise UserError(f"method.similarity={self.similarity!r} is not one of {', '.join(SIMILARITIES)}")

    def check(self, context: Context) -> None:
        super().check(context)
        compiled.check(self.compile, context)

    @property
    def mixes_layers(self) -> bool:
        return self.merge_rule not in ("official", "keep_lowest", "keep_highest")

    def code(self) -> dict[str, str]:
        return super().code() | plugins.code_of(SIMILARITIES[self.similarity].measure)

    def memory(self, sizes: Sizes) -> int:
        """All dense states, a candidate's, and the final ones once more; a batch in a block."""
        return sizes.states(sizes.tokens, sizes.layers + 4) + sizes.running(sizes.batch_tokens(8192))

    @abstractmethod
    def one_pass(self, similarity: Similarity, num_layers: int) -> Pass:
        """The method's pass over a stack of ``num_layers``."""

    def plan(self, problem: PruningProblem[Layers | Floor]) -> Plan:
        from slm_pipeline.engine.windows import StackSimilarity

        num_layers = problem.view.num_layers
        judged_by = "_".join([self.similarity, *plugins.code_of(SIMILARITIES[self.similarity].measure).values()])
        judged_by += "_compiled" if self.compile else ""
        with (
            compiled.blocks_compiled(problem.view, self.compile),
            problem.windows.open(self.merge_rule, judged_by) as memo,
        ):
            similarity = StackSimilarity(problem.view, problem.input_ids, self.merge_rule, self.similarity, memo)
            one_pass = self.one_pass(similarity, num_layers)
            if isinstance(problem.target, Floor):
                with ProgressBar(total=one_pass.length, desc=f"{self.name} search", unit="window") as progress:
                    chosen = Search(problem.target.similarity, progress)
                    one_pass(chosen, None)
                searches, exact = [chosen], True
            else:
                chosen, searches, exact = find_threshold(
                    one_pass, problem.target.remove, refine=problem.refine, exhaustive=problem.exhaustive
                )
        return self.new_plan(
            problem,
            threshold=chosen.threshold,
            ops=[Merge(tuple(range(low, high + 1)), self.merge_rule) for low, high in chosen.windows],
            scores={
                "steps": [vars(step) for step in chosen.steps],
                "searches": [{"threshold": s.threshold, "num_removed": s.num_removed} for s in searches],
                "num_evaluations": len(similarity.asked),
                "num_evaluated": similarity.num_evaluated,
                "num_block_evaluations": similarity.num_block_evaluations,
                "exact": exact,
            },
        )


def find_threshold(
    one_pass: Pass, num_remove: int, *, refine: int, exhaustive: bool
) -> tuple[Search, list[Search], bool]:
    """Look for a high threshold, in hundredths, at which the pass removes ``num_remove`` layers.

    Layers removed do not fall steadily as the threshold rises, so halving may miss a higher one: seven halvings of
    [0, 1], then ``refine`` grid points above the best found, from the top. All passes share one memo of windows.

    Returns:
        The search with the highest threshold that reached the target, every search done, and whether that threshold
        is surely the highest on the grid.

    Raises:
        UserError: no threshold tried reaches the target; names the nearest size that one did.
    """
    searches: dict[int, Search] = {}
    count = 100 if exhaustive else 7 + refine
    with ProgressBar(total=count * one_pass.length, desc="threshold search", unit="window") as progress:

        def reaches(hundredths: int) -> bool:
            if hundredths not in searches:
                searches[hundredths] = Search(hundredths / 100, progress)
                one_pass(searches[hundredths], num_remove)
                progress.n = min(len(searches), count) * one_pass.length
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
        size = one_pass.num_layers - nearest
        reachable = f" (pruning_ratio=layers pruning_ratio.num_layers={size})" if nearest else ""
        raise UserError(
            f"no threshold removes {num_remove} of {one_pass.num_layers} layers:"
            f" the nearest removes {nearest}{reachable};"
            " threshold.exhaustive=true tries every threshold, other options of the method reach other sizes"
        )
    reached = [search for search in done if search.num_removed == num_remove]
    return max(reached, key=lambda search: search.threshold), done, exhaustive
