"""FLAP: remove the heads and neurons whose outputs fluctuate least, and add their mean as a bias."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.methods.base import CalibrationSize
from slm_pipeline.methods.width_removal import WidthRemoval

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Flap(WidthRemoval):
    """FLAP, arXiv 2312.11983: weighted input feature variance (WIFV), adaptive over layers and sublayers (AL-AM).

    A channel j that enters the last projection W of an attention or a feed-forward network scores
    Var_j * sum_i W_ij^2, with the variance over all calibration tokens; attention's scores are squared. Scores are
    standardised within each sublayer, a key-value group gets the mean over the channels of its query heads, and the
    lowest of the whole model go. What a removed channel wrote on average, W_j * mean_j, becomes a bias.

    ``allocation=uniform`` removes the same from every layer (their UL).

    Departures from the published code:
        - the variance is that around the mean of all tokens; there a running one, without the first sample;
        - the unit of attention is a key-value group with its query heads, counted by its parameters; there a head of
          width 128 that counts as 512 / 3 neurons;
        - each sublayer keeps a head or neuron; there it may lose all;
        - neurons that make massive activations stay (``massive``); the paper says nothing of them. On SmolLM2-135M its
          scores keep them anyway: at a tenth and a fifth of the layers the loss is the same without the option.
    """

    allocation: str = "global"
    export: str = "custom"
    bias: bool = True  # a constant in the place of what is gone; needs export=custom where projections have no bias
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(128, 128))

    name: ClassVar[str] = "flap"
    streams: ClassVar[bool] = True

    @property
    def adds_constants(self) -> bool:
        return self.bias

    def channel_scores(self, weight: Tensor, mean: Tensor, variance: Tensor, sublayer: str) -> Tensor:
        scores = variance * weight.square().sum(dim=0)
        return scores.square() if sublayer == "attention" else scores

    def constant(self, weight: Tensor, mean: Tensor, gone: Tensor) -> Tensor | None:
        return weight[:, gone] @ mean[gone] if self.bias else None
