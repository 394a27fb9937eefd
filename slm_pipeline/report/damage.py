"""Files of a run that others may have cut off, emptied or replaced: read if they are whole, else why not, in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is written in C, and not everywhere
_LARGEST = 1e100  # squares of such numbers are still numbers


class Damaged(Exception):
    """The file is not what it was; the message says why."""


def read_json(path: Path, shape: Any = None) -> Any:
    """The content of a JSON file, None if there is none.

    Args:
        shape: what is relied on, see `fault`.

    Raises:
        Damaged: it cannot be read, or lacks what is relied on.
    """
    return _read(path, json.loads, "JSON", shape)


def read_yaml(path: Path, shape: Any = None) -> Any:
    """The same of YAML; an empty file is None."""
    return _read(path, lambda content: yaml.load(content, _Loader), "YAML", shape)


def read_lines(path: Path, shape: Any) -> list[Any]:
    """The JSON objects of a log, one a line; those that are cut off, or of another shape, are left out."""
    found = []
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if fault(row, shape) is None:
            found.append(row)
    return found


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise Damaged(f"{path.name} is not a file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path.is_symlink():
            raise Damaged(f"{path.name} is a dangling link") from None
        return ""
    except UnicodeDecodeError as error:
        raise Damaged(f"{path.name} is not UTF-8") from error
    except (OSError, ValueError) as error:
        raise Damaged(f"{path.name}: {getattr(error, 'strerror', None) or error}") from error


def _read(path: Path, parse: Callable[[str], Any], what: str, shape: Any) -> Any:
    content = _text(path)
    if not content.strip():
        if what == "JSON" and path.exists():
            raise Damaged(f"{path.name} is empty")
        return None
    try:
        found = parse(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise Damaged(f"{path.name} is cut off, or not {what}") from error
    if shape is not None and (wrong := fault(found, shape)):
        raise Damaged(f"{path.name}: {wrong}")
    return found


# What a value may be: one of these functions; [shape] for a list, {str: shape} for an object with any keys,
# {"key": shape, "key?": shape} for one that has the first and may have the second, among others.


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else "text"


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def number(value: Any) -> str | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
    return None if good else "a number"


def count(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1e18
    return None if good else "a count"


def layer(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1e6
    return None if good else "a layer's index"


def scalar(value: Any) -> str | None:
    return number(value) and text(value) and "a number or text"


def maybe(shape: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """Or null."""
    return lambda value: None if value is None else shape(value)


def fault(value: Any, shape: Any, where: str = "") -> str | None:
    """The first place at which a value has not the shape, and what belongs there; None if there is none."""
    if callable(shape):
        wanted = shape(value)
        return None if wanted is None else f"{where or 'it'} is {_short(value)}, not {wanted}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where or 'it'} is {_short(value)}, not a list"
        return _first(value, shape * len(value), [f"{where}[{i}]" for i in range(len(value))])
    if not isinstance(value, dict):
        return f"{where or 'it'} is {_short(value)}, not an object"
    if str in shape:
        return _first(value.values(), [shape[str]] * len(value), [_below(where, key) for key in value])
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if name in value:
            if wrong := fault(value[name], inner, _below(where, name)):
                return wrong
        elif name == key:
            return f"{_below(where, name)} is not there"
    return None


def _first(values: Any, shapes: Sequence[Any], places: Sequence[str]) -> str | None:
    found = (fault(value, shape, place) for value, shape, place in zip(values, shapes, places, strict=True))
    return next((wrong for wrong in found if wrong), None)


def _below(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _short(value: Any) -> str:
    try:
        said = json.dumps(value)
    except RecursionError:
        return "nested too deeply"
    return said if len(said) <= 40 else f"{said[:37]}..."


_NUMBER = {
    "value": number, "unit?": text, "stderr?": maybe(number), "higher_is_better?": maybe(flag), "detail?": flag,
    "cost?": flag, "measured?": {"how?": text, "limit?": maybe(count), "num_examples?": count},
}  # fmt: skip
_COUNTS = {"dense": count, "pruned": count}
_SCORE = {
    "score": number, "stderr": maybe(number), "limit": maybe(number), "num_examples": count, "batch_size": scalar,
    "lm_eval_version": scalar,
}  # fmt: skip
_PERPLEXITY = {
    "perplexity": number, "num_tokens": number, "window": number, "stride": maybe(number), "bos": flag,
    "split?": maybe(text),
}  # fmt: skip
_EFFICIENCY = {
    "tokens_per_second?": maybe(number), "latency_seconds?": maybe(number), "weights_gb?": maybe(number),
    "peak_memory_gb?": maybe(number), "device": scalar, "dtype": scalar, "batch_size": number, "output_len": number,
    "num_runs": number, "num_warmup": number,
}  # fmt: skip

_CHANGES = {
    "lines": [text],
    "marks": [{"label": text, "layers": [layer], "part": text}],
    "idle_parameters": number,
}
_DIVERGENCE = {"kl": number, "same_top_1": number}

# What a report relies on in a summary.json.
SUMMARY: Mapping[str, Any] = {
    "command?": text,
    "fingerprint?": text,
    "threshold?": maybe(number),
    "num_layers?": _COUNTS,
    "parameters?": _COUNTS,
    "latency?": {
        "asked": number,
        "predicted": number,
        "device": scalar,
        "mode": scalar,
        "batch_size": number,
        "context": number,
    },
    "layer_groups?": [[layer]],
    "dropped?": [layer],
    "changes?": _CHANGES,
    "sublayers?": {"attention?": [layer], "mlp?": [layer]},
    "numbers?": {str: _NUMBER},
    "metrics?": {str: {"zero_shot?": {str: number}, "perplexity?": {str: _PERPLEXITY}}},
    "details?": {str: {"zero_shot?": {str: _SCORE}}},
    "efficiency?": {str: _EFFICIENCY},
    "plan_seconds?": number,
    "windows?": {"evaluations": number, "evaluated": number},
    "repair?": {
        "name": text,
        "num_tokens?": number,
        "seconds": number,
        "divergence?": {"pruned": _DIVERGENCE, "repaired": _DIVERGENCE},
        "changes?": _CHANGES,
    },
    "recovery?": {"name": text, "num_tokens": number, "seconds": number, "loss?": text},
    "stages": {str: {"seconds": number, "reused": flag, "peak_memory_gb?": maybe(number), "path?": text}},
    "warnings?": [text],
}
FAILURE: Mapping[str, Any] = {"error": text}
PLAN: Mapping[str, Any] = {
    "threshold?": maybe(number),
    "scores": {"steps?": [{"similarity": number, "accepted": flag}]},
}
_LOSSES = {f"{name}?": number for name in ("loss", "eval_loss", "logit_loss", "logit_eval_loss")}
CURVE_ROW: Mapping[str, Any] = {"step": number, **_LOSSES}
LOGGED_ROW: Mapping[str, Any] = {"stage": text, **CURVE_ROW}
