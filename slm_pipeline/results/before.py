"""What was written before numbers had keys: the numbers of such a summary.json, and the names of its columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_pipeline.config import TARGETS
from slm_pipeline.results.number import PERCENT, Number

_EFFICIENCY = {
    "tokens_per_second": "tokens/s",
    "latency_seconds": "seconds",
    "weights_gb": "GB",
    "peak_memory_gb": "GB",
}
_COLUMNS = {"layers": "num_layers", "plan seconds": "plan_seconds", "tokens": "recovery/num_tokens"}
_COLUMNS |= {"recovery seconds": "recovery/seconds", "recovery GB": "recovery/peak_memory_gb"}
_OF_EFFICIENCY = {"tokens per second": "tokens_per_second", "latency seconds": "latency_seconds"}
_OF_EFFICIENCY |= {"weights GB": "weights_gb", "peak GB": "peak_memory_gb"}

_OF_PERPLEXITY = ("split", "sha256", "window", "stride", "bos", "max_tokens", "num_tokens", "batch_size")
_OF_TASKS = ("metric", "num_examples", "limit", "batch_size", "lm_eval_version", "task_version")


def key_of(column: str) -> str:
    """``perplexity bundled pruned`` -> ``pruned/perplexity/bundled``; itself if it is no such name."""
    quantity, _, target = column.rpartition(" ")
    if target not in TARGETS:
        return _COLUMNS.get(column, column)
    if quantity in _OF_EFFICIENCY:
        return f"{target}/efficiency/{_OF_EFFICIENCY[quantity]}"
    return f"{target}/{quantity.replace('perplexity ', 'perplexity/', 1)}"


def measured(summary: Mapping[str, Any]) -> list[Number]:
    """Perplexities, scores with their average, and efficiency, of each model."""
    found = []
    for target in TARGETS:
        metrics = summary.get("metrics", {}).get(target, {})
        details = summary.get("details", {}).get(f"evaluate_{target}", {}).get("zero_shot", {})
        perplexities = metrics.get("perplexity", {})
        for corpus, label in _labels(perplexities).items():
            said = perplexities[corpus]
            about: dict[str, Any] = {
                "measure": "perplexity",
                "part": corpus,
                "how": _perplexity(said),
                **_known(said, _OF_PERPLEXITY),
            }
            number = Number(label, said["perplexity"], "perplexity", None, False, about)
            found.append(number.below(target, "perplexity"))
        found += _efficiency(target, summary.get("efficiency", {}).get(target, {}))
        errors = {task: one["stderr"] for task, one in details.items() if one["stderr"] is not None}
        if errors and len(errors) == len(details):
            errors["average"] = math.sqrt(sum(error**2 for error in errors.values())) / len(errors)
        for task, score in metrics.get("zero_shot", {}).items():
            about = {"measure": "zero_shot", "part": task}
            if task == "average":
                about = {"measure": "zero_shot", "tasks": [one for one in metrics["zero_shot"] if one != task]}
            if task in details:
                about |= {"how": _zero_shot(details[task]), **_known(details[task], _OF_TASKS)}
            number = Number(task, score, PERCENT, errors.get(task), True, about, detail=task != "average")
            found.append(number.below(target))
    return found


def _efficiency(target: str, said: Mapping[str, Any]) -> list[Number]:
    found = []
    for name, unit in _EFFICIENCY.items():
        if said.get(name) is not None:
            how = (
                f"{said['device']}, {said['dtype']}, batch size {said['batch_size']}, {said['output_len']} new tokens,"
                f" mean of {said['num_runs'] - said['num_warmup']} runs after {said['num_warmup']} to warm up"
            )
            about = {"measure": "efficiency", "part": "", "how": how}
            speed = name == "tokens_per_second"
            number = Number(name, said[name], unit, None, speed, about, detail=not speed)
            found.append(number.below(target, "efficiency"))
    return found


def _labels(corpora: Iterable[str]) -> dict[str, str]:
    names = {corpus: Path(corpus).name for corpus in corpora}
    counts = Counter(names.values())
    return {corpus: name if counts[name] == 1 else corpus for corpus, name in names.items()}


def _known(said: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: said[name] for name in names if name in said}


def _zero_shot(said: Mapping[str, Any]) -> str:
    examples = "all examples" if said["limit"] is None else f"the first {said['limit']} examples of each task"
    return f"lm-eval {said['lm_eval_version']}, {examples}, batch size {said['batch_size']}"


def with_limits(numbers: Mapping[str, Number]) -> dict[str, Number]:
    """The numbers; the limit of an average of tasks, if it was not written down, is that which all its tasks have."""
    found = dict(numbers)
    for key, number in numbers.items():
        about = number.measured
        if about.get("measure") == "zero_shot" and "tasks" in about and "limit" not in about:
            start = key.removesuffix("average")
            limits = {
                numbers[f"{start}{task}"].measured.get("limit") for task in about["tasks"] if start + task in numbers
            }
            limit = limits.pop() if len(limits) == 1 else None
            found[key] = replace(number, measured={**about, "limit": limit})
    return found


def _perplexity(said: Mapping[str, Any]) -> str:
    overlap = "not overlapping" if said["stride"] is None else f"the last {said['stride']} tokens of each scored"
    split = f"{said['split']} split, " if said.get("split", "file") != "file" else ""
    bos = "BOS before each" if said["bos"] else "no BOS"
    return f"{split}{said['num_tokens']} tokens scored, windows of {said['window']} tokens, {overlap}, {bos}"
