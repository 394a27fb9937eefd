"""The plan: a method's whole decision, readable and replayable. No torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from slm_pipeline.config import plugins
from slm_pipeline.errors import UserError
from slm_pipeline.store.checksums import digest
from slm_pipeline.store.files import write_bytes, write_json
from slm_pipeline.surgery.ops import Layer, Op, Widths, read_op, walk
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.untrusted import MAX_LAYERS, is_deeper, is_layers, is_share, is_word, read_text, short

if TYPE_CHECKING:
    from slm_pipeline.models.source import ModelSource

log = logging.getLogger(__name__)

FORMAT = 1
_MAX_BYTES = 64 << 20  # of a plan.json; a search through 80 layers leaves less than one
_MAX_DEPTH = 50


@dataclass
class Plan:
    """What to do to a dense model.

    Attributes:
        model: name, fingerprint and num_layers of the dense model.
        method: name of the method that made it.
        options: the method's options.
        calibration: fingerprint of the token ids and num_tokens, their number; None of a method that reads none.
        threshold: the similarity floor that was used, None for methods without one.
        ops: edits, applied in order (`slm_pipeline.surgery.ops`).
        scores: the method's own measurements; its docstring explains them. ``warnings`` among them are lines to be
            shown whenever the plan is used.
        tensors: what ops refer to by name; kept in plan.safetensors beside plan.json.
    """

    model: dict[str, Any]
    method: str
    options: dict[str, Any]
    calibration: dict[str, Any] | None
    ops: list[Op]
    threshold: float | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    format: int = FORMAT

    def layers(self, where: str = "the plan") -> list[Layer]:
        """The pruned model's layers, input side first, by their history.

        Raises:
            UserError: an operation cannot be done to what the ones before it leave.
        """
        number = itertools.count()
        dense = [Layer((layer,)) for layer in range(self.model["num_layers"])]
        return walk(self.ops, dense, lambda op, members: op.check(members, f"{where}: op {next(number)}"))

    @property
    def layer_groups(self) -> list[list[int]]:
        """The pruned model's layers in order, each given by the original layers merged into it."""
        return [[*layer.originals] for layer in self.layers()]

    @property
    def dropped(self) -> list[int]:
        """Original layers that are in no group."""
        kept = {layer for group in self.layer_groups for layer in group}
        return [layer for layer in range(self.model["num_layers"]) if layer not in kept]

    @property
    def num_layers(self) -> int:
        """Depth of the pruned model."""
        return len(self.layers())

    def zeroed(self) -> dict[str, list[int]]:
        """Sublayer (attention, mlp) -> positions in the pruned model where it is there and does nothing."""
        return _positions([layer.zeroed for layer in self.layers()])

    def absent(self) -> dict[str, list[int]]:
        """Sublayer (attention, mlp) -> positions in the pruned model where it is not there."""
        return _positions([layer.absent for layer in self.layers()])

    def ops_by_kind(self) -> list[tuple[type[Op], list[Op]]]:
        """The operations of each class, in order of their first."""
        kinds = dict.fromkeys(type(op) for op in self.ops)
        return [(kind, [op for op in self.ops if type(op) is kind]) for kind in kinds]

    def then(self, later: Plan, prefix: str) -> None:
        """Take in the edits of a plan for the model that this one leaves.

        Args:
            prefix: what the names of its tensors begin with from now on.
        """
        stack = self.layers()
        moved = [op.moved(stack, prefix) for op in later.ops]
        self.ops = [*self.ops, *moved]
        self.tensors = {**self.tensors, **{f"{prefix}{name}": value for name, value in later.tensors.items()}}

    def content(self) -> str:
        """A digest of the edits alone: equal plans give equal checkpoints, whatever method or option led to them.

        An operation of a plugin is what its code does.

        Raises:
            UserError: an operation is neither ours nor a plugin's.
        """
        tensors = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in self.tensors.items()}
        code = plugins.code_of(*dict.fromkeys(type(op) for op in self.ops))
        ops = [op.to_json() for op in self.ops]
        return digest([ops, tensors, *([code] if code else [])] if tensors or code else ops)

    def fingerprint(self) -> str:
        """A digest of all that it says, shapes and measurements too: a plan that was put right is another one, although
        its edits may be the same."""
        tensors = {name: [str(value.dtype), list(value.shape)] for name, value in self.tensors.items()}
        return digest([self._values(), tensors, self.content()])

    def _values(self) -> dict[str, Any]:
        """What stands in plan.json; layer_groups and dropped are for people and for other programs."""
        return {
            "model": self.model,
            "method": self.method,
            "options": self.options,
            "calibration": self.calibration,
            "layer_groups": self.layer_groups,
            "ops": [op.to_json() for op in self.ops],
            "threshold": self.threshold,
            "dropped": self.dropped,
            "scores": self.scores,
            "format": self.format,
        }

    def write(self, path: Path) -> None:
        """Write plan.json and, if there are tensors, plan.safetensors beside it, the latter first."""
        tensors = path.with_suffix(".safetensors")
        if self.tensors:
            write_bytes(tensors, save(self.tensors))
        write_json(path, self._values())
        if not self.tensors:
            tensors.unlink(missing_ok=True)  # of another plan that stood here

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read and check a plan.json.

        Raises:
            UserError: the file is missing, is not a plan of this format, or contradicts itself.
        """
        try:
            values = json.loads(read_text(path, _MAX_BYTES), parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a plan: {error}") from error
        if not isinstance(values, dict) or type(values.get("format")) is not int or values["format"] != FORMAT:
            raise UserError(f"{path} is not a plan of format {FORMAT}")
        if is_deeper(values, _MAX_DEPTH):
            raise UserError(f"{path} is not a plan: it is nested more than {_MAX_DEPTH} deep")
        ops, groups = values.pop("ops", None), values.pop("layer_groups", None)
        dropped = values.pop("dropped", [])
        if not isinstance(ops, list) or not all(isinstance(op, dict) for op in ops):
            raise UserError(f"{path}: ops={short(ops)} must be a list of mappings")
        tensors = path.with_suffix(".safetensors")
        try:
            plan = cls(**values, ops=[], tensors=load_file(tensors) if tensors.is_file() else {})
        except (TypeError, SafetensorError, OSError, LookupError, ValueError) as error:  # the last three: odd dtypes
            raise UserError(f"{path} is not a plan: {error}") from error
        plan.ops = [read_op(op, plan.tensors, f"{path}: op {number}") for number, op in enumerate(ops)]
        plan.check(str(path))
        plan._check_said(groups, dropped, str(path))
        return plan

    def check(self, where: str) -> None:
        """Raise `UserError` unless every value is of its type and in its range, the operations can be done one after
        the other and leave a layer, and tensors are those that they name."""
        self._check_types(where)
        for number, op in enumerate(self.ops):
            read_op(op.to_json(), self.tensors, f"{where}: op {number}")  # what is written can be read
        for kind, ops in self.ops_by_kind():
            kind.check_together(ops, where)
        if not self.layers(where):
            raise UserError(f"{where}: its ops must keep a layer")
        if unnamed := sorted(self.tensors.keys() - {name for op in self.ops for name in op.tensor_names()}):
            raise UserError(f"{where}: plan.safetensors holds {unnamed[0]!r}, which no op names")

    def _check_said(self, groups: Any, dropped: Any, where: str) -> None:
        """Raise `UserError` unless the layer groups and dropped layers that a file says are those of its operations."""
        if not is_layers(dropped):
            raise UserError(f"{where}: dropped={short(dropped)} must be a list of layers, ascending")
        if not isinstance(groups, list):
            raise UserError(f"{where}: layer_groups={short(groups)} must be a list of lists of layers")
        for group in groups:
            if not group or not is_layers(group):
                raise UserError(f"{where}: layer_groups has {short(group)}, which is no list of layers, ascending")
        depth = self.model["num_layers"]
        kept = [layer for group in groups for layer in group]
        if not groups or kept != sorted(kept) or sorted(kept + dropped) != list(range(depth)):
            raise UserError(
                f"{where}: layer_groups and dropped must name each of the {depth} layers once, in order, and keep one"
            )
        if groups != self.layer_groups:
            raise UserError(f"{where}: its ops do not lead to its layer_groups")

    def _check_types(self, where: str) -> None:
        """Raise `UserError` for a value of the wrong type, or a number out of its range."""
        allowed = (
            ("model", isinstance(self.model, dict), "a mapping"),
            ("method", is_word(self.method), "a name"),
            ("options", isinstance(self.options, dict), "a mapping"),
            ("calibration", self.calibration is None or isinstance(self.calibration, dict), "a mapping or null"),
            ("threshold", self.threshold is None or is_share(self.threshold), "null or a number in [0, 1]"),
            ("scores", isinstance(self.scores, dict), "a mapping"),
        )
        for name, is_allowed, what in allowed:
            if not is_allowed:
                raise UserError(f"{where}: {name}={short(getattr(self, name))} must be {what}")
        depth = self.model.get("num_layers")
        if not (type(depth) is int and 1 <= depth <= MAX_LAYERS):
            raise UserError(f"{where}: model.num_layers={short(depth)} must be a whole number from 1 to {MAX_LAYERS}")
        for key in ("name", "fingerprint"):
            if not is_word(self.model.get(key)):
                raise UserError(f"{where}: model.{key}={short(self.model.get(key))} must be a name")
        number = (self.calibration or {}).get("num_tokens", 0)
        if not (type(number) is int and number >= 0):
            raise UserError(f"{where}: calibration.num_tokens={short(number)} must be a whole number")
        warnings = self.scores.get("warnings", [])
        if not (isinstance(warnings, list) and all(map(is_word, warnings))):
            raise UserError(f"{where}: scores.warnings={short(warnings)} must be a list of lines")
        steps = self.scores.get("steps", [])
        if not (isinstance(steps, list) and all(is_step(step) for step in steps)):
            raise UserError(f"{where}: scores.steps must be a list of low, high, similarity and accepted")

    def check_model(self, source: ModelSource, where: str) -> None:
        """Raise `UserError` unless the plan fits the model's depth, if that is known; warn if it is another model's."""
        depth = self.model["num_layers"]
        if source.num_layers not in (None, depth):
            raise UserError(f"{where} is a plan for {depth} layers; {source.name} has {source.num_layers}")
        for number, op in enumerate(self.ops):
            op.check_model(source, f"{where}: op {number}")
        if self.model["fingerprint"] != source.fingerprint:
            log.warning("%s was made for %s, not for %s", where, self.model["name"], source.name)

    def check_sizes(self, widths: Widths) -> None:
        """Raise `UserError` unless the tensors fit a model of such sizes."""
        for number, op in enumerate(self.ops):
            op.check_sizes(self.tensors, widths, f"op {number} of the plan")


def file_of(model: Path) -> Path:
    """The plan.json of a model's folder.

    In a folder of its own: vLLM and others read every ``*.safetensors`` beside the weights as weights. Checkpoints of
    before have it beside them.
    """
    file, beside = model / "plan" / "plan.json", model / "plan.json"
    return beside if beside.is_file() and not file.is_file() else file


def _positions(sublayers: Sequence[frozenset[str]]) -> dict[str, list[int]]:
    return {name: [position for position, found in enumerate(sublayers) if name in found] for name in SUBLAYERS}


def is_step(value: Any) -> bool:
    """Whether it is a window that a search evaluated."""
    return (
        isinstance(value, dict)
        and is_layers([value.get("low")])
        and is_layers([value.get("high")])
        and type(value.get("similarity")) in (int, float)
        and abs(value["similarity"]) <= 1.01  # rounding
        and type(value.get("accepted")) is bool
    )


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {number[:40]}")
    return value


def groups_of_windows(windows: Sequence[tuple[int, int]], num_layers: int, first: int = 0) -> list[list[int]]:
    """Layer groups from ``first`` up when each closed window (low, high) becomes one layer and the others stay."""
    starts = dict(windows)
    groups, layer = [], first
    while layer < num_layers:
        high = starts.get(layer, layer)
        groups.append(list(range(layer, high + 1)))
        layer = high + 1
    return groups


def merged_windows(layer_groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """First and last layer of what was merged into one: of groups of more than one layer the runs of neighbours."""
    runs: list[list[int]] = []
    for group in layer_groups:
        start = len(runs)
        for layer in group if len(group) > 1 else []:
            if len(runs) > start and runs[-1][-1] + 1 == layer:
                runs[-1].append(layer)
            else:
                runs.append([layer])
    return [(run[0], run[-1]) for run in runs]


def format_groups(groups: Sequence[Sequence[int]]) -> str:
    """One line: runs of untouched layers as ``0-21``, merged ones in braces: ``0-21 {22-24} 25-29``."""

    def span(first: int, last: int) -> str:
        return str(first) if first == last else f"{first}-{last}"

    words: list[str] = []
    run: list[int] = []
    for group in [*groups, []]:
        if len(group) == 1 and (not run or group[0] == run[-1] + 1):
            run.append(group[0])
            continue
        if run:
            words.append(span(run[0], run[-1]))
        run = list(group) if len(group) == 1 else []
        if len(group) > 1:
            words.append("{" + span(group[0], group[-1]) + "}")
    return " ".join(words)


def format_fit(fit: Mapping[str, Mapping[str, float]]) -> str:
    """How a linear map does: ``cosine 0.31 -> 0.98 on 900 tokens fitted, 0.30 -> 0.97 on 100 held out``."""
    parts = [
        f"{found['cosine_before']:.2f} -> {found['cosine_after']:.2f} on {found['num_tokens']} {name.replace('_', ' ')}"
        for name, found in fit.items()
    ]
    return f"cosine {', '.join(parts)}".replace(" fitted", " tokens fitted", 1)
