"""Head importance: remove the heads to whose gates the loss is least sensitive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.methods.base import CalibrationSize, PruningProblem
from slm_pipeline.methods.narrowed import Place
from slm_pipeline.methods.width_removal import WidthRemoval

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.sizes import Sizes


@dataclass(kw_only=True)
class HeadImportance(WidthRemoval):
    """Michel et al., arXiv 1905.10650, section 4.1: the mean over samples of abs(dL / dgate), with a gate of 1 on all
    that a head hands to the output projection and L the sample's next-token loss. Scores are divided by their Euclidean
    norm within each layer, and the lowest of the whole model go. Voita et al., arXiv 1905.09418, put the same gates and
    train them; here nothing is trained.

    Departures from the published code:
        - the absolute value is that of a sample's gradient, as the paper has it; there that of each token's share;
        - the last layer is treated as the others; there it is divided by another number;
        - the unit is a key-value group, whose gate is on all its query heads;
        - a layer keeps a head; there it may lose all;
        - ``sublayers=both`` and ``mlp`` put gates on neurons too.

    Attention is less than a third of most models: a high ratio is out of reach for heads alone.
    """

    allocation: str = "global"
    export: str = "custom"
    sublayers: str = "attention"
    normalize: bool = True  # divide by the norm within each layer, as published; false: compare raw sensitivities
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(128, 128))

    name: ClassVar[str] = "head_importance"
    min_seq_len: ClassVar[int] = 2

    def memory(self, sizes: Sizes) -> int:
        return super().memory(sizes) + sizes.backward(sizes.seq_len)

    def unit_scores(self, problem: PruningProblem, places: Sequence[Place]) -> dict[Place, Tensor]:
        import torch

        from slm_pipeline.engine.gradients import of_gates

        found = of_gates(problem.view, problem.input_ids, places)
        scores = {place: of.abs().mean(dim=0) for place, of in found.items()}
        if not self.normalize:
            return scores
        tiny = torch.finfo(torch.float32).tiny
        return {place: of / of.norm().clamp_min(tiny) for place, of in scores.items()}
