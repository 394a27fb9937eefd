"""How far the model's predictions move when one layer alone is another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, batches, rows_at_once
from slm_pipeline.engine.criteria import kl_divergence
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block

_TEXT_TOKENS = 2048  # that all variants of a layer walk at once


class Sensitivity:
    """The dense model's states on some text, from which a variant of one layer costs that layer and those above it.

    Args:
        view: the dense model; never changed.
        input_ids: [N, length] int64 tokens.
    """

    def __init__(self, view: ModelView, input_ids: Tensor):
        self.view = view
        self._input_ids = batches(input_ids.to(view.device), _TEXT_TOKENS)
        self._runners = [BlockRunner(view, batch) for batch in self._input_ids]

    @torch.no_grad()
    def damages(self, variants: Sequence[Block]) -> list[float]:
        """Mean over tokens of the KL divergence from the dense model, in nats, when each of ``variants`` of one layer
        takes its place; infinity where it is not finite."""
        totals = [0.0] * len(variants)
        for runner, input_ids in zip(self._runners, self._input_ids, strict=True):
            states = torch.cat([_run(runner, block, runner.states[block.body]) for block in variants])
            for layer in range(variants[0].body + 1, self.view.num_layers):
                states = _run(runner, Block(layer), states)
            sums = kl_divergence(runner, states.split(len(input_ids)), input_ids)
            totals = [total + found for total, found in zip(totals, sums, strict=True)]
        num_tokens = sum(input_ids.numel() for input_ids in self._input_ids)
        return [total / num_tokens if math.isfinite(total) else math.inf for total in totals]


def _run(runner: BlockRunner, block: Block, states: Tensor) -> Tensor:
    device = runner.view.device_of(block.body)
    return torch.cat([runner.run(block, piece.to(device)) for piece in states.split(rows_at_once(states))])
