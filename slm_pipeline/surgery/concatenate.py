"""Make one block of several by putting parts of each side by side (CoMe, arXiv 2510.15304, section "merging").

Head groups and neurons are units that a block applies independently and sums up. So a block may hold some units of one
layer and some of another; its shape stays that of the layers.

In OLMo 2 head groups are not quite independent: queries and keys are divided by their root mean square over all heads.
Each row keeps its own gain, but in a block of several layers the root mean square is that of the rows put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.merge_rules import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView, Slice


def concatenate(
    view: ModelView,
    blocks: Sequence[Block],
    *,
    heads: Sequence[Tensor],
    neurons: Sequence[Tensor],
    shares: Sequence[float],
    official_gqa: bool = False,
    fold_norm: bool = False,
) -> Block:
    """One block with the chosen units of each of ``blocks`` (adjacent, lowest first). Nothing in the model changes.

    Args:
        heads: for each block the indices of the key-value groups that it gives, ascending; as many in all as a layer
            has. A group is its keys and values with all its query heads and their output columns.
        neurons: the same for the hidden neurons of the feed-forward network.
        shares: for each block its share, summing to 1: weights of what cannot be cut (output biases, q/k norms
            that are one for all heads).
        official_gqa: pick query heads as the published code does, which gives a group the query heads of others.
        fold_norm: put each block's gains into the rows that it gives before they are taken (`folded`).

    Returns:
        A block on the lowest one's module. Norms are the plain mean of the blocks' norms, as published.
    """
    if fold_norm:
        blocks = [folded(view, block) for block in blocks]
    lowest = blocks[0]
    attention = view.attention_slices(lowest.body, tiled_queries=official_gqa)
    replaced = {piece.parameter: _gather(view, blocks, piece, heads) for piece in attention}
    replaced |= {piece.parameter: _gather(view, blocks, piece, neurons) for piece in view.mlp_slices(lowest.body)}
    norms = set(view.norm_names(lowest.body))
    for name, _ in view.layers[lowest.body].named_parameters():
        if name not in replaced:
            weights = [1 / len(blocks)] * len(blocks) if name in norms else shares
            replaced[name] = weighted_sum([block.parameter(view, name) for block in blocks], weights)
    return Block(lowest.body, replaced)


def folded(view: ModelView, block: Block) -> Block:
    """The same function, with the gain of each input norm in the projections that read it and a gain of one instead.

    Raises:
        UserError: the norms are no RMS norms right before the projections.
    """
    import torch

    architecture = view.architecture
    if not architecture.input_rms_norms:
        raise UserError(f"the norms of a {view.config.model_type} model cannot be folded: they are no input RMS norms")
    replaced = dict(block.replaced)
    pairs = (
        (architecture.attention_norms, architecture.attention_inputs),
        (architecture.mlp_norms, architecture.mlp_inputs),
    )
    for norms, projections in pairs:
        weight = block.parameter(view, f"{norms[0]}.weight")
        gain = weight.float() + architecture.gain_offset
        for name in (f"{projection}.weight" for projection in projections):
            matrix = block.parameter(view, name)
            replaced[name] = (matrix.float() * gain).to(matrix.dtype)
        replaced[f"{norms[0]}.weight"] = torch.full_like(weight, 1 - architecture.gain_offset)
    return Block(block.body, replaced, block.without)


def _gather(view: ModelView, blocks: Sequence[Block], piece: Slice, chosen: Sequence[Tensor]) -> Tensor:
    """The chosen units' rows or columns of one parameter, those of the lowest block first in each of its parts."""
    import torch

    parameters = [block.parameter(view, piece.parameter) for block in blocks]
    device = parameters[0].device
    taken = []
    for units in piece.units:
        for parameter, indices in zip(parameters, chosen, strict=True):
            rows = units[indices].flatten().sort().values  # original order within a layer
            taken.append(parameter.index_select(piece.dim, rows.to(parameter.device)).to(device))
    return torch.cat(taken, dim=piece.dim)
