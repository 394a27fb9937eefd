"""Fold a linear map of a feed-forward network's output into its last projection (ReplaceMe, arXiv 2505.02819)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView


def fold(view: ModelView, block: Block, transform: Tensor) -> Block:
    """The block whose feed-forward output m (a row) is m @ ``transform``. Nothing in the model changes.

    Args:
        transform: [d, d] float; computed with in float32, kept in the parameters' own dtype.

    Raises:
        UserError: a norm stands between the projection and the residual stream, or the width is another.
    """
    name = view.architecture.mlp_output
    if view.architecture.output_norms:
        raise UserError(
            f"a linear map cannot be folded into layer {block.body}: in a {view.config.model_type} model a norm follows"
            " the last projection"
        )
    weight = block.parameter(view, f"{name}.weight")
    if transform.shape != (len(weight), len(weight)):
        raise UserError(
            f"the linear map for layer {block.body} is {tuple(transform.shape)}, the states {len(weight)} wide"
        )
    transform = transform.to(weight.device).float()
    replaced = {**block.replaced, f"{name}.weight": (transform.T @ weight.float()).to(weight.dtype)}
    if view.mlp_output(block.body).bias is not None:
        bias = block.parameter(view, f"{name}.bias")
        replaced[f"{name}.bias"] = (bias.float() @ transform).to(bias.dtype)
    return Block(block.body, replaced, block.without)
