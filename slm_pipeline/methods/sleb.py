"""SLEB: remove one layer after the other, each time the one that the language-model loss misses least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tqdm import tqdm

from slm_pipeline.methods.base import CalibrationSize, LayerRemoval, PruningProblem
from slm_pipeline.surgery.plan import Plan


@dataclass(kw_only=True)
class Sleb(LayerRemoval):
    """SLEB, arXiv 2402.09025, algorithm 1: greedy, every remaining layer is tried in every round.

    Decisions are those of the published loop, found without running the whole model for each candidate
    (`slm_pipeline.engine.walk`). Departures from the published code: a loss that is not finite never wins, and all of
    them not finite is an error (there the last layer goes, silently); any architecture. Its "128 samples" are lines
    of WikiText-2, about five windows of 2048 tokens.

    Options:
        strict: keep the published batch shapes; matters for ties in bfloat16 only, and is slower.

    Scores in the plan: rounds, each with the layer removed, its loss in nats per token, and the losses of all
    candidates (null for one that was given up because it could not win any more).
    """

    protect_first: int = 1
    protect_last: int = 1
    strict: bool = False
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(5, 2048))

    name: ClassVar[str] = "sleb"

    def plan(self, problem: PruningProblem) -> Plan:
        from slm_pipeline.engine.walk import Removal, RemovalWalk

        assert problem.num_remove is not None
        walk = RemovalWalk(problem.view, problem.input_ids, strict=self.strict)
        candidates = [Removal(layer) for layer in self.candidates(problem.view.num_layers)]
        removed: list[int] = []
        rounds = []
        favourite = None
        for number in tqdm(range(problem.num_remove), desc="sleb", unit="round", disable=None):
            losses = walk.losses(candidates, best_first=favourite, description=f"round {number + 1}")
            best = min(candidates, key=lambda candidate: losses[candidate])
            finite = {candidate: loss for candidate, loss in losses.items() if loss < float("inf")}
            rounds.append(
                {
                    "removed": best.layer,
                    "loss": losses[best],
                    "losses": {str(c.layer): finite.get(c) for c in candidates},
                }
            )
            removed.append(best.layer)
            candidates.remove(best)
            walk.remove(best)
            # The runner-up is the likely winner of the next round.
            favourite = min((c for c in candidates if c in finite), key=lambda c: finite[c], default=None)
        return self.removal_plan(
            problem, removed, {"rounds": rounds, "num_block_evaluations": walk.num_block_evaluations}
        )
