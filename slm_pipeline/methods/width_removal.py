"""Base of the methods that remove heads and neurons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import Count, Range, TotalTokens
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import ProtectsEnds, PruningProblem
from slm_pipeline.methods.narrowed import Narrowed, Place, operations
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.models.sizes import MAX_LOGITS
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.allocation import Units
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.ops import LayerSize


@dataclass(kw_only=True)
class WidthRemoval(ProtectsEnds):
    """Removes key-value groups, each with all its query heads, and neurons. All layers stay, and keep one of each that
    they have.

    A target of parameters is met within one step: ``multiple_of`` neurons, of every layer with ``allocation=uniform``,
    or one head else. Constants that stand for what is gone are counted. One of layers, as `pruning_ratio` has it by
    default, is as many parameters as that many layers have, so that rows of depth and width methods are of one size.

    Scores in the plan: widths, for each layer the heads and neurons that it keeps; massive, [layer, neuron] of those
    that were kept for what they write; sensitivity, where it decided: for each sublayer what was measured, pairs of
    heads or neurons left and KL divergence (null: not finite).
    """

    # uniform | global | sensitivity: the same number from every layer; the lowest scores of the whole model,
    # standardised within each sublayer; or as many as do least damage: the KL divergence of the dense model's
    # predictions from those with one sublayer narrower is measured for a few widths of each, from half to twice the
    # share that is to go and the narrowest, and the sum of damages minimised as if they did not interact.
    allocation: str
    # stock | custom: stock is an error unless the dense model's class can say it: one width for all layers, and a
    # number of heads that it takes, see illegal_heads. custom: what the scores say; a checkpoint may bring a modelling
    # file and load with trust_remote_code=True only.
    export: str
    # round | refuse: with export=stock a number of heads that the dense model's class cannot have (Llama: that does not
    # divide the hidden size) becomes the next higher one that it can, for which neurons make up; or is an error.
    illegal_heads: str = "round"
    sublayers: str = "both"  # both | attention | mlp: what may become narrower
    multiple_of: Count = 1  # where neurons go, a multiple of it stays
    # Ours: neurons that write more than so many times the mean energy of their layer's stay. A few in the first layers
    # make the massive activations, and a model without them is ruined. null: off.
    massive: Annotated[float, Range(above=0, at_most=1e6)] | None = 100.0
    # allocation=sensitivity: tokens of the calibration text that it is measured on, the last samples, at most half.
    sensitivity_tokens: TotalTokens = 1024

    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)
    allocations: ClassVar[tuple[str, ...]] = ("uniform", "global", "sensitivity")

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "allocation": self.allocations,
            "export": ("stock", "custom"),
            "illegal_heads": ("round", "refuse"),
            "sublayers": ("both", *SUBLAYERS),
        }
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise UserError(f"method.{option}={getattr(self, option)!r} is not one of {', '.join(allowed)}")
        if self.allocation != "sensitivity":
            self.refuse_unused(f"with method.allocation={self.allocation}", "sensitivity_tokens")
        if self.sublayers == "attention":
            self.refuse_unused("with method.sublayers=attention", "multiple_of")
        if self.sublayers == "mlp":
            self.refuse_unused("with method.sublayers=mlp", "illegal_heads")
        if self.export == "custom":
            self.refuse_unused("with method.export=custom, which can have any number of heads", "illegal_heads")

    def unit_scores(self, problem: PruningProblem, places: Sequence[Place]) -> dict[Place, Tensor]:
        """Of each of these sublayers the [n] importance of its key-value groups or neurons, on the CPU; the lowest go
        first.

        Unless a method says otherwise that of `channel_scores`, standardised, and of a group the mean over its
        channels.
        """
        return {place: self._of_channels(problem, *place) for place in places}

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

    def memory(self, sizes: Sizes) -> int:
        """A last projection in float32, and its square; where damages are measured, the states of a batch of their text
        behind all layers, what leaves some variants for all of it, and pieces of logits."""
        scoring = 12 * sizes.hidden * max(sizes.neurons, sizes.queries)
        if self.allocation != "sensitivity":
            return scoring
        tokens = min(sizes.tokens, self.sensitivity_tokens)
        batch = min(tokens, sizes.batch_tokens(2048))
        states = sizes.states(batch, sizes.layers) + sizes.states(tokens, 12)
        at_once = states + sizes.running(min(8192, 4 * tokens))
        return scoring + at_once + (sizes.item_bytes + 12) * min(MAX_LOGITS, tokens * sizes.vocabulary)

    def host_memory(self, sizes: Sizes) -> int:
        """The states behind all layers of the text that damages are measured on."""
        measured = min(sizes.tokens, self.sensitivity_tokens) if self.allocation == "sensitivity" else 0
        return sizes.states(measured, sizes.layers)

    def layers_left(self, num_layers: int, target: Layers) -> int:
        return num_layers

    def check(self, context: Context) -> None:
        super().check(context)
        if context.config.model.device == "stream" and self.allocation == "sensitivity":
            raise UserError(
                "method.allocation=sensitivity runs the stack once for each sublayer, which model.device=stream cannot;"
                " use method.allocation=uniform or global"
            )
        if self.export == "stock":
            unequal = (f"allocation={self.allocation}", self.allocation != "uniform")
            for said, is_so in (unequal, ("protect_*", self.num_protected)):
                if is_so:
                    raise UserError(
                        f"method.{said} leaves layers of different widths, which a checkpoint of the dense model's"
                        " class cannot have; use method.export=custom"
                    )

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        from slm_pipeline.engine.allocation import too_many
        from slm_pipeline.surgery.apply import layer_sizes

        sizes = layer_sizes(problem.view)
        remove, units = self.parameters(problem, sizes), self._units(problem, sizes)
        self._check_constants(problem.view, units)
        if remove > (most := sum(of.most() for of in units.values())):
            raise too_many(remove, most)
        if self.illegal_heads == "refuse":
            self._check_heads(problem, units, remove)
        units = self.scored(problem, units)
        gone, of_sizes = self.allocate(problem, units, remove)
        narrowed, of_units = self.narrow(problem, units, {place: number for place, number in gone.items() if number})
        return self._width_plan(problem, sizes, units, narrowed, of_sizes | of_units)

    @property
    def parts(self) -> list[str]:
        """The sublayers (attention, mlp) that may become narrower."""
        return [part for part in SUBLAYERS if self.sublayers in (part, "both")]

    def parameters(self, problem: PruningProblem[Layers | Parameters], sizes: Sequence[LayerSize]) -> int:
        """How many are to go."""
        remove = problem.target.remove
        if isinstance(problem.target, Layers):
            remove = remove * sum(size.whole for size in sizes) // len(sizes)
        return remove

    def scored(self, problem: PruningProblem, units: Mapping[Place, Units]) -> dict[Place, Units]:
        """``units`` with the scores of `unit_scores`."""
        return self.with_scores(units, self.unit_scores(problem, [*units]))

    def with_scores(self, units: Mapping[Place, Units], scores: Mapping[Place, Tensor]) -> dict[Place, Units]:
        """``units`` with these scores.

        Raises:
            UserError: a score is not finite.
        """
        for (layer, part), of in scores.items():
            if not bool(of.isfinite().all()):
                raise UserError(
                    f"method={self.name}: the {part} scores of layer {layer} are not finite; try model.dtype=float32"
                )
        return {place: replace(of, scores=scores[place]) for place, of in units.items()}

    def allocate(
        self, problem: PruningProblem, units: Mapping[Place, Units], remove: int
    ) -> tuple[dict[Place, int], dict[str, Any]]:
        """How many units of each sublayer go, and for the plan's scores what was measured for that."""
        from slm_pipeline.engine.allocation import cheapest, lowest

        every = list(units.values())
        if self.allocation == "global":
            return dict(zip(units, lowest(every, remove), strict=True)), {}
        if self.allocation == "sensitivity":
            damages = self._damages(problem, units, remove / sum(of.most() for of in every))
            numbers = cheapest(every, [damages[place] for place in units], remove)
            left = {place: len(of.scores) for place, of in units.items()}
            said = {
                f"{layer}.{part}": [
                    [left[layer, part] - number, damage if math.isfinite(damage) else None]
                    for number, damage in damages[layer, part].items()
                ]
                for layer, part in units
            }
            return dict(zip(units, numbers, strict=True)), {"sensitivity": said}
        return self._evenly(problem, units, remove, rounds=self.export == "stock"), {}

    def _evenly(
        self, problem: PruningProblem, units: Mapping[Place, Units], remove: int, *, rounds: bool
    ) -> dict[Place, int]:
        """As many from every layer; ``rounds``: so that as many heads stay as the dense model's class can have."""
        from slm_pipeline.engine.allocation import evenly

        of_part = {part: [of for (_, own), of in units.items() if own == part] for part in SUBLAYERS}
        is_allowed = problem.view.allows_kv_heads if rounds else lambda _: True
        number_of = dict(zip(SUBLAYERS, evenly(of_part["attention"], of_part["mlp"], remove, is_allowed), strict=True))
        return {(layer, part): number_of[part] for layer, part in units}

    def _check_heads(self, problem: PruningProblem, units: Mapping[Place, Units], remove: int) -> None:
        """Raise `UserError` if the dense model's class cannot have the number of heads that would stay."""
        view = problem.view
        for (layer, part), gone in self._evenly(problem, units, remove, rounds=False).items():
            number = view.num_units(layer, part)
            if part == "attention" and not view.allows_kv_heads(number - gone):
                legal = ", ".join(str(groups) for groups in range(1, number + 1) if view.allows_kv_heads(groups))
                raise UserError(
                    f"method.illegal_heads=refuse: {number - gone} of {number} key-value groups would stay in each"
                    f" layer, which a {view.config.model_type} model cannot have, only {legal}; ask for another"
                    " pruning_ratio, or take method.illegal_heads=round or method.export=custom"
                )

    def _damages(
        self, problem: PruningProblem, units: Mapping[Place, Units], share: float
    ) -> dict[Place, dict[int, float]]:
        """For each sublayer: how many units are gone -> KL divergence in nats a token with that alone, for a few
        numbers around the ``share`` that is to go of all that may.

        The last samples of the calibration text measure, at most half of them; what is fitted is fitted on the others.
        """
        from slm_pipeline.engine.sensitivity import Sensitivity
        from slm_pipeline.surgery.block import Block

        input_ids = problem.input_ids
        number = min(-(-self.sensitivity_tokens // input_ids.shape[1]), -(-len(input_ids) // 2))
        fitting = replace(problem, input_ids=input_ids[: len(input_ids) - number] if len(input_ids) > 1 else input_ids)
        sensitivity = Sensitivity(problem.view, input_ids[len(input_ids) - number :])
        levels = {place: of.levels(share) for place, of in units.items()}
        damages: dict[Place, dict[int, float]] = {place: {} for place in units}
        for place, variants in self.variants(
            fitting, units, {place: found for place, found in levels.items() if found}
        ):
            blocks = (variant.put(problem.view, Block(place[0]), place[1]) for variant in variants)
            damages[place] = dict(zip(levels[place], sensitivity.damages(place[0], blocks), strict=True))
        if not any(math.isfinite(damage) for of_place in damages.values() for damage in of_place.values()):
            raise UserError(f"method={self.name}: the model's output is not finite; try model.dtype=float32")
        return damages

    def variants(
        self, problem: PruningProblem, units: Mapping[Place, Units], levels: Mapping[Place, Sequence[int]]
    ) -> Iterator[tuple[Place, list[Narrowed]]]:
        """What is left of a sublayer of the dense model when so many units of it alone go, for each of its levels."""
        from slm_pipeline.show.progress import ProgressBar

        for place, numbers in ProgressBar(levels.items(), desc="sensitivity"):
            yield place, [self.narrowed(problem, units, place, number) for number in numbers]

    def narrow(
        self, problem: PruningProblem, units: Mapping[Place, Units], gone: Mapping[Place, int]
    ) -> tuple[dict[Place, Narrowed], dict[str, Any]]:
        """What is left of each sublayer when so many units of each go, and for the plan's scores what was found out."""
        return {place: self.narrowed(problem, units, place, number) for place, number in gone.items()}, {}

    def narrowed(self, problem: PruningProblem, units: Mapping[Place, Units], place: Place, number: int) -> Narrowed:
        """What is left of a sublayer when so many units go: those with the highest scores, and a constant for what is
        gone."""
        stay = units[place].after(number)
        return Narrowed(stay, constant=self._constant(problem, *place, stay, len(units[place].scores)))

    def _check_constants(self, view: ModelView, places: Iterable[Place]) -> None:
        found = [view.output(*place).bias for place in places]
        if self.export == "stock" and self.adds_constants and any(bias is None for bias in found):
            raise UserError(
                f"method.bias=true adds a bias to projections that have none in a {view.config.model_type} model; use"
                " method.bias=false or method.export=custom"
            )

    def _units(self, problem: PruningProblem, sizes: Sequence[LayerSize]) -> dict[Place, Units]:
        """Of each sublayer that is there and may become narrower; scores are 0."""
        import torch

        from slm_pipeline.engine.allocation import Units

        units, layers, is_bias = {}, self.candidates(len(sizes)), self.adds_constants
        for part, layer in product(self.parts, layers):
            if problem.view.lacks(layer, part):
                continue
            size, scores = sizes[layer], torch.zeros(problem.view.num_units(layer, part))
            fixed = torch.zeros(len(scores), dtype=torch.bool)
            if part == "attention":
                units[layer, part] = Units(scores, size.per_head, size.attention_bias if is_bias else 0, fixed)
                continue
            if self.massive is not None:
                weight, mean, variance = inputs_of(problem, layer, part)
                energy = (variance + mean.square()) * weight.square().sum(dim=0)
                fixed = (energy > self.massive * energy.mean()).cpu()
            bias = size.mlp_bias if is_bias else 0
            units[layer, part] = Units(scores, size.per_neuron, bias, fixed, self.multiple_of)
        return units

    def _of_channels(self, problem: PruningProblem, layer: int, part: str) -> Tensor:
        scores = standardised(self.channel_scores(*inputs_of(problem, layer, part), part))
        return scores.view(problem.view.num_units(layer, part), -1).mean(dim=1).cpu()

    def _width_plan(
        self,
        problem: PruningProblem,
        sizes: list[LayerSize],
        units: Mapping[Place, Units],
        narrowed: Mapping[Place, Narrowed],
        measured: Mapping[str, Any],
    ) -> Plan:
        ops, tensors = operations(narrowed, {place: len(of.scores) for place, of in units.items()})
        widths = [[size.heads, size.neurons] for size in sizes]
        for (layer, part), of_one in narrowed.items():
            widths[layer][SUBLAYERS.index(part)] = len(of_one.kept)
        massive = [
            [layer, int(neuron)]
            for (layer, part), of in units.items()
            if part == "mlp"
            for neuron in of.fixed.nonzero().flatten()
        ]
        scores = {"widths": widths, "massive": massive, **measured}
        return self.new_plan(problem, ops=ops, tensors=tensors, scores=scores)

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
