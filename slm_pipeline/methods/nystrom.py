"""Nyström approximation of feed-forward networks: keep the neurons of which the others are combinations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize
from slm_pipeline.methods.layerwise import LayerwiseRemoval

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.allocation import Units


@dataclass(kw_only=True)
class Nystrom(LayerwiseRemoval):
    """The feed-forward part of MoDeGPT, arXiv 2408.09632, and it alone: attention is untouched, since what the paper
    does there changes the width of heads, which no stock class has.

    With C = X X' of the neurons' values the ridge leverage score of neuron i is the diagonal of C (C + lam I)^-1: how
    little of it is a combination of others. The highest are kept, chosen at once, and the last projection becomes
    W C_:S (C_SS)^-1.

    Departures (the paper's body could not be read; this is what re-implementations of it do):
        - lam is relative to the mean diagonal of C; the solution has the same lam, and is drawn to W by it;
        - every layer loses the same, or ``allocation=sensitivity``; there shares are a softmax of block influence;
        - ``corrected_inputs``: there the inputs are the dense model's;
        - neurons that make massive activations stay (``massive``).
    """

    sublayers: str = "mlp"
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(128, 256))

    name: ClassVar[str] = "nystrom"
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sublayers != "mlp":
            raise UserError(f"method.sublayers={self.sublayers}: nystrom narrows feed-forward networks alone; use mlp")

    def choices(self, weight: Tensor, gram: Tensor, penalty: float, units: Units, remove: int) -> list[Tensor]:
        from slm_pipeline.engine.least_squares import leverage_scores

        order = leverage_scores(gram, penalty=penalty).cpu().argsort(stable=True)
        return [order[~units.fixed[order]]]
