"""The plan: a method's whole decision, readable and replayable. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from slm_pipeline.artifacts import digest, write_json
from slm_pipeline.errors import UserError
from slm_pipeline.surgery.merge_rules import RULES

if TYPE_CHECKING:
    from slm_pipeline.models.source import ModelSource

log = logging.getLogger(__name__)

FORMAT = 1
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
        calibration: fingerprint of the token ids and their number.
        threshold: the similarity floor that was used, None for methods without one.
        layer_groups: the pruned model's layers in order, each given by the original layers merged into it.
        dropped: original layers that are in no group.
        ops: edits, applied in order; ``layers`` are always original indices, input side first.
        scores: the method's own measurements; its docstring explains them.
        tensors: what ops refer to by name; kept in plan.safetensors beside plan.json.
    """

    model: dict[str, Any]
    method: str
    options: dict[str, Any]
    calibration: dict[str, Any]
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

    def decision(self) -> str:
        """A digest of everything that replaying the plan reads, shapes and measurements too: a plan that was put right
        is another one, although its edits may be the same."""
        tensors = {name: [str(value.dtype), list(value.shape)] for name, value in self.tensors.items()}
        text = json.dumps([{**vars(self), "tensors": tensors}, self.content()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write plan.json and, if there are tensors, plan.safetensors beside it, the latter first."""
        if self.tensors:
            temporary = path.with_suffix(".safetensors.partial")
            save_file(self.tensors, temporary)
            os.replace(temporary, path.with_suffix(".safetensors"))
        values = asdict(self)
        del values["tensors"]
        write_json(path, values)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read and check a plan.json.

        Raises:
            UserError: the file is missing, is not a plan of this format, or contradicts itself.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the plan {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} is not a plan: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{path} is not a plan of format {FORMAT}")
        tensors = path.with_suffix(".safetensors")
        try:
            plan = cls(**values, tensors=load_file(tensors) if tensors.is_file() else {})
        except (TypeError, SafetensorError) as error:
            raise UserError(f"{path} is not a plan: {error}") from error
        plan.check(str(path))
        return plan

    def check(self, where: str) -> None:
        """Raise `UserError` unless groups and dropped layers are a partition of the dense layers, in order, to which
        the ops lead."""
        depth = self.model.get("num_layers")
        kept = [layer for group in self.layer_groups for layer in group]
        if not all(self.layer_groups) or kept != sorted(kept) or sorted(kept + self.dropped) != list(range(depth or 0)):
            raise UserError(f"{where}: layer_groups and dropped must name each of the {depth} layers once, in order")
        self._check_ops(where, list(range(depth or 0)))

    def check_model(self, source: ModelSource, where: str) -> None:
        """Raise `UserError` unless the plan fits the model's depth, if that is known; warn if it is another model's."""
        depth = self.model["num_layers"]
        if source.num_layers not in (None, depth):
            raise UserError(f"{where} is a plan for {depth} layers; {source.name} has {source.num_layers}")
        if self.model["fingerprint"] != source.fingerprint:
            log.warning("%s was made for %s, not for %s", where, self.model["name"], source.name)

    def _check_ops(self, where: str, layers: list[int]) -> None:
        """Raise `UserError` unless the ops are complete and lead to the layer groups."""
        groups = {layer: [layer] for layer in layers}  # by the lowest layer of each
        cut: set[int] = set()  # layers that lost a sublayer: nothing else may happen to them
        exports = {op.get("export") for op in self.ops if op.get("op") == "drop_sublayer"}
        if len(exports) > 1:
            raise UserError(f"{where}: missing sublayers are written in one way, not as {', '.join(map(str, exports))}")
        for number, op in enumerate(self.ops):
            name = f"{where}: op {number}"
            if op.get("op") not in OPS:
                raise UserError(f"{name} is {op.get('op')!r}; this version knows {', '.join(OPS)}")
            members = sorted(set(op.get("layers", [])))
            if cut.intersection(members):
                raise UserError(f"{name}: layers={members} have lost a sublayer already, which is the last that may be")
            if op["op"] == "drop_sublayer":
                cut |= set(members)
            if op["op"] in ("drop_sublayer", "fold"):
                self._check_in_layer(name, op, groups)
                continue
            touched = [groups.pop(layer) for layer in members if layer in groups]
            if not touched or sorted(layer for group in touched for layer in group) != members:
                raise UserError(f"{name}: layers={op.get('layers')} are not whole layers of the model at that point")
            if op["op"] == "merge":
                groups[members[0]] = members
                self._check_merge(name, op, len(touched))
        if [groups[layer] for layer in sorted(groups)] != self.layer_groups:
            raise UserError(f"{where}: its ops do not lead to its layer_groups")

    def _check_in_layer(self, name: str, op: dict[str, Any], groups: dict[int, list[int]]) -> None:
        """Raise `UserError` unless an op on something within one layer is complete."""
        layers = op.get("layers")
        if not isinstance(layers, list) or len(layers) != 1 or layers[0] not in groups:
            raise UserError(f"{name}: layers={layers} is not one layer of the model at that point")
        if op["op"] == "drop_sublayer":
            if op.get("sublayer") not in SUBLAYERS:
                raise UserError(f"{name}: sublayer={op.get('sublayer')!r} is not one of {', '.join(SUBLAYERS)}")
            if op.get("export") not in EXPORTS:
                raise UserError(f"{name}: export={op.get('export')!r} is not one of {', '.join(EXPORTS)}")
        elif op.get("tensor") not in self.tensors:
            raise UserError(f"{name} needs the tensor {op.get('tensor')}, which plan.safetensors does not hold")

    def _check_merge(self, name: str, op: dict[str, Any], num_parts: int) -> None:
        rule = op.get("rule")
        if rule not in (*RULES, *SHARING_RULES):
            raise UserError(f"{name}: rule={rule!r} is not one of {', '.join((*RULES, *SHARING_RULES))}")
        if rule == "concatenate":
            needed = [
                f"{op.get('tensors')}.{kind}.{part}" for kind in ("heads", "neurons") for part in range(num_parts)
            ]
            if missing := [tensor for tensor in needed if tensor not in self.tensors]:
                raise UserError(f"{name} needs the tensor {missing[0]}, which plan.safetensors does not hold")
        if rule in SHARING_RULES and len(op.get("shares", [])) != num_parts:
            raise UserError(f"{name} needs one share for each of its {num_parts} parts")


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
