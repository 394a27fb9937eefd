"""The settings under which a number was measured are part of what it is: two windows, two perplexities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slm_pipeline.results.devices import device_of
from slm_pipeline.results.number import Number

# Whose it is, words for people, what follows from the text, and devices: `devices` compares nothing across them
_ASIDE = ("how", "measure", "part", "chance", "device")
_LONGEST = 12  # characters of a value in a name


def settings(number: Number) -> dict[str, Any]:
    """What two numbers of one key have to agree in, to be compared.

    Counts follow from the text and the tokenizer. The batch size moves scores and perplexities by rounding alone; of
    speed, or whatever else belongs to a device, it is the first thing to know.
    """
    is_speed = number.measured.get("measure") == "efficiency" or device_of(number) is not None
    aside = _ASIDE if is_speed else (*_ASIDE, "batch_size")
    return {
        name: value
        for name, value in number.measured.items()
        if name not in aside and not name.startswith("num_") and not name.endswith("_stderr")
    }


def told_apart(runs: Sequence[Mapping[str, Number]]) -> tuple[list[dict[str, Number]], dict[str, str]]:
    """The runs' numbers under keys that say in which settings they differ, where they do.

    ``pruned/perplexity/bundled`` of windows of 1,024 and of 2,048 tokens becomes
    ``pruned/perplexity/bundled[window=1024]`` and ``...[window=2048]``.

    Returns:
        For each run its numbers by key, and the keys that were made longer with what they were before.
    """
    names = {
        key: _names([run[key] for run in runs if key in run]) for key in dict.fromkeys(k for run in runs for k in run)
    }
    found: list[dict[str, Number]] = []
    for run in runs:
        numbers = (replace(number, key=names[key][_fixed(settings(number))]) for key, number in run.items())
        found.append({number.key: number for number in numbers})
    return found, {name: key for key, ways in names.items() for name in ways.values() if name != key}


def _names(numbers: Sequence[Number]) -> dict[str, str]:
    """Settings, as JSON, of numbers of one key -> the key that says in what they differ."""
    ways = {_fixed(settings(number)): settings(number) for number in numbers}
    key = numbers[0].key
    differing = _differing(list(ways.values()))
    found: dict[str, str] = {}
    for fixed, known in ways.items():
        said = ",".join(f"{name}={_shown(known[name])}" for name in differing if name in known)
        name = f"{key}[{said}]" if differing else key
        same = sum(other == name or other.startswith(f"{name}#") for other in found.values())  # alike as far as shown
        found[fixed] = f"{name}#{same + 1}" if same and differing else name
    return found


def _differing(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that are not the same in all; one that is not there is as good as null."""
    names = dict.fromkeys(name for way in ways for name in way)
    return [name for name in names if len({_fixed(way.get(name)) for way in ways}) > 1]


def _fixed(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ("+".join(map(str, value)) if isinstance(value, list) else str(value))[:_LONGEST].strip()
