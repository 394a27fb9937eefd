"""A plan that makes generated tokens so many times faster, by the table of block times, with any method that is told
how much to remove.

The target is turned into layers or parameters, the time of the plan is looked up, and the method is asked again for
more or less as long as that is needed. Layers: as many more, one by one, as are missing. Parameters: by linear
interpolation between the plans that were too slow and fast enough, in the middle at least once two in a row were too
slow, and no more than the method can remove, until one is within 1 % of the target and not slower than it, or six were
made; the smallest that is fast enough is taken. A method
that takes prices is told what each part of a layer costs in picoseconds, and how many are to go: as many more as were
missing, until its plan is fast enough.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.block_times import BlockTimes
from slm_pipeline.methods.base import Method, PruningProblem
from slm_pipeline.methods.target import Layers, Parameters, Speedup
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.surgery.ops import LayerSize

log = logging.getLogger(__name__)

_TRIES = 6
_TOLERANCE = 0.01  # by how much a plan may be faster than what was asked


@dataclass(frozen=True)
class _Found:
    plan: Plan
    seconds: float
    is_idle: bool  # whether what was removed is still there, as zeros


def plan_for_speedup(method: Method, problem: PruningProblem[Any], times: BlockTimes) -> Plan:
    """The method's plan; its scores get ``latency``: the speedup that was asked and the predicted one, the dense
    model's and the pruned one's predicted seconds for a token, the plans that were made, and the table's device and
    settings.

    Args:
        problem: its target is a `Speedup`.

    Raises:
        UserError: the method cannot reach it, or as `Method.plan`.
    """
    from slm_pipeline.surgery.apply import layer_sizes

    assert isinstance(problem.target, Speedup)
    search = _Search(method, problem, times, layer_sizes(problem.view), problem.target.times)
    if method.takes_prices:
        found = search.by_prices()
    else:
        found = search.by_parameters() if counts_parameters(method) else search.by_layers()
    plan = found.plan
    plan.scores["latency"] = {
        "asked": problem.target.times,
        "predicted": times.seconds / found.seconds,
        "seconds": {"dense": times.seconds, "pruned": found.seconds},
        "plans": search.made,
        "device": times.device,
        **times.settings,
    }
    return plan


def counts_parameters(method: Method) -> bool:
    """Whether the method is told parameters; else layers."""
    return Parameters in method.targets and not method.removes_by_order


class _Search:
    def __init__(
        self,
        method: Method,
        problem: PruningProblem[Any],
        times: BlockTimes,
        dense: Sequence[LayerSize],
        speedup: float,
    ):
        self.method, self.problem, self.times, self.dense, self.speedup = method, problem, times, dense, speedup
        self.budget = times.seconds / speedup
        self.made = 0
        if (most := times.seconds - times.blocks) >= self.budget:
            raise self._out_of_reach(f"embeddings and head alone take {most / times.seconds:.1%} of the time")

    def _out_of_reach(self, why: str) -> UserError:
        return UserError(
            f"pruning_ratio.speedup={self.speedup:g} is out of reach of method={self.method.name} by the times of the"
            f" blocks on {self.times.device}: {why}"
        )

    def _plan(self, target: Layers | Parameters, prices: Sequence[LayerSize] | None = None) -> _Found:
        plan = self.method.plan(replace(self.problem, target=target, prices=prices))
        self.made += 1
        sizes, _ = measure_changes(plan, self.dense)
        seconds = self.times.of(plan, sizes)
        what = "picoseconds" if prices else "layers" if isinstance(target, Layers) else "parameters"
        speedup = self.times.seconds / seconds
        log.info("%s: %d %s removed, predicted speedup %.3f", self.method.name, target.remove, what, speedup)
        return _Found(plan, seconds, any(size.idle for size in sizes))

    def by_layers(self) -> _Found:
        number = len(self.dense)
        fewest, why = self.method.fewest_left(number)
        most = number - fewest
        # a hair less than exactly so many layers is meant to be so many
        first = max(1, math.ceil((self.times.seconds - self.budget) * number / self.times.blocks - 1e-6))
        reached = 1.0
        for remove in range(first, most + 1):
            found = self._plan(Layers(remove))
            if found.seconds <= self.budget * (1 + 1e-6):
                return found
            reached = self.times.seconds / found.seconds
        if first > most:
            reached = self.times.seconds / (self.times.seconds - most * self.times.blocks / number)
        raise self._out_of_reach(
            f"of {number} layers at least {fewest} must be left ({why}), which is {reached:.2f} times as fast"
        )

    def by_prices(self) -> _Found:
        prices = self.times.prices(self.dense)
        missing = self.times.seconds - self.budget
        while self.made < _TRIES:
            found = self._plan(Parameters(math.ceil(missing * 1e12)), prices)
            if found.seconds <= self.budget * (1 + 1e-6):
                return found
            missing += found.seconds - self.budget
        raise self._out_of_reach(
            f"{self.made} plans were at most {self.times.seconds / found.seconds:.2f} times as fast"
        )

    def by_parameters(self) -> _Found:
        from slm_pipeline.engine.allocation import TooMany

        every = sum(size.whole for size in self.dense)
        # parameters removed and time left, of the largest plan that is too slow and of the smallest that is not
        slow, fast = (0, self.times.seconds), (every, self.times.seconds - self.times.blocks)
        best: _Found | None = None
        most, refused = every, None  # that the method can remove, and how it said so
        in_a_row = 0  # plans that were too slow: where widths cost little time, a line falls short again and again
        while self.made < _TRIES:
            goal = self.budget * (1 - _TOLERANCE / 2)
            share = (slow[1] - goal) / (slow[1] - fast[1]) if slow[1] > fast[1] else 0.5
            share = max(share, 0.5) if in_a_row > 1 else share
            remove = min(most, slow[0] + round(min(0.98, max(0.02, share)) * (fast[0] - slow[0])))
            if remove <= slow[0] or remove == fast[0]:
                break
            try:
                found = self._plan(Parameters(remove))
            except TooMany as error:
                most, refused = min(remove - 1, error.most), error
                continue
            except UserError as error:
                if best is None:
                    reached = self.times.seconds / slow[1]
                    raise self._out_of_reach(f"{reached:.2f} times as fast, and then {error}") from error
                log.warning("%s: no plan nearer to the speedup: %s", self.method.name, error)
                break
            if found.is_idle:
                raise self._out_of_reach("what is gone stays as zeros, which take as long; use method.export=custom")
            if found.seconds > self.budget:
                slow, in_a_row = (remove, found.seconds), in_a_row + 1
                continue
            fast, best, in_a_row = (remove, found.seconds), found, 0
            if found.seconds >= self.budget * (1 - _TOLERANCE):
                break
        if best is None and refused is not None:
            reached = self.times.seconds / slow[1]
            raise self._out_of_reach(f"{reached:.2f} times as fast, and then {refused}") from refused
        if best is None:
            raise self._out_of_reach(f"{self.made} plans were at most {self.times.seconds / slow[1]:.2f} times as fast")
        return best
