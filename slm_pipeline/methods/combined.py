"""Several methods one after the other, each for a share of the target: depth and width in one plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config import checked
from slm_pipeline.config.groups import build
from slm_pipeline.config.ranges import UpToOne
from slm_pipeline.engine.window_memo import WindowMemos
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import LayerRemoval, Method, PruningProblem
from slm_pipeline.methods.finercut import FinerCut
from slm_pipeline.methods.joint import Joint
from slm_pipeline.methods.replaceme import ReplaceMe
from slm_pipeline.methods.target import Layers, NoTarget, Parameters, PruningRatio
from slm_pipeline.methods.width_removal import WidthRemoval
from slm_pipeline.show.numerals import counts
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.surgery.ops import LayerSize


@dataclass
class _Share:
    share: UpToOne | None = None


@dataclass(frozen=True)
class Step:
    """A method that takes a part of the target.

    Attributes:
        share: of the whole target, in [0, 1].
    """

    method: Method
    share: float

    def target(self, due: int, sizes: Sequence[LayerSize], *, is_last: bool) -> Layers | Parameters:
        """What the method is asked so that ``due`` parameters go of layers of these sizes."""
        if Parameters in self.method.targets and (is_last or not self.method.removes_by_order):
            return Parameters(due)
        layers = due * len(sizes) / sum(size.at_work for size in sizes)
        return Layers(math.ceil(layers - 1e-9) if is_last else max(1, round(layers)))

    def options(self) -> dict[str, Any]:
        """What the plan depends on, as JSON."""
        return {
            "method": self.method.name,
            "share": self.share,
            "num_samples": self.method.published_calibration.num_samples,
            "options": self.method.options(),
        }


@dataclass(kw_only=True)
class Combined(Method):
    """Steps in the order of the YAML, each a method with its ``share``; shares sum to 1, one may be null: the rest. A
    step of share 0 is left out. SLM (arXiv 2502.19159) with a width method is its authors' combination.

    Each step plans on the model that the ones before it left, with statistics collected anew on it, on the calibration
    samples or on as many of them as its own ``published_calibration`` says. What comes out is one plan in the dense
    model's layers.

    The target is a number of parameters; one of layers is as many as that many layers have, as the width methods count.
    A step gets its share of what is still to go, among the steps that are left; what the ones before it really took is
    known then, so the last step makes up for them and the total is met within one unit of the last step: a neuron, a
    head, a sublayer or, for a method that knows whole layers alone, a layer. Of such a method the share is rounded to
    the nearest number of layers, at least 1, and up if it is the last. Steps have targets, not floors: ``threshold``
    is auto, and a method that has a floor looks for one that reaches its share.

    What cannot follow what is refused beforehand: methods that mix the weights of layers (`Method.mixes_layers`) after
    one that gives layers widths of their own, two that narrow the same sublayers, and after FinerCut, whose ``export``
    must be custom then, or after joint with ``export=custom``, what would make a layer of several, of which one lacks
    something.

    Scores in the plan: parts, for each step its name, method, share, target ({layers} or {parameters}), the layers and
    parameters that it found, threshold, and its own scores, in layers of the model that it saw.
    """

    steps: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "combined"
    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)
    steps_in: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        nodes = {str(name): dict(node) for name, node in self.steps.items()}
        for name, node in nodes.items():
            if "_target_" not in node:
                raise UserError(
                    f"method.{name} is no step: method@method.{name}=NAME chooses one in a YAML that has it"
                )
        shares = {name: _share(name, node.pop("share", None)) for name, node in nodes.items()}
        given = sum(share or 0.0 for share in shares.values())
        rest = [name for name, share in shares.items() if share is None]
        if len(rest) > 1 or not math.isclose(given, 1, abs_tol=1e-6) and not (rest and given < 1):
            said = ", ".join(f"method.{name}.share={'null' if s is None else s}" for name, s in shares.items())
            raise UserError(f"{said}: shares must sum to 1, and one of them may be null: what the others leave")
        shares |= dict.fromkeys(rest, max(0.0, 1 - given))
        self.steps = {name: Step(_method(name, node), float(shares[name] or 0)) for name, node in nodes.items()}
        for (before, first), (after, second) in combinations(self._taken.items(), 2):
            _check_order(before, first.method, after, second.method)

    @property
    def _taken(self) -> dict[str, Step]:
        """Steps with a share, in order."""
        return {name: step for name, step in self.steps.items() if step.share > 0}

    @property
    def _methods(self) -> list[Method]:
        return [step.method for step in self._taken.values()]

    @property
    def reads_calibration(self) -> bool:
        return any(method.reads_calibration for method in self._methods) or len(self._methods) > 1

    @property
    def looks_for_floor(self) -> bool:
        return any(method.looks_for_floor for method in self._methods)

    def options(self) -> dict[str, Any]:
        return {"steps": [step.options() for step in self._taken.values()]}

    def code(self) -> dict[str, str]:
        return {name: code for method in self._methods for name, code in method.code().items()}

    def layers_left(self, num_layers: int, target: Layers) -> None:
        return None

    def memory(self, sizes: Sizes) -> int:
        """That of the step which takes most, each on a model as it was and on as many samples as it looks at, and the
        statistics that are taken for it if they are not those of all samples."""
        most = 0
        for number, method in enumerate(self._methods):
            seen = replace(sizes, num_samples=min(sizes.num_samples, method.published_calibration.num_samples))
            collected = number > 0 or seen != sizes
            between = seen.passing(2048) + seen.running(seen.batch_tokens(2048)) if collected else 0
            most = max(most, between, method.memory(seen))
        return most

    def host_memory(self, sizes: Sizes) -> int:
        return max(method.host_memory(sizes) for method in self._methods)

    def check(self, context: Context) -> None:
        config, text = context.config, context.config.calibration
        for name, step in self._taken.items():
            number = min(text.num_samples, step.method.published_calibration.num_samples)
            seen = replace(config, calibration=replace(text, num_samples=number))
            with _of_step(name):
                step.method.check(replace(context, config=seen))
        num_layers, ratio = context.source.num_layers, PruningRatio(context.config.pruning_ratio, self)
        target = None if num_layers is None else ratio.layers(num_layers)
        if target is not None and num_layers is not None:
            self._check_layers(num_layers, target.remove)

    def _check_layers(self, num_layers: int, remove: int) -> None:
        """Raise `UserError` if a step that removes whole layers would take all that is asked, or more than it can."""
        names, left = [*self._taken], float(remove)
        for number, (name, step) in enumerate(self._taken.items()):
            if Parameters in step.method.targets and not step.method.removes_by_order:
                left -= step.share * remove
                continue
            is_last = number == len(names) - 1
            layers = math.ceil(left - 1e-6) if is_last else max(1, round(step.share * remove))
            if layers >= left and not is_last:
                raise UserError(
                    f"method.{name}.share={step.share:g} of {remove} layers is {layers}, which leaves nothing for"
                    f" {' and '.join(names[number + 1 :])}; ask for more of the pruning_ratio, or for another share"
                )
            fewest, why = step.method.fewest_left(num_layers)
            if num_layers - layers < fewest:
                raise UserError(
                    f"method.{name}.share={step.share:g} of {remove} layers is {layers}: of {num_layers} at least"
                    f" {fewest} must be left ({why})"
                )
            left, num_layers = left - layers, num_layers - layers

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        from slm_pipeline.surgery.apply import layer_sizes

        dense = layer_sizes(problem.view)
        parameters = sum(size.whole for size in dense)
        target = problem.target
        total = target.remove if isinstance(target, Parameters) else target.remove * parameters // len(dense)
        whole, warnings = self.new_plan(problem, ops=[]), list[str]()
        parts: list[dict[str, Any]] = []
        steps = [*self._taken.items()]
        for number, (name, step) in enumerate(steps):
            sizes, _ = measure_changes(whole, dense)
            left = sum(size.at_work for size in sizes)
            due = total - (parameters - left)
            if due <= 0:
                took, asked = counts(parameters - left, total)
                raise UserError(
                    f"nothing is left for method.{name}: the steps before it took {took} parameters of {asked}"
                    " that were asked for; give them a smaller share"
                )
            others = sum(later.share for _, later in steps[number:])
            part = step.target(math.ceil(due * (step.share / others)), sizes, is_last=number == len(steps) - 1)
            with _of_step(name):
                found = step.method.plan(_problem(problem, whole, step.method, part))
                whole.then(found, f"{name}." if len(steps) > 1 else "")
                whole.check("the plan of method=combined")
            warnings += [f"{name}: {line}" for line in found.scores.get("warnings", [])]
            sizes, _ = measure_changes(whole, dense)
            parts.append(
                {
                    "name": name,
                    "method": step.method.name,
                    "share": step.share,
                    "target": asdict(part) | {"of": "layers" if isinstance(part, Layers) else "parameters"},
                    "found": {"layers": found.model["num_layers"], "parameters": left},
                    "left": {"layers": len(sizes), "parameters": sum(size.at_work for size in sizes)},
                    "threshold": found.threshold,
                    "scores": found.scores,
                }
            )
        whole.scores = {"parts": parts}
        if warnings:
            whole.scores["warnings"] = warnings
        return whole


def _share(name: str, value: Any) -> float | None:
    share: float | None = checked(_Share, {"share": value}, f"method.{name}").share
    return share


def _method(name: str, node: Mapping[str, Any]) -> Method:
    with _of_step(name):
        method: Method = build(node, group="method")
    if NoTarget in method.targets or isinstance(method, Combined):
        raise UserError(f"method@method.{name}={method.name}: it cannot be a step, for it takes no part of a target")
    return method


@contextmanager
def _of_step(name: str) -> Iterator[None]:
    """Say in a user's error which step it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"step {name}: {error}") from error


def _check_order(before: str, first: Method, after: str, second: Method) -> None:
    """Raise `UserError` if what ``second`` does cannot be done to what ``first`` leaves."""
    narrowed, why = _narrowed(first), None
    if narrowed & _narrowed(second):
        why = "both narrow the same sublayers; let one have method.STEP.sublayers=attention and the other =mlp"
        if isinstance(first, Joint) or isinstance(second, Joint):
            why = "both narrow the same sublayers; joint with export=stock leaves attention to others"
    elif narrowed and second.mixes_layers:
        why = (
            f"{second.name} mixes the weights of layers, which have lost different heads and neurons; let it come first"
        )
    elif _takes_sublayers(first) and not (isinstance(second, WidthRemoval) or _only_removes(second)):
        why = (
            f"{first.name} leaves layers without a sublayer; let it come last, or before a method that narrows or"
            " removes layers"
        )
    elif isinstance(first, FinerCut) and first.export == "stock":
        why = f"finercut leaves zeros, which would count as if they did something; use method.{before}.export=custom"
    if why is not None:
        raise UserError(f"method.{after} ({second.name}) cannot come after method.{before} ({first.name}): {why}")


def _narrowed(method: Method) -> set[str]:
    """The sublayers whose width a method may change."""
    if isinstance(method, Joint):
        return {"mlp"} if method.export == "stock" else {*SUBLAYERS}
    if isinstance(method, WidthRemoval):
        return {*SUBLAYERS} if method.sublayers == "both" else {method.sublayers}
    return set()


def _takes_sublayers(method: Method) -> bool:
    return isinstance(method, FinerCut) or isinstance(method, Joint) and method.export == "custom"


def _only_removes(method: Method) -> bool:
    return isinstance(method, LayerRemoval) and not method.mixes_layers and not isinstance(method, ReplaceMe)


def _problem(problem: PruningProblem, plan: Plan, method: Method, target: Layers | Parameters) -> PruningProblem:
    """What a step gets: the model that ``plan`` leaves, and what that shows on the step's samples."""
    from slm_pipeline.engine.statistics import collect
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.surgery.apply import apply_beside

    input_ids = problem.input_ids[: method.published_calibration.num_samples]
    if not plan.ops and len(input_ids) == len(problem.input_ids):
        return replace(problem, target=target)
    view = ModelView(apply_beside(plan, problem.view)) if plan.ops else problem.view
    statistics = collect(view, input_ids)
    return replace(problem, view=view, input_ids=input_ids, statistics=statistics, target=target, windows=WindowMemos())
