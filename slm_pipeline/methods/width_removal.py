"""Base of the methods that remove heads and neurons, each by a score of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import Range
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import ProtectsEnds, PruningProblem
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.allocation import Units
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.ops import LayerSize

CHOICES = {"allocation": ("uniform", "global"), "export": ("stock", "custom"), "sublayers": ("both", *SUBLAYERS)}


@dataclass(kw_only=True)
class WidthRemoval(ProtectsEnds):
    """Removes key-value groups, each with all its query heads, and neurons. All layers stay, and keep one of each.

    A target of parameters is met within one unit: one neuron of every layer with ``allocation=uniform``, one head or
    neuron else. Constants that stand for what is gone are counted. One of layers, as `pruning_ratio` has it by default,
    is as many parameters as that many layers have, so that rows of depth and width methods are of one size.

    Scores in the plan: widths, for each layer the heads and neurons that it keeps; massive, [layer, neuron] of those
    that were kept for what they write.
    """

    # uniform | global: the same number from every layer, or the lowest scores of the whole model, standardised within
    # each sublayer.
    allocation: str
    # stock | custom: stock is an error unless the dense model's class can say it: one width for all layers, and heads
    # that are rounded up to a number that it takes (Llama: a divisor of the hidden size). custom: what the scores say;
    # a checkpoint may bring a modelling file and load with trust_remote_code=True only.
    export: str
    sublayers: str = "both"  # both | attention | mlp: what may become narrower
    # Ours: neurons that write more than so many times the mean energy of their layer's stay. A few in the first layers
    # make the massive activations, and a model without them is ruined. null: off.
    massive: Annotated[float, Range(above=0, at_most=1e6)] | None = 100.0

    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, allowed in CHOICES.items():
            if getattr(self, option) not in allowed:
                raise UserError(f"method.{option}={getattr(self, option)!r} is not one of {', '.join(allowed)}")

    def unit_scores(
        self, problem: PruningProblem, layers: Sequence[int], parts: Sequence[str]
    ) -> dict[str, list[Tensor]]:
        """sublayer -> for each of ``layers`` the [n] importance of its key-value groups or neurons, on the CPU; the
        lowest go first.

        Unless a method says otherwise that of `channel_scores`, standardised, and of a group the mean over its
        channels.
        """
        return {part: [self._of_channels(problem, layer, part) for layer in layers] for part in parts}

    def channel_scores(self, weight: Tensor, mean: Tensor, variance: Tensor, sublayer: str) -> Tensor:
        """[n] importance of a last projection's inputs, where that of units is made of it.

        Args:
            weight: [d, n] float32, of the projection.
            mean, variance: [n] of its inputs, over all calibration tokens.
            sublayer: attention | mlp.
        """
        raise NotImplementedError(f"method={self.name} scores neither units nor channels")

    def constant(self, weight: Tensor, mean: Tensor, gone: Tensor) -> Tensor | None:
        """[d] that the projection adds for its inputs ``gone`` (indices), or None."""
        return None

    @property
    def adds_constants(self) -> bool:
        return False

    def check(self, context: Context) -> None:
        super().check(context)
        if self.export == "stock":
            for said, is_so in (("allocation=global", self.allocation == "global"), ("protect_*", self.num_protected)):
                if is_so:
                    raise UserError(
                        f"method.{said} leaves layers of different widths, which a checkpoint of the dense model's"
                        " class cannot have; use method.export=custom"
                    )

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        from slm_pipeline.surgery.apply import layer_sizes

        sizes = layer_sizes(problem.view)
        self._check_constants(problem.view)
        remove = self.parameters(problem, sizes)  # before anything is measured
        units = self.units(problem, sizes, self.unit_scores(problem, self.candidates(len(sizes)), self.parts))
        return self.width_plan(problem, sizes, units, self.chosen(problem.view, units, remove))

    @property
    def parts(self) -> list[str]:
        """The sublayers (attention, mlp) that may become narrower."""
        return [part for part in SUBLAYERS if self.sublayers in (part, "both")]

    def parameters(self, problem: PruningProblem[Layers | Parameters], sizes: Sequence[LayerSize]) -> int:
        """How many are to go.

        Raises:
            UserError: heads and neurons have fewer, as far as sizes say it.
        """
        from slm_pipeline.engine.allocation import too_many

        remove = problem.target.remove
        if isinstance(problem.target, Layers):
            remove = remove * sum(size.whole for size in sizes) // len(sizes)
        most = 0
        for size in (sizes[layer] for layer in self.candidates(len(sizes))):
            most += (size.heads - 1) * size.per_head if "attention" in self.parts else 0
            most += (size.neurons - 1) * size.per_neuron if "mlp" in self.parts else 0
        if remove > most:
            raise too_many(remove, most)
        return remove

    def chosen(self, view: ModelView, units: Mapping[str, list[Units]], remove: int) -> dict[str, list[Tensor]]:
        """sublayer -> for each candidate layer the indices of the units that stay."""
        from slm_pipeline.engine.allocation import evenly, lowest

        if self.allocation == "global":
            found = lowest([of for part in self.parts for of in units[part]], remove)
            number = len(found) // len(self.parts)
            return {part: found[i * number : (i + 1) * number] for i, part in enumerate(self.parts)}
        is_allowed = view.allows_kv_heads if self.export == "stock" else lambda _: True
        of_heads, of_neurons = evenly(units.get("attention", []), units.get("mlp", []), remove, is_allowed)
        return {part: {"attention": of_heads, "mlp": of_neurons}[part] for part in self.parts}

    def _check_constants(self, view: ModelView) -> None:
        outputs = {"attention": view.attention_output(0), "mlp": view.mlp_output(0)}
        found = [output.bias for part, output in outputs.items() if self.sublayers in (part, "both")]
        if self.export == "stock" and self.adds_constants and any(bias is None for bias in found):
            raise UserError(
                f"method.bias=true adds a bias to projections that have none in a {view.config.model_type} model; use"
                " method.bias=false or method.export=custom"
            )

    def units(
        self, problem: PruningProblem, sizes: Sequence[LayerSize], scores: Mapping[str, list[Tensor]]
    ) -> dict[str, list[Units]]:
        """sublayer -> for each candidate layer its units; ``scores`` are those of `unit_scores`.

        Raises:
            UserError: a score is not finite.
        """
        layers = self.candidates(len(sizes))
        return {
            part: [self._units(problem, sizes[layer], layer, part, of) for layer, of in zip(layers, found, strict=True)]
            for part, found in scores.items()
        }

    def _units(self, problem: PruningProblem, size: LayerSize, layer: int, part: str, scores: Tensor) -> Units:
        import torch

        from slm_pipeline.engine.allocation import Units

        if not bool(scores.isfinite().all()):
            raise UserError(
                f"method={self.name}: the {part} scores of layer {layer} are not finite; try model.dtype=float32"
            )
        fixed = torch.zeros(len(scores), dtype=torch.bool)
        is_bias = self.adds_constants
        if part == "attention":
            return Units(scores, size.per_head, size.attention_bias if is_bias else 0, fixed)
        if self.massive is not None:
            weight, mean, variance = inputs_of(problem, layer, part)
            energy = (variance + mean.square()) * weight.square().sum(dim=0)
            fixed = (energy > self.massive * energy.mean()).cpu()
        return Units(scores, size.per_neuron, size.mlp_bias if is_bias else 0, fixed)

    def _of_channels(self, problem: PruningProblem, layer: int, part: str) -> Tensor:
        scores = standardised(self.channel_scores(*inputs_of(problem, layer, part), part))
        return scores.view(problem.view.num_units(layer, part), -1).mean(dim=1).cpu()

    def width_plan(
        self,
        problem: PruningProblem,
        sizes: Sequence[LayerSize],
        units: Mapping[str, list[Units]],
        chosen: Mapping[str, list[Tensor]],
    ) -> Plan:
        """The plan by which the candidate layers keep the units ``chosen``."""
        layers = self.candidates(len(sizes))
        kept = {part: dict(zip(layers, of, strict=True)) for part, of in chosen.items()}
        tensors: dict[str, Any] = {}
        ops: list[Resize] = []
        widths: list[list[int]] = []
        names = {"attention": "heads", "mlp": "neurons"}
        for layer, size in enumerate(sizes):
            name, left, biases = f"resize.{layer}", {"heads": size.heads, "neurons": size.neurons}, []
            changed: dict[str, int] = {}
            for part, unit in names.items():
                stay = kept.get(part, {}).get(layer)
                if stay is None or len(stay) == left[unit]:
                    continue
                if (constant := self._constant(problem, layer, part, stay, left[unit])) is not None:
                    biases.append(part)
                    tensors[f"{name}.{part}_bias"] = constant.cpu().numpy()
                changed[unit] = left[unit] = len(stay)
                tensors[f"{name}.{unit}"] = stay.numpy()
            if changed:
                ops.append(Resize((layer,), name, **changed, biases=tuple(biases) or None))
            widths.append([left["heads"], left["neurons"]])
        fixed = {layer: of.fixed.nonzero().flatten() for layer, of in zip(layers, units.get("mlp", []), strict=False)}
        massive = [[layer, int(neuron)] for layer, neurons in fixed.items() for neuron in neurons]
        return self.new_plan(problem, ops=ops, tensors=tensors, scores={"widths": widths, "massive": massive})

    def _constant(self, problem: PruningProblem, layer: int, part: str, stay: Tensor, number: int) -> Tensor | None:
        import torch

        weight, mean, _ = inputs_of(problem, layer, part)
        gone = torch.ones(number, dtype=torch.bool)
        gone[stay] = False
        channels = gone.repeat_interleave(len(mean) // number).nonzero().flatten().to(weight.device)
        return self.constant(weight, mean, channels)


def inputs_of(problem: PruningProblem, layer: int, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """A sublayer's last projection [d, n], and the mean and the variance [n] of its inputs; float32, on one device."""
    view, statistics = problem.view, problem.statistics
    is_attention = part == "attention"
    weight = view.output(layer, part).weight.detach().float()
    mean = statistics.attention_mean if is_attention else statistics.mlp_mean
    variance = statistics.attention_variance if is_attention else statistics.mlp_variance
    return weight, mean[layer].to(weight.device), variance[layer].to(weight.device)


def standardised(scores: Tensor) -> Tensor:
    """[n] float, of mean 0 and standard deviation 1; zeros where all are alike."""
    import torch

    return (scores - scores.mean()) / scores.std().clamp_min(torch.finfo(scores.dtype).tiny)
