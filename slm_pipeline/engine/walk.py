"""Many variants of a model, each of which lacks one more block or sublayer, judged in one walk up the stack.

A loop that removes a block, runs the whole model, and tries the next one reads every block's weights once for every
candidate. Here the candidates walk together: what enters block i is the same for all candidates that lose something
above i, so a candidate starts at the block it changes, and each block runs once on everybody who is past that point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, batches, dense_pass, parts_together, rows_at_once
from slm_pipeline.engine.criteria import CRITERIA, Sums
from slm_pipeline.errors import UserError
from slm_pipeline.machine import ranks
from slm_pipeline.machine.ranks import Share
from slm_pipeline.models.view import ModelView
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.surgery.block import Block

_TEXT_TOKENS = 2048  # of the text, walked at once by all candidates
_KEPT_BYTES = 1 << 30  # of states, so that who is measured twice need not walk twice
_COSTLY_HEAD = 4  # in blocks: from there on a bound that spares most of the head is worth a second walk
_STATES_OF_CANDIDATE = 3  # of each token in memory: those that enter a block, that leave it, and their parts
_FEWEST_PIECES = 8  # that the text is walked in, if it has so many samples: a hopeless candidate is given up early


class Removal(NamedTuple):
    """Something to remove: a whole layer, or one of its two sublayers."""

    layer: int
    part: str = "layer"  # layer | attention | mlp

    @property
    def label(self) -> str:
        """For plan.json."""
        return str(self.layer) if self.part == "layer" else f"{self.layer}.{self.part}"


@dataclass(frozen=True)
class Round:
    """One removal: what, the criterion's mean after it, and that of every candidate measured."""

    removed: Removal
    loss: float
    losses: dict[Removal, float]

    def as_scores(self, one: str = "loss", all_of_them: str = "losses") -> dict[str, Any]:
        """For plan.json; null where a candidate was given up because it could not win any more."""
        losses = {c.label: loss if math.isfinite(loss) else None for c, loss in self.losses.items()}
        removed = self.removed.layer if self.removed.part == "layer" else self.removed.label
        return {"removed": removed, one: self.loss, all_of_them: losses}


def check_some_finite(losses: Iterable[float]) -> None:
    """Raise `UserError` when no candidate has a finite value."""
    if not any(math.isfinite(loss) for loss in losses):
        raise UserError(
            "the loss is not finite whatever is removed: the model overflows in its dtype;"
            " try model.dtype=bfloat16 or model.dtype=float32"
        )


class RemovalWalk:
    """The model with some parts removed already, and how bad it is to remove one more.

    Processes that work together share out the pieces of the text; what they find is added up in float64, so that all
    decide alike, and as one process does.

    Args:
        view: the dense model; never changed.
        input_ids: [N, T] int64 calibration tokens.
        criterion: a key of `slm_pipeline.engine.criteria.CRITERIA`.
        strict: run each candidate on its own, in the batch shape of a plain loop. In bfloat16 the shape of a batch
            changes the rounding, so ties may fall otherwise.

    Attributes:
        blocks: the blocks still there, input side first.
        num_block_evaluations: blocks run on N x T tokens since the dense pass.
    """

    def __init__(self, view: ModelView, input_ids: Tensor, *, criterion: str = "next_token_loss", strict: bool = False):
        self.view = view
        self.blocks = [Block(layer) for layer in range(view.num_layers)]
        self.num_block_evaluations = 0.0
        self._criterion = CRITERIA[criterion]
        costly = view.head_parameters() >= _COSTLY_HEAD * view.block_parameters(0)
        exact = view.dtype == torch.float32  # in less, rounding could put the bound above the loss
        self._bound = self._criterion.bound if costly and exact and not strict else None
        self._num_samples, length = input_ids.shape
        self._num_terms = self._num_samples * (length - self._criterion.tokens_without)
        self._strict = strict
        tokens = 1 if strict else min(_TEXT_TOKENS, input_ids.numel() // _FEWEST_PIECES)
        self._input_ids = batches(input_ids.to(view.device), tokens)
        # The first piece is what a shortlist goes by; whoever has it, the others wait for it.
        self._share = Share.of(len(self._input_ids) - 1)
        self._rest = [1 + number for number in self._share.numbers]
        self._first = [0] if ranks.is_first() or not self._share.divided else []
        numbers = [*self._first, *self._rest]
        self._runners = dict(zip(numbers, dense_pass(view, [self._input_ids[n] for n in numbers]), strict=True))
        # For each batch, what enters each block, and what leaves the last; cut off where it is out of date.
        self._prefixes = {number: runner.states for number, runner in self._runners.items()}

    def losses(self, candidates: Sequence[Removal]) -> dict[Removal, float]:
        """Mean over tokens of the criterion with each candidate removed as well; infinity where it is not finite."""
        totals = dict.fromkeys(candidates, 0.0)
        self._go_on(totals, [*self._first, *self._rest])
        return self._means(totals, math.inf)

    def losses_of_contenders(
        self, candidates: Sequence[Removal], *, shortlist: int | None = None
    ) -> dict[Removal, float]:
        """`losses`, but a candidate that cannot be the best any more is given up, since sums only grow.

        Whoever leads after the first samples is measured to the end, then the others as far as they can still win.
        Where the head is costly, a cheap bound on the rest of their losses decides first who may.

        Args:
            shortlist: give up all but so many best after the first samples already. Then the best may be missed.

        Returns:
            candidate -> value; infinity for one that was given up.
        """
        totals = dict.fromkeys(candidates, 0.0)
        self._go_on(totals, self._first)
        leader, *others = sorted(totals, key=lambda candidate: totals[candidate])[:shortlist]
        leading = {leader: totals[leader]}
        self._go_on(leading, self._rest)
        limit = leading[leader] / self._num_terms
        arrived: dict[int, dict[Removal, Tensor]] = {}
        if self._bound is not None:
            bounds = {candidate: totals[candidate] for candidate in others}
            self._go_on(bounds, self._rest, limit, self._bound, arrived)
            others = [candidate for candidate in others if bounds[candidate] <= limit * self._num_terms]
        contending = {candidate: totals[candidate] for candidate in others}
        self._go_on(contending, self._rest, limit, known=arrived)
        given_up = dict.fromkeys(candidates, math.inf)
        return given_up | self._means({**leading, **contending}, limit)

    def greedily(
        self, candidates: Sequence[Removal], num_rounds: int, *, shortlist: int | None = None
    ) -> Iterator[Round]:
        """Remove the best candidate, again and again, until ``num_rounds`` are done or the caller has enough.

        Args:
            shortlist: in each round give up all but so many best after the first samples; then the best may be missed.

        Raises:
            UserError: no candidate has a finite value.
        """
        left = list(candidates)
        for _ in ProgressBar(range(num_rounds), desc="removals"):
            losses = self.losses_of_contenders(left, shortlist=shortlist)
            check_some_finite(losses.values())
            best = min(losses, key=lambda candidate: losses[candidate])
            self.remove(best)
            left.remove(best)
            yield Round(best, losses[best], losses)

    def remove(self, removal: Removal) -> None:
        """Remove something for good; a layer goes with its second sublayer. States below it stay valid."""
        position = next(index for index, block in enumerate(self.blocks) if block.body == removal.layer)
        rest = self._without(self.blocks[position], removal.part)
        self.blocks[position : position + 1] = [] if rest is None else [rest]
        for prefix in self._prefixes.values():
            del prefix[position + 1 :]

    def _go_on(
        self,
        totals: dict[Removal, float],
        numbers: Sequence[int],
        limit: float = math.inf,
        sums: Sums | None = None,
        known: dict[int, dict[Removal, Tensor]] | None = None,
    ) -> None:
        """Add the sums over some batches to ``totals``, of those candidates whose sum does not exceed the limit yet.

        Args:
            sums: in place of the criterion's.
            known: for each batch the states that candidates arrived at. Those found here are added while there is
                room, so that a second measurement need not walk again.
        """
        before, evaluations = dict(totals), self.num_block_evaluations
        self._add(totals, numbers, limit, sums or self._criterion.sums, known)
        if self._share.divided:
            added = [totals[c] - total if math.isfinite(total) else 0.0 for c, total in before.items()]
            added.append(self.num_block_evaluations - evaluations)
            *added, more = self._share.summed(torch.tensor(added, dtype=torch.float64)).tolist()
            totals.update((c, total + found) for (c, total), found in zip(before.items(), added, strict=True))
            self.num_block_evaluations = evaluations + more

    def _add(
        self,
        totals: dict[Removal, float],
        numbers: Sequence[int],
        limit: float,
        sums: Sums,
        known: dict[int, dict[Removal, Tensor]] | None,
    ) -> None:
        """`_go_on` in this process. Who is over the limit here is so with the sums of the others too."""
        size = parts_together(self.view, self._input_ids, _STATES_OF_CANDIDATE * len(totals))
        groups = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        for group in ProgressBar(groups, desc="candidates", unit="batch", leave=False):
            walking = [candidate for candidate, total in totals.items() if total <= limit * self._num_terms]
            found = {
                index: {c: state for c, state in (known or {}).get(index, {}).items() if c in walking}
                for index in group
            }
            walked = self._walk({index: [c for c in walking if c not in found[index]] for index in group})
            for index in group:
                states = found.pop(index) | walked.pop(index, {})
                if not states:
                    continue
                losses = sums(self._runners[index], list(states.values()), self._input_ids[index])
                for candidate, loss in zip(states, losses, strict=True):
                    totals[candidate] += loss if math.isfinite(loss) else math.inf
                if known is not None:
                    held = sum(state.nbytes for of_batch in known.values() for state in of_batch.values())
                    if held + sum(state.nbytes for state in states.values()) <= _KEPT_BYTES:
                        known[index] = states

    def _means(self, totals: Mapping[Removal, float], limit: float) -> dict[Removal, float]:
        means = {candidate: total / self._num_terms for candidate, total in totals.items()}
        return {candidate: mean if mean <= limit else math.inf for candidate, mean in means.items()}

    @staticmethod
    def _without(block: Block, part: str) -> Block | None:
        """What is left of a block; None when nothing is."""
        if part == "layer" or block.without - {part}:
            return None
        return block.lacking(part)

    def _walk(self, candidates: Mapping[int, Sequence[Removal]]) -> dict[int, dict[Removal, Tensor]]:
        """What leaves the last block for some batches of samples, for each of their candidates; all of them go through
        one block, then through the next."""
        walks = {index: self._steps(index, found) for index, found in candidates.items() if found}
        arrived: tuple[tuple[list[Removal], Tensor], ...] = ()
        for states in zip(*walks.values(), strict=True):
            arrived = states
        return {
            index: dict(zip(found, states.chunk(len(found)), strict=True))
            for index, (found, states) in zip(walks, arrived, strict=True)
        }

    @torch.no_grad()
    def _steps(self, index: int, candidates: Sequence[Removal]) -> Iterator[tuple[list[Removal], Tensor]]:
        """After each block: the candidates that have lost something so far, and what leaves it for one batch of samples
        of each, one after the other."""
        runner, prefix = self._runners[index], self._prefixes[index]
        walking: list[Removal] = []
        states = prefix[0][:0]
        size = len(prefix[0])
        for position, block in enumerate(self.blocks):
            here = [candidate for candidate in candidates if candidate.layer == block.body]
            current_is_known = position + 1 < len(prefix)
            entering = states if current_is_known else torch.cat([prefix[position].to(states.device), states])
            if len(entering):
                entering = self._run(runner, block, entering, size)
            if not current_is_known:
                prefix.append(entering[:size].clone())  # a view would keep all candidates' states alive
                entering = entering[size:]
            starting = [self._variant(runner, self._without(block, c.part), prefix[position]) for c in here]
            states = torch.cat([entering, *(state.to(entering.device) for state in starting)])
            walking += here
            yield walking, states

    def _variant(self, runner: BlockRunner, block: Block | None, hidden: Tensor) -> Tensor:
        return hidden if block is None else self._run(runner, block, hidden, len(hidden))

    def _run(self, runner: BlockRunner, block: Block, states: Tensor, batch_size: int) -> Tensor:
        self.num_block_evaluations += len(states) / self._num_samples
        rows = batch_size if self._strict else rows_at_once(states)
        return torch.cat([runner.run(block, piece) for piece in states.split(rows)])
