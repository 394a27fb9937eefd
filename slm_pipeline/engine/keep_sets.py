"""Losses of a model that keeps only some of its blocks, for many choices of blocks in one walk up the stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, rows_at_once
from slm_pipeline.surgery.block import Block


@torch.no_grad()
def keep_set_losses(runner: BlockRunner, keep_sets: Sequence[Sequence[int]], input_ids: Tensor) -> Tensor:
    """Next-token losses of each sequence under each keep-set, summed over the sequence's tokens.

    What enters a block depends only on which blocks below it are kept. So keep-sets that agree so far share a state,
    each block runs once, on all distinct states that enter it, and the dense model's own states are not made again.

    Args:
        runner: the dense model on ``input_ids`` ([batch, length]).
        keep_sets: indices of the blocks that are kept, ascending.

    Returns:
        [keep-sets, batch] float64, nats. A keep-set of all blocks has exactly the dense model's losses.
    """
    states: dict[tuple[int, ...], Tensor] = {(): runner.states[0]}  # by the blocks that it went through
    for layer in range(runner.view.num_layers):
        dense = tuple(range(layer))
        entering = sorted({_below(kept, layer) for kept in keep_sets if layer in kept} - {dense})
        if entering:
            device = runner.states[layer].device
            together = torch.cat([states[path].to(device) for path in entering])
            outputs = _run(runner, Block(layer), together).split(len(input_ids))
            # A view would keep the states of all of them alive.
            states |= {(*path, layer): output.clone() for path, output in zip(entering, outputs, strict=True)}
        states[tuple(range(layer + 1))] = runner.states[layer + 1]
        states = {path: states[path] for path in {_below(kept, layer + 1) for kept in keep_sets}}
    return torch.stack([runner.losses(states[tuple(kept)], input_ids) for kept in keep_sets])


def _below(kept: Sequence[int], layer: int) -> tuple[int, ...]:
    return tuple(index for index in kept if index < layer)


def _run(runner: BlockRunner, block: Block, states: Tensor) -> Tensor:
    return torch.cat([runner.run(block, piece) for piece in states.split(rows_at_once(states))])
