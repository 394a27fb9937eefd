"""Rules that turn a window of consecutive blocks into one block.

Let theta_l .. theta_h be the projection matrices of the window, l the lowest layer (input side), h the highest.

    official         theta_h under the norms of layer l. What the SLM and LaCo authors released: their loop subtracts
                     the running value instead of the base, so the sum telescopes to the highest layer. No averaging
                     happens.
    base_difference  theta_l + sum_k (theta_k - theta_l), the formula in the SLM paper's figure. It equals `official`
                     for a window of two layers; its weights sum to 1, but the base gets -(h - l - 1).
    mean             the true average.
    keep_lowest      layer l as it is.
    keep_highest     layer h as it is, with its own norms.

All but `keep_highest` keep the norms of layer l. Projection biases, q/k norms and the layer type follow the
projections: those of layer h for `official` and `keep_highest`, of layer l otherwise.
Source: arXiv 2502.19159, method figure and released code; arXiv 2402.11187 (LaCo).

`weighted` (MKA, arXiv 2406.16330) is not one of these: it needs a share for each block, and mixes norms and biases too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView

RULES = ("official", "base_difference", "mean", "keep_lowest", "keep_highest")


def merge(view: ModelView, blocks: Sequence[Block], rule: str) -> Block:
    """Merge adjacent blocks, lowest first, into one. Nothing in the model changes.

    Only `mean` and `base_difference` compute new tensors: in float32, returned in the parameters' own dtype.

    Raises:
        UserError: ``rule`` is not one of `RULES`.
    """
    lowest, highest = blocks[0], blocks[-1]
    if rule == "official":
        norms = {name: lowest.parameter(view, name) for name in view.norm_names(lowest.body)}
        return Block(highest.body, {**highest.replaced, **norms})
    if rule == "keep_lowest":
        return lowest
    if rule == "keep_highest":
        return highest
    if rule in ("mean", "base_difference"):
        matrices = {name: _combine(view, blocks, name, rule) for name in view.matrix_names(lowest.body)}
        return Block(lowest.body, {**lowest.replaced, **matrices})
    raise UserError(f"method.merge_rule={rule!r} is not one of {', '.join(RULES)}")


def _combine(view: ModelView, blocks: Sequence[Block], name: str, rule: str) -> Tensor:
    matrices = [block.parameter(view, name) for block in blocks]
    base = matrices[0].float()
    if rule == "mean":
        total = sum((matrix.to(base.device).float() for matrix in matrices[1:]), base) / len(matrices)
    else:
        total = sum((matrix.to(base.device).float() - base for matrix in matrices[1:]), base)
    return total.to(matrices[0].dtype)


def weighted(view: ModelView, blocks: Sequence[Block], shares: Sequence[float]) -> Block:
    """Adjacent blocks, lowest first, as one whose every parameter is the sum of theirs, weighted by ``shares``.

    Layer type and module are those of the lowest. Nothing in the model changes.
    """
    lowest = blocks[0]
    names = [name for name, _ in view.layers[lowest.body].named_parameters()]
    sums = {name: weighted_sum([block.parameter(view, name) for block in blocks], shares) for name in names}
    return Block(lowest.body, sums)


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of ``weights`` times ``values``, in float32, returned in the first one's dtype and on its device."""
    total = values[0].float() * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + weight * value.to(total.device).float()
    return total.to(values[0].dtype)
