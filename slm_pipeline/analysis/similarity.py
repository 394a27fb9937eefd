"""Layer similarity: how alike the residual streams after different blocks are."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from slm_pipeline.engine.blocks import BlockRunner, batches
from slm_pipeline.models.view import ModelView

_MAX_BATCH_TOKENS = 2048  # states of all layers are normalised in float32 at once


@torch.no_grad()
def block_cosines(view: ModelView, input_ids: Tensor) -> Tensor:
    """Cosine between residual states, per token, averaged over tokens.

    Args:
        input_ids: [N, length] int64.

    Returns:
        [L + 1, L + 1] float32 on the CPU, in [-1, 1]; index 0 is the embedding output, index i the output of block
        i - 1. The last is taken before the final norm.
    """
    total = torch.zeros(view.num_layers + 1, view.num_layers + 1, dtype=torch.float64)
    for batch in tqdm(batches(input_ids, _MAX_BATCH_TOKENS), desc="layer similarity", disable=None):
        states = BlockRunner(view, batch).states
        rows = [torch.nn.functional.normalize(state.float(), dim=-1).flatten() for state in states]
        stacked = torch.stack([row.to(rows[0].device) for row in rows])
        total += (stacked @ stacked.T).double().cpu()
    return (total / input_ids.numel()).float()
