"""Many variants of a model, each of which lacks one more block or sublayer, judged in one walk up the stack.

A loop that removes a block, runs the whole model, and tries the next one reads every block's weights once for every
candidate. Here the candidates walk together: what enters block i is the same for all candidates that lose something
above i, so a candidate starts at the block it changes, and each block runs once on everybody who is past that point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from slm_pipeline.engine.blocks import BlockRunner, batches
from slm_pipeline.engine.objectives import OBJECTIVES
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block

MAX_BATCH_TOKENS = 8192  # tokens that go through a block at once
_SAMPLE_TOKENS = 2048  # tokens of text walked at once: few, so that hopeless candidates are given up early


class Removal(NamedTuple):
    """Something to remove: a whole layer, or one of its two sublayers."""

    layer: int
    part: str = "layer"  # layer | attention | mlp


class RemovalWalk:
    """The model with some parts removed already, and how bad it is to remove one more.

    Args:
        view: the dense model; never changed.
        input_ids: [N, T] int64 calibration tokens.
        objective: a key of `slm_pipeline.engine.objectives.OBJECTIVES`.
        strict: run each candidate on its own, in the batch shape of a plain loop. In bfloat16 the shape of a batch
            changes the rounding, so ties may fall otherwise.

    Attributes:
        blocks: the blocks still there, input side first.
        num_block_evaluations: blocks run on N x T tokens since the dense pass.
    """

    def __init__(
        self, view: ModelView, input_ids: Tensor, *, objective: str = "next_token_loss", strict: bool = False
    ):
        self.view = view
        self.blocks = [Block(layer) for layer in range(view.num_layers)]
        self.num_block_evaluations = 0.0
        self._objective = OBJECTIVES[objective]
        self._num_samples, length = input_ids.shape
        self._num_terms = self._num_samples * (length - self._objective.tokens_without)
        self._strict = strict
        self._input_ids = batches(input_ids.to(view.device), 1 if strict else _SAMPLE_TOKENS)
        self._runners = [BlockRunner(view, batch) for batch in self._input_ids]
        # For each batch, what enters each block, and what leaves the last; cut off where it is out of date.
        self._prefixes = [list(runner.states) for runner in self._runners]

    def losses(
        self, candidates: Sequence[Removal], *, best_first: Removal | None = None, description: str
    ) -> dict[Removal, float]:
        """Mean over tokens of the objective with each candidate removed as well.

        Args:
            best_first: a candidate that is likely the best. It is measured first, and every other one is given up
                as soon as its sum over the samples so far exceeds the best one's total, since sums only grow: its
                value is then infinity. None measures all to the end.

        Returns:
            candidate -> value; infinity for one whose value is not finite.

        Raises:
            UserError: no candidate has a finite value.
        """
        totals = dict.fromkeys(candidates, 0.0)
        limit = math.inf
        with tqdm(total=len(self._runners), desc=description, unit="batch", disable=None, leave=False) as progress:
            if best_first is not None:
                total = sum(self._walk(index, [best_first])[best_first] for index in range(len(self._runners)))
                totals[best_first] = total
                limit = total if math.isfinite(total) else math.inf
            for index in range(len(self._runners)):
                walking = [c for c in candidates if c != best_first and totals[c] <= limit]
                for candidate, loss in self._walk(index, walking).items():
                    totals[candidate] += loss
                progress.update()
        found = {c: total / self._num_terms if total <= limit else math.inf for c, total in totals.items()}
        if not any(math.isfinite(loss) for loss in found.values()):
            raise UserError(
                "the loss is not finite whatever is removed: the model overflows in its dtype;"
                " try model.dtype=bfloat16 or model.dtype=float32"
            )
        return {c: loss if math.isfinite(loss) else math.inf for c, loss in found.items()}

    def remove(self, removal: Removal) -> None:
        """Remove something for good; a layer goes with its second sublayer. States below it stay valid."""
        position = next(index for index, block in enumerate(self.blocks) if block.body == removal.layer)
        rest = self._without(self.blocks[position], removal.part)
        self.blocks[position : position + 1] = [] if rest is None else [rest]
        self._prefixes = [prefix[: position + 1] for prefix in self._prefixes]

    @staticmethod
    def _without(block: Block, part: str) -> Block | None:
        """What is left of a block; None when nothing is."""
        if part == "layer" or block.without - {part}:
            return None
        return block.lacking(part)

    @torch.no_grad()
    def _walk(self, index: int, candidates: Sequence[Removal]) -> dict[Removal, float]:
        """Sum of the objective over one batch of samples, for each candidate."""
        if not candidates:
            return {}
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
        losses = self._objective.measure(runner, states.split(size), self._input_ids[index])
        return dict(zip(walking, losses, strict=True))

    def _variant(self, runner: BlockRunner, block: Block | None, hidden: Tensor) -> Tensor:
        return hidden if block is None else self._run(runner, block, hidden, len(hidden))

    def _run(self, runner: BlockRunner, block: Block, states: Tensor, batch_size: int) -> Tensor:
        self.num_block_evaluations += len(states) / self._num_samples
        rows = batch_size if self._strict else max(1, MAX_BATCH_TOKENS // states.shape[1])
        return torch.cat([runner.run(block, piece) for piece in states.split(rows)])
