"""Fisher masks: remove the heads and neurons whose masks have the least Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.methods.base import CalibrationSize, PruningProblem
from slm_pipeline.methods.mask_tuning import MaskTuning
from slm_pipeline.methods.narrowed import Narrowed, Place
from slm_pipeline.surgery.ops.base import SUBLAYERS

if TYPE_CHECKING:
    from slm_pipeline.engine.allocation import Units
    from slm_pipeline.models.sizes import Sizes


@dataclass(kw_only=True)
class FisherMask(MaskTuning):
    """Kwon et al., arXiv 2204.00656: search, rearrangement and tuning of masks on heads and neurons.

    A mask is a factor of 1 on what a key-value group, with its query heads, or a neuron hands to the last projection.
    Its Fisher information is the sum over samples of (dL / dmask)^2, with L the sample's mean next-token loss. For
    every number of heads, the lowest of the whole model and as many of the lowest neurons go as the target needs, and
    the number that costs least is taken (``search``). Within each sublayer as many others go if they cost less
    together, by the Fisher information of all products (``rearrangement``). What stays is scaled (``tuning``, see
    `MaskTuning`).

    Departures from the published code, besides those of the tuning:
        - the target is a number of parameters; there of multiply-accumulates or of milliseconds;
        - gradients are of single samples, as the paper has it; there of batches of 32;
        - a language model's loss, and key-value groups, in the place of BERT's tasks and heads;
        - each sublayer keeps a unit, and neurons that make massive activations stay (``massive``);
        - ``allocation=uniform``, ``sensitivity`` and ``multiple_of`` are not theirs; neurons that can only go together
          are searched by the mean of their scores.
    """

    allocation: str = "global"
    export: str = "custom"
    search: bool = True  # false: the lowest of heads and neurons alike, whatever their size
    rearrangement: bool = True
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(128, 128))

    name: ClassVar[str] = "fisher_mask"
    min_seq_len: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation != "global":
            self.refuse_unused(f"with method.allocation={self.allocation}", "search")

    def memory(self, sizes: Sizes) -> int:
        """The way back from a sample, or the tuning, which comes later."""
        return max(super().memory(sizes), sizes.backward(sizes.seq_len))

    def scored(self, problem: PruningProblem, units: Mapping[Place, Units]) -> dict[Place, Units]:
        """With their Fisher information, and with the gradients that it is made of: `Masks`."""
        from slm_pipeline.engine.gradients import of_gates
        from slm_pipeline.engine.mask_search import Masks

        gradients = of_gates(problem.view, problem.input_ids, [*units])
        scores = {place: of.double().square().sum(dim=0).float() for place, of in gradients.items()}
        return {
            place: Masks(**vars(of), gradients=gradients[place])
            for place, of in self.with_scores(units, scores).items()
        }

    def allocate(
        self, problem: PruningProblem, units: Mapping[Place, Units], remove: int
    ) -> tuple[dict[Place, int], dict[str, Any]]:
        from slm_pipeline.engine.mask_search import search

        if self.allocation != "global" or not self.search:
            return super().allocate(problem, units, remove)
        heads, neurons = ({place: of for place, of in units.items() if place[1] == part} for part in SUBLAYERS)
        of_heads, of_neurons = search([*heads.values()], [*neurons.values()], remove)
        return dict(zip((*heads, *neurons), (*of_heads, *of_neurons), strict=True)), {}

    def narrowed(self, problem: PruningProblem, units: Mapping[Place, Units], place: Place, number: int) -> Narrowed:
        from slm_pipeline.engine.mask_search import Masks, rearrange

        of = units[place]
        stay = of.after(number)
        if self.rearrangement:
            assert isinstance(of, Masks)
            stay = rearrange(stay, of.gradients, of.fixed)
        return Narrowed(stay)
