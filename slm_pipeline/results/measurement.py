"""How the numbers of a summary were measured, in words, and how far off they may be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slm_pipeline.surgery.changes import Changes

Summary = Mapping[str, Any]  # what summary.json holds


def metrics_of(summary: Summary) -> Mapping[str, Any]:
    """Scores and perplexities by model: dense, pruned, recovered."""
    metrics: Mapping[str, Any] = summary.get("metrics", {})
    return metrics


def corpus_labels(corpora: Iterable[str]) -> dict[str, str]:
    """What tables call each corpus: the name of its file, or its whole path where two files have one name."""
    names = {corpus: Path(corpus).name for corpus in corpora}
    counts = Counter(names.values())
    return {corpus: name if counts[name] == 1 else corpus for corpus, name in names.items()}


def zeroed_parameters(summary: Summary) -> int:
    """Parameters that the pruned checkpoint holds and that do nothing, because their sublayers were removed."""
    return Changes.of(summary).idle_parameters


def parameters_at_work(summary: Summary) -> int:
    """Parameters of the pruned model: what ratios, columns and axes count, whatever else the checkpoint holds."""
    return int(summary["parameters"]["pruned"]) - zeroed_parameters(summary)


def task_details(summary: Summary, target: str) -> Mapping[str, Any]:
    """The zero-shot scores of one model by task, each with its standard error and settings."""
    scores: Mapping[str, Any] = summary.get("details", {}).get(f"evaluate_{target}", {}).get("zero_shot", {})
    return scores


def standard_errors(summary: Summary, target: str) -> dict[str, float]:
    """Standard error of each score, and of their average as of independent numbers; in percentage points."""
    details = task_details(summary, target)
    errors = {task: found["stderr"] for task, found in details.items() if found["stderr"] is not None}
    if errors and len(errors) == len(details):
        errors["average"] = math.sqrt(sum(error**2 for error in errors.values())) / len(errors)
    return errors


def measurement(summary: Summary, *, costs: bool = True) -> list[str]:
    """Settings behind the numbers. Models measured alike share a line; else each line says whose it is.

    Args:
        costs: say of the seconds too what is to be known.
    """
    said: dict[str, list[str]] = {}
    for target, found in metrics_of(summary).items():
        lines = _zero_shot_settings(task_details(summary, target))
        lines += [_perplexity_settings(corpus, value) for corpus, value in found.get("perplexity", {}).items()]
        for line in lines:
            said.setdefault(line, []).append(target)
    everyone = list(metrics_of(summary))
    lines = [line if targets == everyone else f"{', '.join(targets)}: {line}" for line, targets in said.items()]
    lines += _efficiency_settings(summary) + (_shared_windows(summary) if costs else [])
    if zeroed_parameters(summary):
        lines.append("parameters: those at work; the checkpoint also holds those of the removed sublayers, as zeros")
    return lines


def _zero_shot_settings(details: Mapping[str, Any]) -> list[str]:
    tasks_of: dict[tuple[Any, ...], list[str]] = {}
    for task, found in details.items():
        tasks_of.setdefault((found["lm_eval_version"], found["limit"], found["batch_size"]), []).append(task)
    lines = []
    for (version, limit, batch_size), tasks in tasks_of.items():
        examples = "all examples" if limit is None else f"the first {limit} examples of each task"
        which = "zero-shot" if len(tasks_of) == 1 else f"zero-shot {', '.join(tasks)}"
        lines.append(f"{which}: lm-eval {version}, {examples}, batch size {batch_size}")
    return lines


def _perplexity_settings(corpus: str, found: Mapping[str, Any]) -> str:
    overlap = "not overlapping" if found["stride"] is None else f"the last {found['stride']} tokens of each scored"
    bos = "BOS before each" if found["bos"] else "no BOS"
    split = f" ({found['split']})" if found.get("split") else ""
    tokens = f"{found['num_tokens']} tokens scored"
    return f"perplexity {corpus}{split}: {tokens}, windows of {found['window']} tokens, {overlap}, {bos}"


def small_limit(summaries: Iterable[Summary]) -> list[str]:
    """Says how far a score on part of a task can be off, so that nobody takes it for the real one."""
    scores = [
        found
        for summary in summaries
        for target in metrics_of(summary)
        for found in task_details(summary, target).values()
        if found["limit"] is not None and found["stderr"] is not None
    ]
    if not scores:
        return []
    fewest = min(found["num_examples"] for found in scores)
    worst = max(found["stderr"] for found in scores)
    return [
        f"{fewest} examples a task: +-{worst:.0f} points (one standard error) on a score; use evaluation=zero_shot for"
        " real numbers"
    ]


def _shared_windows(summary: Summary) -> list[str]:
    windows = summary.get("windows", {"evaluations": 0, "evaluated": 0})
    if windows["evaluations"] == windows["evaluated"]:
        return []
    return ["plan seconds: without the windows that an earlier search had evaluated"]


def _efficiency_settings(summary: Summary) -> list[str]:
    lines = (
        f"efficiency: {found['device']}, {found['dtype']}, batch size {found['batch_size']}, {found['output_len']} new"
        f" tokens, mean of {found['num_runs'] - found['num_warmup']} runs after {found['num_warmup']} to warm up"
        for found in summary.get("efficiency", {}).values()
    )
    return list(dict.fromkeys(lines))
