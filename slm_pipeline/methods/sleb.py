"""SLEB: remove one layer after the other, each time the one that the language-model loss misses least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.config.ranges import Count, NumLayersOrZero
from slm_pipeline.engine import compiled
from slm_pipeline.methods.base import CalibrationSize, LayerRemoval, PruningProblem
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes


@dataclass(kw_only=True)
class Sleb(LayerRemoval):
    """SLEB, arXiv 2402.09025, algorithm 1: greedy, every remaining layer is tried in every round.

    Decisions are those of the published loop, found without running the whole model for each candidate
    (`slm_pipeline.engine.walk`). Departures from the published code: a loss that is not finite never wins, and all of
    them not finite is an error (there the last layer goes, silently); any architecture. Its "128 samples" are lines
    of WikiText-2, about five windows of 2048 tokens.

    Scores in the plan: rounds, each with the layer removed, the loss in nats per token then, and the losses of all
    candidates measured (null for one that was given up because it could not win any more).
    """

    protect_first: NumLayersOrZero = 1
    protect_last: NumLayersOrZero = 1
    # Measure only so many layers on all samples, those with the least loss on the first (up to 2048 tokens). Several
    # times faster, ours, and not always the published choice. None: all that can still win.
    shortlist: Count | None = None
    strict: bool = False  # keep the published batch shapes; matters for ties in bfloat16 only, and is slower
    compile: bool = False  # blocks compiled by torch: faster on a GPU after some seconds; the last digits differ
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(5, 2048))

    name: ClassVar[str] = "sleb"
    streams: ClassVar[bool] = True
    shares_samples: ClassVar[bool] = True
    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)
    removes_by_order: ClassVar[bool] = True
    min_seq_len: ClassVar[int] = 2

    def check(self, context: Context) -> None:
        super().check(context)
        compiled.check(self.compile, context)

    def memory(self, sizes: Sizes) -> int:
        return sizes.walking(sizes.layers)

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        with compiled.blocks_compiled(problem.view, self.compile):
            return self._plan(problem)

    def _plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        from slm_pipeline.engine.walk import Removal, RemovalWalk

        walk = RemovalWalk(problem.view, problem.input_ids, strict=self.strict)
        candidates = [Removal(layer) for layer in self.candidates(problem.view.num_layers)]
        most = problem.target.remove if isinstance(problem.target, Layers) else len(candidates)
        rounds, left = [], problem.target.remove
        for found in walk.greedily(candidates, most, shortlist=self.shortlist):
            rounds.append(found)
            left -= problem.view.block_parameters(found.removed.layer)
            if left <= 0 and isinstance(problem.target, Parameters):
                break
        return self.removal_plan(
            problem,
            self.first_of([found.removed.layer for found in rounds], problem),
            {
                "rounds": [found.as_scores() for found in rounds],
                "num_block_evaluations": walk.num_block_evaluations,
            },
        )
