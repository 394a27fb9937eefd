"""Shortened LLaMA: rank all layers once by perplexity, Taylor salience or magnitude, and remove the lowest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from slm_pipeline.config.ranges import NumLayersOrZero, Range
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, LayerRemoval, PruningProblem
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.view import ModelView


@dataclass(kw_only=True)
class ShortenedLlama(LayerRemoval):
    """Shortened LLaMA, arXiv 2402.02834, section 3. One-shot ranking, lowest first.

    The authors' "plus" heuristic keeps the first four and the last two layers; their code applies it to every
    criterion, so it is the default here too. ``protect_first=0 protect_last=0`` switches it off.
    """

    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)
    removes_by_order: ClassVar[bool] = True

    protect_first: NumLayersOrZero = 4
    protect_last: NumLayersOrZero = 2
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 128))


@dataclass(kw_only=True)
class ShortenedPerplexity(ShortenedLlama):
    """A layer's score is the language-model loss without it, all candidates in one walk up the stack.

    Scores in the plan: losses in nats per token without each unprotected layer (null for protected ones).
    """

    name: ClassVar[str] = "shortened_ppl"
    streams: ClassVar[bool] = True
    shares_samples: ClassVar[bool] = True
    min_seq_len: ClassVar[int] = 2

    def memory(self, sizes: Sizes) -> int:
        return sizes.walking(sizes.layers)

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        from slm_pipeline.engine.walk import Removal, RemovalWalk

        walk = RemovalWalk(problem.view, problem.input_ids)
        candidates = [Removal(layer) for layer in self.candidates(problem.view.num_layers)]
        losses = {candidate.layer: loss for candidate, loss in walk.losses(candidates).items()}
        removed = self.first_of(sorted(losses, key=lambda layer: losses[layer]), problem)
        finite = {layer: loss for layer, loss in losses.items() if loss < float("inf")}
        if len(finite) < len(removed):
            raise UserError(
                f"the loss is finite without {len(finite)} of the layers only, {len(removed)} are to go: the model"
                " overflows in its dtype; try model.dtype=bfloat16 or model.dtype=float32"
            )
        scores = [finite.get(layer) for layer in range(problem.view.num_layers)]
        return self.removal_plan(
            problem, removed, {"losses": scores, "num_block_evaluations": walk.num_block_evaluations}
        )


@dataclass(kw_only=True)
class ShortenedTaylor(ShortenedLlama):
    """A layer's score is the sum of |weight x gradient| over its matrices and norms; biases are left out, as published.

    The gradient is that of the mean loss over all samples in one backward pass, so that it is summed before the
    absolute value is taken, as published. It is reduced and freed parameter by parameter: the memory needed is the
    weights, one gradient, and the activations.

    Scores in the plan: salience of every layer.
    """

    name: ClassVar[str] = "shortened_taylor"
    min_seq_len: ClassVar[int] = 2

    def memory(self, sizes: Sizes) -> int:
        """The way back from all samples, and a matrix with its gradient in float32."""
        return sizes.backward(sizes.tokens) + 16 * sizes.hidden * sizes.neurons

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        salience = taylor_salience(problem.view, problem.input_ids)
        return self.removal_plan(problem, self.lowest_first(problem, salience), {"salience": salience})


@dataclass(kw_only=True)
class ShortenedMagnitude(ShortenedLlama):
    """A layer's score is the sum of |weight| ** power over its matrices and norms. Looks at no text.

    Scores in the plan: magnitude of every layer.
    """

    power: Annotated[int, Range(at_least=1, at_most=2)] = 1  # of |weight|

    name: ClassVar[str] = "shortened_magnitude"
    streams: ClassVar[bool] = True

    @property
    def reads_calibration(self) -> bool:
        return False

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        magnitude = [
            sum(
                float(parameter.detach().float().abs().pow(self.power).sum())
                for parameter in scored(problem.view, layer)
            )
            for layer in range(problem.view.num_layers)
        ]
        return self.removal_plan(problem, self.lowest_first(problem, magnitude), {"magnitude": magnitude})


def scored(view: ModelView, layer: int) -> list[Tensor]:
    """The parameters of a block that count: its matrices and its norms' weights, no biases."""
    parameters = view.layers[layer].named_parameters()
    return [parameter for name, parameter in parameters if not name.endswith("bias")]


def taylor_salience(view: ModelView, input_ids: Tensor) -> list[float]:
    """Sum of |w x dL/dw| over each block's scored parameters; L is the mean next-token loss over all samples."""
    from slm_pipeline.engine.gradients import of_parameters

    layer_of = {parameter: layer for layer in range(view.num_layers) for parameter in scored(view, layer)}
    salience = [0.0] * view.num_layers

    def reduce(parameter: Tensor, gradient: Tensor) -> None:
        salience[layer_of[parameter]] += float((parameter.detach().float() * gradient.float()).abs().sum())

    of_parameters(view, input_ids, layer_of, reduce)
    return salience
