"""Wanda-sp: remove the heads and neurons with the smallest weights times activations, the same share in every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.methods.base import CalibrationSize
from slm_pipeline.methods.width_removal import WidthRemoval

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class WandaSP(WidthRemoval):
    """Wanda-sp: the structured form of Wanda (arXiv 2306.11695) that FLAP (arXiv 2312.11983) compares with.

    A channel j that enters the last projection W of an attention or a feed-forward network scores
    mean_i |W_ij| * ||X_j||, with X_j its values on the calibration text; a key-value group scores the mean over the
    channels of its query heads. Every layer loses the same share of both, the lowest.

    Departures from the published code:
        - the statistics are those of the dense model, of one pass; there each layer reads what the pruned ones before
          it put out;
        - the unit of attention is a key-value group with its query heads, of any width; there a head of width 128;
        - neurons make up for heads that cannot go in part, so that the number of parameters is met;
        - neurons that make massive activations stay (``massive``); the paper says nothing of them. On SmolLM2-135M
          their norm keeps them anyway: at a tenth and a fifth of the layers the loss is the same without the option.
    """

    allocation: str = "uniform"
    export: str = "stock"
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(128, 128))

    name: ClassVar[str] = "wanda_sp"
    streams: ClassVar[bool] = True

    def channel_scores(self, weight: Tensor, mean: Tensor, variance: Tensor, sublayer: str) -> Tensor:
        """As above, with the root mean square in the place of the norm: a factor for all."""
        return weight.abs().mean(dim=0) * (variance + mean.square()).sqrt()
