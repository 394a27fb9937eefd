"""Scores of a stack that is merged step by step, renewed from the merged block upward only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import batches, dense_pass
from slm_pipeline.engine.statistics import ChannelMoments
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block

MAX_BATCH_TOKENS = 4096


@dataclass
class BlockScores:
    """What one block of the current stack does to the calibration text, over all tokens.

    Attributes:
        influence: mean of 1 - cos(before, after), the cosine clipped to [0, 1].
        attention_mean_abs: [heads x head_dim] mean |input| of the attention's output projection.
        mlp_mean_abs: [intermediate size] the same of the feed-forward's.
    """

    influence: float
    attention_mean_abs: Tensor
    mlp_mean_abs: Tensor


class ProgressiveStack:
    """The current stack of blocks with its states and scores on the calibration text.

    Args:
        view: the dense model; never changed.
        input_ids: [N, length] int64.

    Attributes:
        blocks: the current stack, input side first.
        scores: for each of them, as far as they are up to date.
        num_block_evaluations: blocks run on all samples, the dense pass not counted.
    """

    def __init__(self, view: ModelView, input_ids: Tensor):
        self.view = view
        self.blocks = [Block(layer) for layer in range(view.num_layers)]
        self.num_block_evaluations = 0
        self._num_tokens = input_ids.numel()
        self._input_ids = batches(input_ids.to(view.device), MAX_BATCH_TOKENS)
        with self._moments(range(view.num_layers)) as moments:
            self._runners = dense_pass(view, self._input_ids)
        self._states = [runner.states for runner in self._runners]  # what enters each block, and what leaves the last
        self.scores = [self._scores(position, *moments[position]) for position in range(view.num_layers)]

    def run_distance(self, position: int, length: int, *, last_token_only: bool = False) -> float:
        """arccos(cos(before, after)) / pi of a run of ``length`` blocks, cosine clipped to [0, 1], mean over tokens."""
        total, count = 0.0, 0
        for states in self._states:
            before, after = states[position], states[position + length]
            if last_token_only:
                before, after = before[:, -1:], after[:, -1:]
            cosines = torch.cosine_similarity(before.float(), after.to(before.device).float(), dim=-1).clamp(0, 1)
            total += float(cosines.arccos().sum()) / math.pi
            count += cosines.numel()
        return total / count

    def merge(self, position: int, length: int, merged: Block) -> None:
        """Put ``merged`` in the place of ``length`` blocks; states and scores from there up are gone until `renew`."""
        self.blocks[position : position + length] = [merged]
        del self.scores[position:]
        for states in self._states:
            del states[position + 1 :]

    @torch.no_grad()
    def loss(self, position: int, length: int, candidate: Block) -> float:
        """Mean next-token loss in nats if ``candidate`` stood for ``length`` blocks from ``position`` on."""
        total = 0.0
        for runner, states, input_ids in zip(self._runners, self._states, self._input_ids, strict=True):
            hidden = states[position]
            for block in [candidate, *self.blocks[position + length :]]:
                hidden = runner.run(block, hidden)
            total += runner.loss(hidden, input_ids)
        self.num_block_evaluations += len(self.blocks) - length - position + 1
        return total / (self._num_tokens - sum(len(batch) for batch in self._input_ids))

    @torch.no_grad()
    def renew(self) -> None:
        """Run and score the blocks that have no scores."""
        for position in range(len(self.scores), len(self.blocks)):
            block = self.blocks[position]
            with self._moments([block.body]) as moments:
                for runner, states in zip(self._runners, self._states, strict=True):
                    states.append(runner.run(block, states[position]))
            self.scores.append(self._scores(position, *moments[block.body]))
            self.num_block_evaluations += 1

    @contextmanager
    def _moments(self, bodies: Iterable[int]) -> Iterator[dict[int, tuple[ChannelMoments, ChannelMoments]]]:
        """Watch the inputs of the attention's and the feed-forward's last projection of some dense blocks."""
        moments = {body: (ChannelMoments(), ChannelMoments()) for body in bodies}
        hooks = []
        try:
            for body, (attention, mlp) in moments.items():
                hooks.append(self.view.attention_output(body).register_forward_pre_hook(attention.observe))
                hooks.append(self.view.mlp_output(body).register_forward_pre_hook(mlp.observe))
            yield moments
        finally:
            for hook in hooks:
                hook.remove()

    def _scores(self, position: int, attention: ChannelMoments, mlp: ChannelMoments) -> BlockScores:
        influence = 0.0
        for states in self._states:
            before, after = states[position], states[position + 1]
            cosines = torch.cosine_similarity(before.float(), after.to(before.device).float(), dim=-1)
            influence += float((1 - cosines.clamp(0, 1)).sum())
        return BlockScores(influence / self._num_tokens, attention.mean_abs, mlp.mean_abs)
