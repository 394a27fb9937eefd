"""Fisher masks: remove the heads and neurons whose masks have the least Fisher information."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.methods.base import CalibrationSize, PruningProblem
from slm_pipeline.methods.mask_tuning import MaskTuning
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.surgery.ops import LayerSize


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
        - ``allocation=uniform`` is not theirs: every layer loses as many, of the lowest.
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
        if self.allocation == "uniform":
            self.refuse_unused("with method.allocation=uniform", "search")

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        from slm_pipeline.engine.gradients import of_gates
        from slm_pipeline.engine.mask_search import rearrange, search
        from slm_pipeline.surgery.apply import layer_sizes

        sizes: list[LayerSize] = layer_sizes(problem.view)
        remove = self.parameters(problem, sizes)
        gradients = of_gates(problem.view, problem.input_ids, self.candidates(len(sizes)), self.parts)
        fisher = {part: [of.double().square().sum(dim=0).float() for of in found] for part, found in gradients.items()}
        units = self.units(problem, sizes, fisher)
        if self.allocation == "global" and self.search:
            heads, neurons = units.get("attention", []), units.get("mlp", [])
            of_heads, of_neurons = search(heads, neurons, remove)
            chosen = {part: {"attention": of_heads, "mlp": of_neurons}[part] for part in self.parts}
        else:
            chosen = self.chosen(problem.view, units, remove)
        if self.rearrangement:
            chosen = {
                part: [
                    rearrange(kept, gradient, of.fixed)
                    for kept, gradient, of in zip(found, gradients[part], units[part], strict=True)
                ]
                for part, found in chosen.items()
            }
        return self.width_plan(problem, sizes, units, chosen)
