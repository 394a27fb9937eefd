"""Fold a linear map of a feed-forward network's output into its last projection (ReplaceMe, arXiv 2505.02819)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_pipeline.surgery.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView


def fold(view: ModelView, block: Block, transform: Tensor) -> Block:
    """The block whose feed-forward output m (a row) is m @ ``transform``. Nothing in the model changes.

    Args:
        transform: [d, d] float; computed with in float32, kept in the parameters' own dtype. The architecture must
            have no norm between the projection and the residual stream.
    """
    name = view.architecture.mlp_output
    weight = block.parameter(view, f"{name}.weight")
    transform = transform.to(weight.device).float()
    replaced = {**block.replaced, f"{name}.weight": (transform.T @ weight.float()).to(weight.dtype)}
    if view.mlp_output(block.body).bias is not None:
        bias = block.parameter(view, f"{name}.bias")
        replaced[f"{name}.bias"] = (bias.float() @ transform).to(bias.dtype)
    return Block(block.body, replaced, block.without)
