"""LLM-Pruner: remove the coupled weights whose removal changes the loss least, by its Taylor expansion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.config.ranges import NumLayersOrZero
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, PruningProblem
from slm_pipeline.methods.narrowed import Place
from slm_pipeline.methods.width_removal import WidthRemoval, standardised

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.view import ModelView, Slice

TAYLOR = ("param_first", "param_second", "vectorize")


@dataclass(kw_only=True)
class LLMPruner(WidthRemoval):
    """LLM-Pruner, arXiv 2305.11627, block-wise: weights that can only go together are scored together.

    Those of a key-value group are the rows of its keys, values and queries and the columns of its outputs; those of a
    neuron its rows of the input projections and its column of the last one. With w a weight and g its gradient of the
    mean next-token loss over all samples, a group's score is the sum of abs(w g) over its weights. The lowest go,
    as many from every layer but the first four and the last two, in one step.

    Departures from the published code:
        - no dependency graph: `ModelView` says which weights are coupled, for grouped queries and fused projections
          too, where the published code pairs queries with the wrong keys;
        - gradients are reduced to a number for each group and freed, parameter by parameter. ``param_mix`` of the
          paper, abs(w g - w^2 h / 2), needs two of them at once and is not offered;
        - ``protect_first`` and ``protect_last`` are theirs for 32 layers; there they are said as layer numbers;
        - biases are not scored, and go with their group; the published models have none;
        - ``allocation=global`` standardises scores within each sublayer; there raw ones are compared;
        - each sublayer keeps a unit, and neurons that make massive activations stay (``massive``).
    """

    allocation: str = "uniform"
    export: str = "custom"
    protect_first: NumLayersOrZero = 4
    protect_last: NumLayersOrZero = 2
    # param_first | param_second | vectorize: sums of abs(w g), of w^2 times the mean over samples of g^2, or, over the
    # rows and columns of a group, of abs(sum of w g).
    taylor: str = "param_first"
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 64))

    name: ClassVar[str] = "llm_pruner"
    min_seq_len: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taylor not in TAYLOR:
            raise UserError(f"method.taylor={self.taylor!r} is not one of {', '.join(TAYLOR)}")

    def memory(self, sizes: Sizes) -> int:
        """The way back from all samples, or from one at a time, and a matrix with its gradient in float32."""
        tokens = sizes.seq_len if self.taylor == "param_second" else sizes.tokens
        return super().memory(sizes) + sizes.backward(tokens) + 16 * sizes.hidden * sizes.neurons

    def unit_scores(self, problem: PruningProblem, places: Sequence[Place]) -> dict[Place, Tensor]:
        salience = coupled_salience(problem.view, problem.input_ids, places, self.taylor)
        if self.allocation == "uniform":
            return salience
        return {place: standardised(of) for place, of in salience.items()}


def coupled_salience(view: ModelView, input_ids: Tensor, places: Sequence[Place], taylor: str) -> dict[Place, Tensor]:
    """Of each of these sublayers the [units] float32 sums over coupled weights, on the CPU."""
    import torch

    from slm_pipeline.engine.gradients import of_parameters

    salience = {place: torch.zeros(view.num_units(*place)) for place in places}
    pieces: dict[Tensor, tuple[Tensor, Slice]] = {}
    for (layer, part), of in salience.items():
        for piece in view.attention_slices(layer) if part == "attention" else view.mlp_slices(layer):
            parameter = view.layers[layer].get_parameter(piece.parameter)
            if parameter.ndim == 2:
                pieces[parameter] = (of, piece)

    def reduce(parameter: Tensor, gradient: Tensor) -> None:
        of, piece = pieces[parameter]
        product = parameter.detach().float() * gradient.float()
        across = 1 - piece.dim
        if taylor == "param_first":
            of_channels = product.abs().sum(dim=across)
        elif taylor == "param_second":
            of_channels = product.square().sum(dim=across) / len(input_ids)
        else:
            of_channels = product.sum(dim=across).abs()
        for units in piece.units:
            of += of_channels.cpu()[units].sum(dim=1)

    for samples in input_ids.split(1 if taylor == "param_second" else len(input_ids)):
        of_parameters(view, samples, pieces, reduce)
    return salience
