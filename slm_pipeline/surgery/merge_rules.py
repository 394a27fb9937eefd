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
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slm_pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView

RULES = ("official", "base_difference", "mean", "keep_lowest", "keep_highest")


@dataclass(frozen=True)
class MergedBlock:
    """A block of the dense model, some of whose parameters are replaced.

    Attributes:
        body: index of the block whose module, projections and layer type it uses.
        replaced: parameter name within the block -> tensor that stands in its place. May share memory with the
            model: copy before writing.
    """

    body: int
    replaced: dict[str, Tensor] = field(default_factory=dict)


def merge(view: ModelView, low: int, high: int, rule: str) -> MergedBlock:
    """Merge the closed window [low..high] of the dense model's blocks. Nothing in the model changes.

    Only `mean` and `base_difference` compute new tensors: in float32, returned in the parameters' own dtype.

    Raises:
        UserError: ``rule`` is not one of `RULES`.
    """
    lowest = dict(view.layers[low].named_parameters())
    if rule == "official":
        return MergedBlock(high, {name: lowest[name].detach() for name in view.norm_names(low)})
    if rule == "keep_lowest":
        return MergedBlock(low)
    if rule == "keep_highest":
        return MergedBlock(high)
    if rule in ("mean", "base_difference"):
        return MergedBlock(low, {name: _combine(view, low, high, name, rule) for name in view.matrix_names(low)})
    raise UserError(f"method.merge_rule={rule!r} is not one of {', '.join(RULES)}")


def _combine(view: ModelView, low: int, high: int, name: str, rule: str) -> Tensor:
    matrices = [view.layers[layer].get_parameter(name).detach() for layer in range(low, high + 1)]
    base = matrices[0].float()
    if rule == "mean":
        total = sum((matrix.to(base.device).float() for matrix in matrices[1:]), base) / len(matrices)
    else:
        total = sum((matrix.to(base.device).float() - base for matrix in matrices[1:]), base)
    return total.to(matrices[0].dtype)
