"""Similarity between the dense model and the model after merging windows of consecutive layers.

The published loop copies the model for each candidate and runs all of it. Three facts make that unnecessary, without
changing a decision:

- windows are merged from the top down, so what enters a window is always the dense model's own state: cached once;
- a merged block is one block of the dense model with some parameters replaced: no copy is needed to run it;
- the similarity depends on how the layers are grouped alone: evaluated once, however many thresholds ask, be it in one
  search or in several jobs (`slm_pipeline.engine.window_memo`).
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, batches, dense_pass
from slm_pipeline.engine.similarities import SIMILARITIES
from slm_pipeline.engine.window_memo import WindowMemo
from slm_pipeline.errors import UserError
from slm_pipeline.machine import ranks
from slm_pipeline.machine.ranks import Share
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.merge_rules import merge

Group = int | tuple["Group", ...]  # an original layer, or adjacent groups merged into one
MAX_BATCH_TOKENS = 8192  # bounds the memory of a batch; its cached states stay on the model's device


class StackSimilarity:
    """Mean similarity of a merged model's final states to the dense model's, over calibration samples.

    Processes that work together share out the batches, and know what the first one's memo knows.

    Args:
        view: the dense model; never changed.
        input_ids: [N, length] calibration samples.
        rule: merge rule, see `slm_pipeline.surgery.merge_rules`.
        similarity: a key of `slm_pipeline.engine.similarities.SIMILARITIES`.
        memo: what is known already, for the same model, samples, rule and similarity.

    Attributes:
        asked: stack -> similarity, for everything asked so far.
        num_evaluated: of them, those that were not in the memo.
    """

    def __init__(self, view: ModelView, input_ids: Tensor, rule: str, similarity: str, memo: WindowMemo | None = None):
        self.view = view
        self.input_ids = input_ids
        self.rule = rule
        self.asked: dict[tuple[Group, ...], float] = {}
        self.num_evaluated = 0
        self._memo = WindowMemo() if memo is None else memo
        self._similarity = SIMILARITIES[similarity]
        self._merged: dict[Group, Block] = {}

    @cached_property
    def _runners(self) -> list[BlockRunner]:
        """The dense pass; not made where the memo knows everything."""
        text = batches(self.input_ids, MAX_BATCH_TOKENS)
        self._share = Share.of(len(text))
        return dense_pass(self.view, text[self._share.numbers.start : self._share.numbers.stop])

    @property
    def num_block_evaluations(self) -> int:
        """Blocks run on all batches, the dense pass not counted."""
        if not self.num_evaluated:
            return 0
        number = torch.tensor(sum(runner.num_block_evaluations for runner in self._runners))
        return int(self._share.summed(number))

    def __call__(self, stack: tuple[Group, ...]) -> float:
        """Similarity, at most 1, of the model whose upper end is ``stack``; below it stands the dense model.

        Raises:
            UserError: the similarity is not finite.
        """
        known = ranks.of_first(self._memo[stack]) if stack in self._memo else ranks.of_first(math.nan)
        if stack not in self._memo and not math.isnan(known):
            self._memo.add(stack, known)
        if stack not in self._memo:
            self.num_evaluated += 1
            self._merged = {group: self._merged[group] for group in stack if group in self._merged}
            blocks = [self._block(group) for group in stack]
            lowest = originals(stack[0])[0]
            states = [runner.states[lowest] for runner in self._runners]
            for block in blocks:  # all samples through one block, then through the next
                states = [runner.run(block, hidden) for runner, hidden in zip(self._runners, states, strict=True)]
            total = sum(map(self._measure, self._runners, states))
            total = float(self._share.summed(torch.tensor(total, dtype=torch.float64)))
            value = self._similarity.of_mean(total / len(self.input_ids))
            if not math.isfinite(value):
                merged = [f"{layers[0]}..{layers[-1]}" for layers in map(originals, stack) if len(layers) > 1]
                raise UserError(
                    f"the similarity after merging layers {', '.join(merged)} is {value}: the model overflows in its"
                    " dtype; try model.dtype=bfloat16 or model.dtype=float32"
                )
            self._memo.add(stack, value)
        self.asked[stack] = self._memo[stack]
        return self.asked[stack]

    def _block(self, group: Group) -> Block:
        if isinstance(group, int):
            return Block(group)
        if group not in self._merged:
            self._merged[group] = merge(self.view, [self._block(member) for member in group], self.rule)
        return self._merged[group]

    def _measure(self, runner: BlockRunner, hidden: Tensor) -> float:
        return float(self._similarity.measure(self.view, runner.final, runner.finish(hidden)).sum())


def originals(group: Group) -> list[int]:
    """The original layers of a group, lowest first."""
    return [group] if isinstance(group, int) else [layer for member in group for layer in originals(member)]
