"""How much worse the model's predictions get when one layer alone is another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, batches, rows_at_once
from slm_pipeline.engine.criteria import CRITERIA
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block

_TEXT_TOKENS = 2048  # that all variants of a layer walk at once


class Sensitivity:
    """A model's states on some text, from which a variant of one layer costs that layer and those above it.

    They lie in main memory, one layer's at a time beside the model.

    Args:
        view: the dense model; never changed.
        input_ids: [N, length] int64 tokens.
        blocks: of the model whose layers are varied, input side first; None: of the dense one.
        criterion: one of `CRITERIA`.
    """

    def __init__(
        self,
        view: ModelView,
        input_ids: Tensor,
        blocks: Sequence[Block] | None = None,
        criterion: str = "kl_divergence",
    ):
        self.view = view
        self._criterion = CRITERIA[criterion]
        self.blocks = [Block(layer) for layer in range(view.num_layers)] if blocks is None else list(blocks)
        self._input_ids = batches(input_ids.to(view.device), _TEXT_TOKENS)
        self._runners: list[BlockRunner] = []
        self._states: list[list[Tensor]] = []
        for batch in self._input_ids:
            runner = BlockRunner(view, batch)
            states = runner.states if blocks is None else _entering(runner, self.blocks)
            self._states.append([state.cpu() for state in states])
            del runner.states[1:-1]  # so that a batch's are beside the model, not the text's
            self._runners.append(runner)

    def damages(self, layer: int, variants: Iterable[Block]) -> list[float]:
        """Mean of the criterion over tokens, when each of ``variants`` of this dense layer takes its place; infinity
        where it is not finite. They may be made one at a time: a variant has been run before the next is asked for."""
        position = next(i for i, block in enumerate(self.blocks) if block.body == layer)
        entering = [states[position] for states in self._states]
        return self._damages(variants, entering, self.blocks[position + 1 :])

    def damage(self) -> float:
        """That of the model as it is."""
        return self._damages([self.blocks[-1]], [states[len(self.blocks) - 1] for states in self._states], [])[0]

    @torch.no_grad()
    def _damages(self, variants: Iterable[Block], entering: Sequence[Tensor], above: Sequence[Block]) -> list[float]:
        leaving: list[list[Tensor]] = [[] for _ in entering]
        for block in variants:
            for of_batch, states in zip(leaving, self._through(block, entering), strict=True):
                of_batch.append(states)
        totals = [0.0] * len(leaving[0])
        together = [torch.cat(leaving.pop(0)) for _ in entering]
        for block in above:  # all batches before the next one, so that its weights are brought once
            for place, states in enumerate(self._through(block, together)):
                together[place] = states
        for runner, input_ids, states in zip(self._runners, self._input_ids, together, strict=True):
            sums = self._criterion.sums(runner, states.split(len(input_ids)), input_ids)
            totals = [total + found for total, found in zip(totals, sums, strict=True)]
        num_tokens = sum(ids[:, self._criterion.tokens_without :].numel() for ids in self._input_ids)
        return [total / num_tokens if math.isfinite(total) else math.inf for total in totals]

    def _through(self, block: Block, entering: Sequence[Tensor]) -> Iterator[Tensor]:
        """What leaves a block, batch by batch."""
        block = block.on(self.view.device_of(block.body))
        for states in entering:
            yield _run(self._runners[0], block, states)


def _entering(runner: BlockRunner, blocks: Sequence[Block]) -> list[Tensor]:
    states = [runner.states[0]]
    for block in blocks[:-1]:
        states.append(_run(runner, block, states[-1]))
    return states


def _run(runner: BlockRunner, block: Block, states: Tensor) -> Tensor:
    states = states.to(runner.view.device_of(block.body))
    return torch.cat([runner.run(block, piece) for piece in states.split(rows_at_once(states))])
