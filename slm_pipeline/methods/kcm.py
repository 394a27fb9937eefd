"""KCM: remove the neurons that others stand for and that are seldom active, without gradients and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.config.ranges import Positive
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, PruningProblem
from slm_pipeline.methods.mask_tuning import MaskTuning
from slm_pipeline.methods.narrowed import Place
from slm_pipeline.methods.width_removal import inputs_of

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.sizes import Sizes

RANKINGS = ("both", "representative", "data_driven")


@dataclass(kw_only=True)
class KCM(MaskTuning):
    """Nova et al., "Gradient-free structured pruning with unlabeled data", ICML 2023, arXiv 2303.04185.

    A neuron's score is the product of two, each brought to [0, 1] within its layer: how much of its column of the last
    projection is made of itself and not of others (R2, `engine.convex_masking`), and the norm of its activations on the
    calibration text (D2). The lowest of the whole model go, and what stays is scaled (``tuning``, see `MaskTuning`).

    No code of the authors is public, and of their paper only parts could be read: the iteration, the kernel, the
    ranges and the norm are those of a public re-implementation for BERT. Ours, besides:
        - ``sigma`` is in units of the root mean square distance between a layer's columns; there absolute, which a
          wider model's columns are too far apart for. On SmolLM2-135M the wider the kernel the worse the choice, and
          activations alone (``ranking=data_driven``) are better than both;
        - ``sublayers=both`` and ``attention`` rank the channels of heads the same way; a key-value group gets the mean;
        - each sublayer keeps a unit, and neurons that make massive activations stay (``massive``);
        - the tuning's departures.
    """

    allocation: str = "global"
    export: str = "custom"
    sublayers: str = "mlp"
    ranking: str = "both"  # both | representative | data_driven: R2 times D2, or one of them alone
    sigma: Positive = 0.3  # width of the Gaussian kernel
    tolerance: Positive = 0.01  # the shares are taken when their sum changes by less; their alpha
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(128, 128))

    name: ClassVar[str] = "kcm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranking not in RANKINGS:
            raise UserError(f"method.ranking={self.ranking!r} is not one of {', '.join(RANKINGS)}")
        if self.ranking == "data_driven":
            self.refuse_unused("with method.ranking=data_driven", "sigma", "tolerance")

    def memory(self, sizes: Sizes) -> int:
        """The kernel of a layer's neurons, their shares and two products of these, or the tuning, which comes later."""
        kernel = 0 if self.ranking == "data_driven" else 16 * sizes.neurons**2 + 8 * sizes.hidden * sizes.neurons
        return max(super().memory(sizes), kernel)

    def unit_scores(self, problem: PruningProblem, places: Sequence[Place]) -> dict[Place, Tensor]:
        return {place: self._scores(problem, *place) for place in places}

    def _scores(self, problem: PruningProblem, layer: int, part: str) -> Tensor:
        import torch

        from slm_pipeline.engine.convex_masking import representativeness

        weight, mean, variance = inputs_of(problem, layer, part)
        scores = torch.ones(problem.view.num_units(layer, part), device=weight.device)
        if self.ranking != "data_driven":
            found = representativeness(weight.T, self.sigma, self.tolerance)
            scores = scores * _from_0_to_1(found.view(len(scores), -1).mean(dim=1))
        if self.ranking != "representative":
            norms = (variance + mean.square()).sqrt()
            scores = scores * _from_0_to_1(norms.view(len(scores), -1).mean(dim=1))
        return scores.cpu()


def _from_0_to_1(scores: Tensor) -> Tensor:
    """[n] float, the least 0 and the largest 1."""
    import torch

    lowest, highest = scores.min(), scores.max()
    return (scores - lowest) / (highest - lowest).clamp_min(torch.finfo(scores.dtype).tiny)
