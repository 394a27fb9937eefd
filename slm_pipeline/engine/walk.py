"""Language-model loss of many variants of a model, each of which lacks one block, in one walk up the stack.

A loop that removes a block, runs the whole model, and tries the next one reads every block's weights once for every
candidate. Here the candidates walk together: what enters block i is the same for all candidates that lose a block at
or above i, so a candidate starts at the block it loses, and each block runs once on everybody who is past that point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from slm_pipeline.engine.blocks import BlockRunner, batches
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView

MAX_BATCH_TOKENS = 8192  # tokens that go through a block at once


class RemovalWalk:
    """The model with some blocks removed already, and the loss of removing one more.

    Args:
        view: the dense model; never changed.
        input_ids: [N, T] int64 calibration tokens.
        strict: run each candidate on its own, in the batch shape of a plain loop. In bfloat16 the shape of a batch
            changes the rounding, so ties may fall otherwise.

    Attributes:
        kept: original indices of the blocks still there.
        num_block_evaluations: blocks run on N x T tokens since the dense pass.
    """

    def __init__(self, view: ModelView, input_ids: Tensor, *, strict: bool = False):
        self.view = view
        self.kept = list(range(view.num_layers))
        self.num_block_evaluations = 0.0
        self._num_samples = len(input_ids)
        self._strict = strict
        self._input_ids = batches(input_ids.to(view.device), MAX_BATCH_TOKENS)
        self._runners = [BlockRunner(view, batch) for batch in self._input_ids]
        # For each batch, what enters each kept block, and what leaves the last; cut off where it is out of date.
        self._prefixes = [list(runner.states) for runner in self._runners]

    def losses(self, candidates: Sequence[int], *, best_first: int | None = None, description: str) -> dict[int, float]:
        """Mean next-token loss in nats with each candidate block removed as well.

        Args:
            candidates: original indices of kept blocks.
            best_first: a candidate that is likely the best. It is measured first, and every other one is given up
                as soon as its sum over the samples so far exceeds the best one's total, since losses only add up: its
                value is then infinity. None measures all to the end.

        Returns:
            candidate -> loss; infinity for one whose loss is not finite.

        Raises:
            UserError: no candidate has a finite loss.
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
        num_predicted = self._num_samples * (self._input_ids[0].shape[1] - 1)
        found = {c: total / num_predicted if total <= limit else math.inf for c, total in totals.items()}
        if not any(math.isfinite(loss) for loss in found.values()):
            raise UserError(
                "the loss is not finite whichever layer is removed: the model overflows in its dtype;"
                " try model.dtype=bfloat16 or model.dtype=float32"
            )
        return {c: loss if math.isfinite(loss) else math.inf for c, loss in found.items()}

    def remove(self, layer: int) -> None:
        """Remove a block for good. States below it stay valid."""
        position = self.kept.index(layer)
        self.kept.remove(layer)
        self._prefixes = [prefix[: position + 1] for prefix in self._prefixes]

    @torch.no_grad()
    def _walk(self, index: int, candidates: Sequence[int]) -> dict[int, float]:
        """Sum of the losses over one batch of samples, for each candidate."""
        runner, prefix = self._runners[index], self._prefixes[index]
        walking: list[int] = []
        states = prefix[0][:0]
        for position, layer in enumerate(self.kept):
            current_is_known = position + 1 < len(prefix)
            entering = states if current_is_known else torch.cat([prefix[position].to(states.device), states])
            if len(entering):
                entering = self._run(runner, layer, entering, len(prefix[0]))
            if not current_is_known:
                prefix.append(entering[: len(prefix[0])].clone())  # a view would keep all candidates' states alive
                entering = entering[len(prefix[0]) :]
            states = entering
            if layer in candidates:
                walking.append(layer)
                states = torch.cat([states, prefix[position].to(states.device)])
        return {
            candidate: runner.loss(state, self._input_ids[index])
            for candidate, state in zip(walking, states.split(len(prefix[0])), strict=True)
        }

    def _run(self, runner: BlockRunner, layer: int, states: Tensor, batch_size: int) -> Tensor:
        self.num_block_evaluations += len(states) / self._num_samples
        length = states.shape[1]
        rows = batch_size if self._strict else max(1, MAX_BATCH_TOKENS // length)
        return torch.cat([runner.run(layer, piece) for piece in states.split(rows)])
