"""How much a method is to remove: what it can be asked for, and the two groups of options that ask for it."""

from __future__ import annotations

import logging
import math
import shlex
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from slm_pipeline.config import ModelConfig, PruningRatioConfig, ThresholdConfig
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.block_times import NEW
from slm_pipeline.evaluation.efficiency import check_mode

if TYPE_CHECKING:
    from slm_pipeline.methods.base import Method
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.view import ModelView

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layers:
    """``remove`` whole layers are to go, or in sublayers as many halves of layers."""

    remove: int


@dataclass(frozen=True)
class Parameters:
    """At least ``remove`` parameters are to go, and less than one removable unit more."""

    remove: int


@dataclass(frozen=True)
class Floor:
    """No target: whatever may go while the model stays at least ``similarity``, in [0, 1], similar to the dense one."""

    similarity: float


@dataclass(frozen=True)
class NoTarget:
    """Nothing is asked: the method knows what to remove."""


@dataclass(frozen=True)
class Speedup:
    """A generated token is to take at most the dense model's time divided by ``times``, above 1.

    No method is asked for it: `slm_pipeline.methods.latency` turns it into layers or parameters.
    """

    times: float


Target = Layers | Parameters | Floor | Speedup | NoTarget

# Of latency: what stands at its default where something else is asked.
_OF_LATENCY = ("speedup", "batch_size", "context", "mode")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model, embeddings included, and of each block."""

    total: int
    blocks: list[int]

    @classmethod
    def of(cls, view: ModelView) -> ParameterCounts:
        return cls(view.num_parameters(), [view.block_parameters(layer) for layer in range(view.num_layers)])


@dataclass(frozen=True)
class PruningRatio:
    """The group ``pruning_ratio``, for one method.

    Of layers ``round(ratio * num_layers)`` go (ties to even), at least 1. Of parameters at least ``ratio`` of them all,
    embeddings included; for a method that aims at layers alone, the fewest layers that have so many. Where layers
    differ in size their mean counts: what really goes may be a little more or less, and the summary says so. Of latency
    as much goes as makes a generated token ``speedup`` times faster.
    """

    options: PruningRatioConfig
    method: Method

    @property
    def asks(self) -> bool:
        asked = (self.options.ratio, self.options.num_layers, self.options.speedup)
        return any(value is not None for value in asked)

    @property
    def of_latency(self) -> bool:
        return self.options.of == "latency"

    def check(self, context: Context) -> None:
        """Raise `UserError` for options that do not go together, and for a target that cannot be reached as far as that
        is known from the depth alone."""
        if self.options.of not in ("layers", "parameters", "latency"):
            raise UserError(f"pruning_ratio.of={self.options.of!r} is not one of layers, parameters, latency")
        self._check_latency(context)
        if self.options.ratio is not None and self.options.num_layers is not None:
            raise UserError(
                "pruning_ratio.ratio and pruning_ratio.num_layers exclude each other; set one of them to null"
            )
        if self.asks and NoTarget in self.method.targets:
            raise UserError(f"method={self.method.name} takes no pruning ratio; use pruning_ratio=none")
        num_layers = context.source.num_layers
        if num_layers is None or context.config.threshold.kind != "auto":  # else the floor decides
            return
        if self.layers(num_layers) is None and self.options.ratio is not None:
            fewest, why = self.method.fewest_left(num_layers)
            share = max(0, num_layers - fewest) / num_layers  # of the layers; embeddings make it less of the parameters
            if self.options.ratio > share:
                raise UserError(
                    f"pruning_ratio.ratio={self.options.ratio} of all parameters: of {num_layers} layers at least"
                    f" {fewest} must be left ({why}), so less than {share:.1%} of the parameters can go"
                )

    def _check_latency(self, context: Context) -> None:
        options = self.options
        if not self.of_latency:
            for name in _OF_LATENCY:
                if getattr(options, name) != getattr(PruningRatioConfig(), name):
                    raise UserError(
                        f"pruning_ratio.{name}={getattr(options, name)} does nothing with"
                        f" pruning_ratio.of={options.of}; use pruning_ratio=latency"
                    )
            return
        if options.ratio is not None or options.num_layers is not None:
            raise UserError("pruning_ratio.of=latency takes pruning_ratio.speedup alone, no ratio and no num_layers")
        if options.speedup is None:
            raise UserError("pruning_ratio.of=latency needs pruning_ratio.speedup, as 1.3")
        if context.config.model.device == "stream":
            raise UserError(
                "pruning_ratio.of=latency times models that are whole in memory, which model.device=stream has not; use"
                " another model.device, or pruning_ratio.of=parameters"
            )
        if context.source.num_layers == 1:
            raise UserError("pruning_ratio.of=latency times a model without some of its layers; this one has only one")
        check_mode("pruning_ratio.mode", options.mode, context.config.model.device)
        most = context.source.max_positions
        if most is not None and options.context + NEW > most:
            raise UserError(
                f"pruning_ratio.context={options.context} and {NEW} new tokens: the model has {most} positions"
            )

    def identity(self) -> dict[str, Any]:
        own = {name: getattr(self.options, name) for name in ("of", "ratio", "num_layers")}
        return own | ({name: getattr(self.options, name) for name in _OF_LATENCY} if self.of_latency else {})

    def layers_left(self, num_layers: int) -> int | None:
        """Of a model of so many; None where only the plan tells."""
        target = self.layers(num_layers)
        return None if target is None else self.method.layers_left(num_layers, target)

    def layers(self, num_layers: int) -> Layers | None:
        """The target in a model of so many layers; None where parameters are counted, or nothing is asked.

        Raises:
            UserError: nothing would be removed, or fewer layers would be left than the method can leave.
        """
        ratio, keep = self.options.ratio, self.options.num_layers
        if keep is not None:
            if not 1 <= keep < num_layers:
                raise UserError(
                    f"pruning_ratio.num_layers={keep} must be at least 1 and below the model's {num_layers} layers"
                )
            target, asked = Layers(num_layers - keep), f"pruning_ratio.num_layers={keep}"
        elif ratio is not None and self.options.of == "layers":
            target = Layers(max(1, round(ratio * num_layers)))
            asked = f"pruning_ratio.ratio={ratio} of {num_layers} layers"
        else:
            return None
        left = num_layers - target.remove
        fewest, why = self.method.fewest_left(num_layers)
        if left < fewest:
            nearest = f"; nearest: pruning_ratio=layers pruning_ratio.num_layers={fewest}"
            raise UserError(
                f"{asked} leaves {_layers(left)}; at least {fewest} must be left ({why})"
                + (nearest if fewest < num_layers else "")
            )
        return target

    def target(self, sizes: ParameterCounts) -> Layers | Parameters | Speedup | NoTarget:
        """The target in a model of these sizes.

        Raises:
            UserError: the method cannot reach it.
        """
        num_layers = len(sizes.blocks)
        if self.options.speedup is not None:
            return Speedup(self.options.speedup)
        if (layers := self.layers(num_layers)) is not None:
            return layers
        if self.options.ratio is None:
            return NoTarget()
        wanted = Parameters(math.ceil(self.options.ratio * sizes.total))
        layers = Layers(math.ceil(Fraction(wanted.remove * num_layers, sum(sizes.blocks))))
        fewest, why = self.method.fewest_left(num_layers)
        can_go = max(0, num_layers - fewest)
        if layers.remove > can_go and sum(sorted(sizes.blocks)[num_layers - can_go :]) < wanted.remove:
            largest = sum(sorted(sizes.blocks)[num_layers - can_go :]) / sizes.total
            raise UserError(
                f"pruning_ratio.ratio={self.options.ratio} of {sizes.total / 1e6:.1f} M parameters leaves"
                f" {_layers(max(0, num_layers - layers.remove))}; at least {fewest} must be left ({why}):"
                f" method={self.method.name} can remove at most {largest:.1%} of the parameters"
            )
        of_one_size = len(set(sizes.blocks)) == 1
        if Parameters in self.method.targets and not (of_one_size and self.method.removes_by_order):
            return wanted
        return Layers(min(layers.remove, can_go))


@dataclass(frozen=True)
class Threshold:
    """The group ``threshold``: the floor of a method that has one.

    Attributes:
        ratio: what a floor of kind ``auto`` is to reach, and a published one is known by.
        model: whose published floors count.
    """

    options: ThresholdConfig
    ratio: PruningRatio
    model: ModelConfig

    def check(self, context: Context) -> None:
        """Raise `UserError` unless method, threshold and ratio go together."""
        method, kind, value = self.ratio.method, self.options.kind, self.options.value
        if kind not in ("auto", "fixed", "published"):
            raise UserError(f"threshold.kind={kind!r} is not one of auto, fixed, published")
        if kind == "auto":
            if value is not None:
                raise UserError(f"threshold.value={value} needs threshold=fixed and pruning_ratio=none")
            if not self.ratio.asks and NoTarget not in method.targets:
                raise UserError(
                    f"method={method.name} needs a target: choose a pruning_ratio"
                    " (pruning_ratio=layers with pruning_ratio.num_layers=, the layers to keep)"
                    + (", or threshold=fixed" if Floor in method.targets else "")
                )
            return
        if Floor not in method.targets:
            raise UserError(f"method={method.name} has no threshold; use threshold=auto, not threshold={kind}")
        if kind == "published":
            self._check_published()
            return
        if value is None:
            raise UserError("threshold=fixed needs a value: threshold=fixed threshold.value=0.8 pruning_ratio=none")
        if self.ratio.asks:
            kept = [word for word in shlex.split(context.command) if not word.startswith("pruning_ratio")]
            raise UserError(
                "a fixed threshold alone decides how much is removed, so it takes no ratio:"
                f" {shlex.join([*kept, 'pruning_ratio=none'])}"
            )

    def _check_published(self) -> None:
        published, option = self.model.published_thresholds, self._ratio_option
        if self.options.value is not None:
            raise UserError(
                f"threshold.value={self.options.value} needs threshold=fixed; threshold=published has its own"
            )
        if self.ratio.options.of != "layers":
            raise UserError(
                f"threshold=published is known by ratios of layers; pruning_ratio.of={self.ratio.options.of!r} is not"
            )
        if option not in published:
            known = ", ".join(f"pruning_ratio={name}: {value}" for name, value in published.items()) or "none is known"
            raise UserError(
                f"model={self.model.name} has no published threshold for pruning_ratio={option}; published: {known}"
            )
        if self.ratio.options.ratio is not None:
            log.warning(
                "threshold=published: that %s goes with pruning_ratio=%s is inferred from the names in the authors'"
                " scripts, which do not say how many layers it removes",
                published[option], option,
            )  # fmt: skip

    @property
    def _ratio_option(self) -> str:
        """The name of the ratio in conf/pruning_ratio."""
        ratio = self.ratio.options
        if ratio.num_layers is not None:
            return "layers"
        return "none" if ratio.ratio is None else f"r{round(100 * ratio.ratio)}"

    @property
    def floor(self) -> Floor | None:
        """None for ``auto``: the method looks for one that reaches the ratio, or needs none. Of checked options."""
        if self.options.kind == "published":
            return Floor(self.model.published_thresholds[self._ratio_option])
        return None if self.options.value is None else Floor(self.options.value)

    def identity(self) -> dict[str, Any]:
        search = {"refine": self.options.refine, "exhaustive": self.options.exhaustive}
        return {
            "threshold": None if self.floor is None else self.floor.similarity,
            "search": search if self.ratio.method.looks_for_floor and self.floor is None else None,
        }

    def unused(self) -> list[str]:
        """Options of the search for a floor that were set although there is none, in words."""
        default, method = ThresholdConfig(), self.ratio.method
        names = [name for name in ("refine", "exhaustive") if getattr(self.options, name) != getattr(default, name)]
        if not names or (self.options.kind == "auto" and method.looks_for_floor):
            return []
        keys = ", ".join(f"threshold.{name}" for name in names)
        return [f"threshold={self.options.kind} with method={method.name} does not use {keys}"]


def _layers(number: int) -> str:
    return f"{number} layer" if number == 1 else f"{number} layers"
