"""Plans that only remove layers, as mergekit's passthrough YAML, and back.

mergekit's layer ranges are half-open: ``layer_range: [0, 21]`` is layers 0 to 20. A file is read only if all that it
says is which layers of one model stay: every other key of mergekit's changes weights, their type or the tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.untrusted import MAX_LAYERS, read_text, short

_MAX_BYTES = 1 << 16  # two hundred slices of models with long names are a third of that
_MAX_DEPTH = 10  # a passthrough has six levels
_DTYPES = ("dtype", "out_dtype")


@dataclass(frozen=True)
class Passthrough:
    """What a passthrough YAML keeps of a model.

    Attributes:
        kept: original layers, ascending; at least one.
        dtype: the type in which mergekit would write the weights; None for the model's own.
    """

    kept: list[int]
    dtype: str | None = None


def to_mergekit(kept: list[int], model: str, dtype: str) -> str:
    """The YAML that keeps the layers ``kept`` (original indices, ascending) of ``model``."""
    slices: list[dict[str, Any]] = []
    start = 0
    for index in range(1, len(kept) + 1):
        if index == len(kept) or kept[index] != kept[index - 1] + 1:
            source = {"model": model, "layer_range": [kept[start], kept[index - 1] + 1]}
            slices.append({"sources": [source]})
            start = index
    return yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": dtype}, sort_keys=False)


def can_name(model: str) -> bool:
    """Whether mergekit reads the name as that of a model; it takes what follows + for an adapter, @ for a revision."""
    return not {"+", "@"}.intersection(model)


def read_passthrough(path: Path) -> Passthrough:
    """Read a passthrough YAML.

    Raises:
        UserError: the file is missing, too large, or anything but a passthrough of one model's layers in their order,
            each at most once; a key that would change weights or tokenizer is named.
    """
    try:
        values = yaml.load(read_text(path, _MAX_BYTES), _Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise _not_mergekit(path, " ".join(str(error).split())) from error  # the last four: of malformed !!int and such
    top = _mapping(path, "the file", values, required=("slices", "merge_method"), also=_DTYPES)
    if top["merge_method"] != "passthrough":
        raise UserError(f"{path}: merge_method={short(top['merge_method'])} is not passthrough: it is not a removal")
    kept: list[int] = []
    models: list[str] = []
    for number, part in enumerate(_list(path, "slices", top["slices"])):
        name = f"slices[{number}]"
        sources = _list(path, f"{name}.sources", _mapping(path, name, part, required=("sources",))["sources"])
        if len(sources) != 1:
            raise UserError(f"{path}: {name} has {len(sources)} sources; a plan's layers are of one model each")
        name = f"{name}.sources[0]"
        source = _mapping(path, name, sources[0], required=("model", "layer_range"))
        models.append(_model(path, name, source["model"]))
        low, high = _layer_range(path, name, source["layer_range"])
        if kept and low <= kept[-1]:
            raise UserError(
                f"{path}: {name}.layer_range=[{low}, {high}] repeats or reorders layers; a plan only removes them"
            )
        kept += range(low, high)
    if len(set(models)) > 1:
        raise UserError(f"{path}: it takes layers of several models ({models[0]}, ...); a plan is about one")
    dtypes = [top[key] for key in _DTYPES if top.get(key) is not None]
    if not all(isinstance(dtype, str) and dtype == dtypes[0] for dtype in dtypes):
        raise UserError(f"{path}: dtype and out_dtype are {short(dtypes)}; a plan changes no type: one name, or none")
    return Passthrough(kept, dtypes[0] if dtypes else None)


def _mapping(
    path: Path, name: str, value: Any, *, required: tuple[str, ...], also: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    """``value`` if it is a mapping with just these keys; others may stand there with nothing."""
    if not isinstance(value, dict):
        raise _not_mergekit(path, f"{name} is {short(value)}, not a mapping")
    for key in required:
        if value.get(key) is None:
            raise _not_mergekit(path, f"{name} has no {key}")
    for key in value:
        if key not in (*required, *also) and value[key] is not None:
            raise UserError(
                f"{path}: {name} has the key {short(key)}, which would change more than which layers are there; a plan"
                f" that only removes layers has {', '.join((*required, *also))}"
            )
    return value


def _list(path: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _not_mergekit(path, f"{name} is {short(value)}, not a list with something in it")
    return value


def _model(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _not_mergekit(path, f"{name}.model is {short(value)}, not a name")
    if "+" in value:
        raise UserError(f"{path}: {name}.model={value!r} adds an adapter to the model; merge it first, a plan cannot")
    return value


def _layer_range(path: Path, name: str, value: Any) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)):
        raise UserError(f"{path}: {name}.layer_range is {short(value)}; it must be two whole numbers")
    low, high = value
    if not 0 <= low < high <= MAX_LAYERS:
        raise UserError(
            f"{path}: {name}.layer_range={short(value)} holds no layer or none that a model has: [first, last + 1],"
            f" from 0 up to {MAX_LAYERS}"
        )
    return low, high


def _not_mergekit(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not mergekit's passthrough YAML with slices, sources, layer_range: {reason}")


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, of which a few lines can make gigabytes, no key twice, a few levels."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if counts and counts.most_common(1)[0][1] > 1:
            raise yaml.YAMLError(f"the key {short(counts.most_common(1)[0][0])} stands there twice")
        return super().construct_mapping(node, deep)
