"""The plan: a method's whole decision, readable and replayable. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from slm_pipeline.errors import UserError
from slm_pipeline.store.checksums import digest
from slm_pipeline.store.files import write_bytes, write_json
from slm_pipeline.surgery.merge_rules import RULES

if TYPE_CHECKING:
    from slm_pipeline.models.source import ModelSource

log = logging.getLogger(__name__)

FORMAT = 1
MAX_LAYERS = 10_000  # more than any model has; a file that names more is no plan
_MAX_BYTES = 64 << 20  # of a plan.json; a search through 80 layers leaves less than one
_MAX_DEPTH = 50
OPS = ("drop", "merge", "drop_sublayer", "fold")
SHARING_RULES = ("concatenate", "weighted")  # they take a share for each part; no options of slm and laco
SUBLAYERS = ("attention", "mlp")
EXPORTS = ("stock", "custom")


@dataclass
class Plan:
    """What to do to a dense model.

    Attributes:
        model: name, fingerprint and num_layers of the dense model.
        method: name of the method that made it.
        options: the method's options.
        calibration: fingerprint of the token ids and num_tokens, their number; None of a method that reads none.
        threshold: the similarity floor that was used, None for methods without one.
        layer_groups: the pruned model's layers in order, each given by the original layers merged into it.
        dropped: original layers that are in no group.
        ops: edits, applied in order; ``layers`` are always original indices, input side first.
        scores: the method's own measurements; its docstring explains them. ``warnings`` among them are lines to be
            shown whenever the plan is used.
        tensors: what ops refer to by name; kept in plan.safetensors beside plan.json.
    """

    model: dict[str, Any]
    method: str
    options: dict[str, Any]
    calibration: dict[str, Any] | None
    layer_groups: list[list[int]]
    ops: list[dict[str, Any]]
    threshold: float | None = None
    dropped: list[int] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def num_layers(self) -> int:
        """Depth of the pruned model."""
        return len(self.layer_groups)

    def missing_sublayers(self) -> dict[str, list[int]]:
        """attention, mlp -> original layers that lost it but not the other."""
        ops = [op for op in self.ops if op["op"] == "drop_sublayer"]
        return {name: sorted(op["layers"][0] for op in ops if op["sublayer"] == name) for name in SUBLAYERS}

    def missing_positions(self) -> dict[str, list[int]]:
        """The same as positions in the pruned model."""
        position = {group[0]: index for index, group in enumerate(self.layer_groups)}
        return {name: [position[layer] for layer in layers] for name, layers in self.missing_sublayers().items()}

    @property
    def export(self) -> str | None:
        """How a checkpoint says that sublayers are missing; None when none is.

        stock: their last projections are zero, the class is that of the dense model, nothing is faster or smaller.
        custom: they are not there; the checkpoint brings its own modelling file.
        """
        return next((op["export"] for op in self.ops if op["op"] == "drop_sublayer"), None)

    def content(self) -> str:
        """A digest of the edits alone: equal plans give equal checkpoints, whatever method or option led to them."""
        tensors = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in self.tensors.items()}
        return digest([self.ops, tensors] if tensors else self.ops)

    def fingerprint(self) -> str:
        """A digest of all that it says, shapes and measurements too: a plan that was put right is another one, although
        its edits may be the same."""
        tensors = {name: [str(value.dtype), list(value.shape)] for name, value in self.tensors.items()}
        return digest([self._values(), tensors, self.content()])

    def _values(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "tensors"}

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
        if _is_deeper(values, _MAX_DEPTH):
            raise UserError(f"{path} is not a plan: it is nested more than {_MAX_DEPTH} deep")
        tensors = path.with_suffix(".safetensors")
        try:
            plan = cls(**values, tensors=load_file(tensors) if tensors.is_file() else {})
        except (TypeError, SafetensorError, OSError, LookupError, ValueError) as error:  # the last three: odd dtypes
            raise UserError(f"{path} is not a plan: {error}") from error
        plan.check(str(path))
        return plan

    def check(self, where: str) -> None:
        """Raise `UserError` unless every value is of its type and in its range, groups and dropped layers are a
        partition of the dense layers, in order, to which the ops lead, and tensors are those that the ops name."""
        self._check_types(where)
        depth = self.model["num_layers"]
        kept = [layer for group in self.layer_groups for layer in group]
        if not self.layer_groups or kept != sorted(kept) or sorted(kept + self.dropped) != list(range(depth)):
            raise UserError(
                f"{where}: layer_groups and dropped must name each of the {depth} layers once, in order, and keep one"
            )
        self._check_ops(where, list(range(depth)))
        if unnamed := sorted(self.tensors.keys() - self._tensor_names()):
            raise UserError(f"{where}: plan.safetensors holds {unnamed[0]!r}, which no op names")

    def _check_types(self, where: str) -> None:
        """Raise `UserError` for a value of the wrong type, or a number out of its range."""
        allowed = (
            ("model", isinstance(self.model, dict), "a mapping"),
            ("method", is_word(self.method), "a name"),
            ("options", isinstance(self.options, dict), "a mapping"),
            ("calibration", self.calibration is None or isinstance(self.calibration, dict), "a mapping or null"),
            ("threshold", self.threshold is None or is_share(self.threshold), "null or a number in [0, 1]"),
            ("dropped", is_layers(self.dropped), "a list of layers, ascending"),
            ("layer_groups", isinstance(self.layer_groups, list), "a list of lists of layers"),
            ("ops", isinstance(self.ops, list) and all(isinstance(op, dict) for op in self.ops), "a list of mappings"),
            ("scores", isinstance(self.scores, dict), "a mapping"),
        )
        for name, is_allowed, what in allowed:
            if not is_allowed:
                raise UserError(f"{where}: {name}={short(getattr(self, name))} must be {what}")
        for group in self.layer_groups:
            if not group or not is_layers(group):
                raise UserError(f"{where}: layer_groups has {short(group)}, which is no list of layers, ascending")
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
            if op["op"] == "fold" and source.architecture.output_norms:
                raise UserError(
                    f"{where}: op {number} folds a linear map into a projection; in {source.name}, a"
                    f" {source.model_type} model, a norm follows it"
                )
            if op.get("official_gqa") and source.architecture.fuses_queries:
                raise UserError(
                    f"{where}: op {number} has official_gqa=true, which does nothing in {source.name}, a"
                    f" {source.model_type} model, whose queries, keys and values are one projection"
                )
            if op.get("fold_norm") and not source.architecture.input_rms_norms:
                raise UserError(
                    f"{where}: op {number} has fold_norm=true; {source.name} is a {source.model_type} model, which has"
                    " no RMS norms right before the projections"
                )
        if self.model["fingerprint"] != source.fingerprint:
            log.warning("%s was made for %s, not for %s", where, self.model["name"], source.name)

    def _check_ops(self, where: str, layers: list[int]) -> None:
        """Raise `UserError` unless the ops are complete, say nothing else and lead to the layer groups."""
        groups = {layer: [layer] for layer in layers}  # by the lowest layer of each
        cut: set[int] = set()  # layers that lost a sublayer: nothing else may happen to them
        exports = {short(op.get("export")) for op in self.ops if op.get("op") == "drop_sublayer"}
        if len(exports) > 1:
            raise UserError(f"{where}: missing sublayers are written in one way, not as {', '.join(sorted(exports))}")
        for number, op in enumerate(self.ops):
            name = f"{where}: op {number}"
            kind, members = op.get("op"), op.get("layers")
            if not isinstance(kind, str) or kind not in OPS:
                raise UserError(f"{name} is {short(kind)}; this version knows {', '.join(OPS)}")
            if not members or not is_layers(members):
                raise UserError(f"{name}: layers={short(members)} must be a list of layers, ascending")
            if cut.intersection(members):
                raise UserError(
                    f"{name}: layers={short(members)} have lost a sublayer already, which is the last that may be"
                )
            if kind == "drop_sublayer":
                cut |= set(members)
            if kind in ("drop_sublayer", "fold"):
                self._check_in_layer(name, op, groups)
                continue
            touched = [groups.pop(layer) for layer in members if layer in groups]
            if not touched or sorted(layer for group in touched for layer in group) != members:
                raise UserError(f"{name}: layers={short(members)} are not whole layers of the model at that point")
            if kind == "merge":
                groups[members[0]] = members
                self._check_merge(name, op, len(touched))
            else:
                _check_keys(name, op)
        if [groups[layer] for layer in sorted(groups)] != self.layer_groups:
            raise UserError(f"{where}: its ops do not lead to its layer_groups")

    def _check_in_layer(self, name: str, op: dict[str, Any], groups: dict[int, list[int]]) -> None:
        """Raise `UserError` unless an op on something within one layer is complete."""
        layers = op["layers"]
        if len(layers) != 1 or layers[0] not in groups:
            raise UserError(f"{name}: layers={short(layers)} is not one layer of the model at that point")
        if op["op"] == "fold":
            _check_keys(name, op, "tensor")
            matrix = self._tensor(name, op.get("tensor"))
            square = matrix.ndim == 2 and len(matrix) == matrix.shape[1] > 0
            if matrix.dtype.kind != "f" or not square or not np.isfinite(matrix).all():
                raise UserError(
                    f"{name}: the tensor {op['tensor']} ({matrix.dtype}, {list(matrix.shape)}) must be a square matrix"
                    " of finite floats"
                )
            return
        _check_keys(name, op, "sublayer", "export")
        if op.get("sublayer") not in SUBLAYERS:
            raise UserError(f"{name}: sublayer={short(op.get('sublayer'))} is not one of {', '.join(SUBLAYERS)}")
        if op.get("export") not in EXPORTS:
            raise UserError(f"{name}: export={short(op.get('export'))} is not one of {', '.join(EXPORTS)}")

    def _check_merge(self, name: str, op: dict[str, Any], num_parts: int) -> None:
        rule = op.get("rule")
        if rule not in (*RULES, *SHARING_RULES):
            raise UserError(f"{name}: rule={short(rule)} is not one of {', '.join((*RULES, *SHARING_RULES))}")
        if rule == "concatenate":
            _check_keys(name, op, "rule", "shares", "tensors", "official_gqa", "fold_norm")
            for option in ("official_gqa", "fold_norm"):
                if type(op.get(option, False)) is not bool:
                    raise UserError(f"{name}: {option}={short(op[option])} must be true or false")
            for kind in ("heads", "neurons"):
                self._check_units(name, op, kind, num_parts)
        else:
            _check_keys(name, op, "rule", *(("shares",) if rule in SHARING_RULES else ()))
        if rule in SHARING_RULES:
            shares = op.get("shares")
            if not isinstance(shares, list) or len(shares) != num_parts:
                raise UserError(f"{name} needs one share for each of its {num_parts} parts")
            if not all(map(is_share, shares)) or abs(sum(shares) - 1) > 1e-6:
                raise UserError(f"{name}: shares={short(shares)} must be numbers in [0, 1] that sum to 1")

    def _check_units(self, name: str, op: dict[str, Any], kind: str, num_parts: int) -> None:
        """Raise `UserError` unless each part's heads or neurons are units of a layer that has as many as all give."""
        names = _unit_names(op, kind, num_parts)
        parts = [self._tensor(name, tensor) for tensor in names]
        num_units = sum(part.size for part in parts)
        for tensor, part in zip(names, parts, strict=True):
            ascending = part.ndim == 1 and part.dtype == np.int64 and bool((np.diff(part) > 0).all())
            if not ascending or (part.size and not 0 <= part[0] <= part[-1] < num_units):
                raise UserError(
                    f"{name}: the tensor {tensor} ({part.dtype}, {list(part.shape)}) must be int64 indices, ascending,"
                    f" from 0 to {num_units - 1}: as many in all parts as a layer has {kind}"
                )

    def _tensor(self, name: str, tensor: Any) -> np.ndarray:
        if not isinstance(tensor, str) or tensor not in self.tensors:
            raise UserError(f"{name} needs the tensor {short(tensor)}, which plan.safetensors does not hold")
        return self.tensors[tensor]

    def _tensor_names(self) -> set[str]:
        """Names of the tensors that the ops read."""
        merges = [op for op in self.ops if op.get("rule") == "concatenate"]
        units = {
            name for op in merges for kind in ("heads", "neurons") for name in _unit_names(op, kind, len(op["shares"]))
        }
        return units | {op["tensor"] for op in self.ops if op["op"] == "fold"}

    def check_sizes(self, *, heads: int, neurons: int, width: int) -> None:
        """Raise `UserError` unless the tensors fit a model.

        Args:
            heads: key-value groups of an attention layer.
            neurons: hidden neurons of a feed-forward network.
            width: of the residual stream.
        """
        wanted = {"heads": heads, "neurons": neurons}
        for number, op in enumerate(self.ops):
            if op["op"] == "fold" and len(self.tensors[op["tensor"]]) != width:
                shape = list(self.tensors[op["tensor"]].shape)
                raise UserError(f"op {number} of the plan: the linear map is {shape}, the states are {width} wide")
            for kind in wanted if op.get("rule") == "concatenate" else ():
                found = sum(self.tensors[name].size for name in _unit_names(op, kind, len(op["shares"])))
                if found != wanted[kind]:
                    raise UserError(
                        f"op {number} of the plan makes a layer of {found} {kind}; the model's have {wanted[kind]}"
                    )


def _unit_names(op: dict[str, Any], kind: str, num_parts: int) -> list[str]:
    return [f"{op.get('tensors')}.{kind}.{part}" for part in range(num_parts)]


def _check_keys(name: str, op: dict[str, Any], *more: str) -> None:
    """Raise `UserError` for a key that an op has no use for: it may be meant to change weights."""
    if unknown := [key for key in op if key not in ("op", "layers", *more)]:
        raise UserError(f"{name}: {op['op']} has no {short(unknown[0])}; it has {', '.join(('op', 'layers', *more))}")


def is_layers(value: Any) -> bool:
    """Whether it is a list of layers, ascending; may be empty."""
    return (
        isinstance(value, list)
        and all(type(layer) is int and 0 <= layer < MAX_LAYERS for layer in value)
        and all(low < high for low, high in pairwise(value))
    )


def is_share(value: Any) -> bool:
    """Whether it is a number in [0, 1]."""
    return type(value) in (int, float) and 0 <= value <= 1


def is_word(value: Any) -> bool:
    """Whether it is a text of one line, maybe empty, that can be written anywhere."""
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


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


def short(value: Any) -> str:
    """The value in an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of so many digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a small file.

    Raises:
        UserError: it is missing, no file, larger, or not UTF-8.
    """
    try:
        if not path.is_file():
            problem = "it is not a file" if path.exists() else os.strerror(errno.ENOENT)
            raise UserError(f"cannot read {path}: {problem}")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise UserError(f"cannot read {path}: it has more than {max_bytes} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {number[:40]}")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and mappings are nested more than ``depth`` deep."""
    level = [value]
    for _ in range(depth):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True


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
