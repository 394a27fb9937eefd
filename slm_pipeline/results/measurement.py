"""How the numbers of a run were measured, in words, and how far off they may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slm_pipeline.results.number import PERCENT, Number
from slm_pipeline.results.of_run import Summary, numbers_of, zeroed_parameters
from slm_pipeline.show.tables import in_order

_NAMED = 2  # so many parts of a measure are named one by one though all were measured alike


def measurement(summary: Summary, *, costs: bool = True) -> list[str]:
    """Settings behind the numbers. Models measured alike share a line; else each line says whose it is.

    Args:
        costs: say of the seconds too what is to be known.
    """
    numbers = numbers_of(summary)
    everyone = in_order(number.target for number in numbers.values() if number.target)
    said: dict[str, list[str]] = {}
    for target in everyone:
        for line in _settings([number for number in numbers.values() if number.target == target]):
            said.setdefault(line, []).append(target)
    lines = [line if targets == everyone else f"{', '.join(targets)}: {line}" for line, targets in said.items()]
    lines += _shared_windows(summary) if costs else []
    if zeroed_parameters(summary):
        lines.append("parameters: those at work; the checkpoint also holds those of the removed sublayers, as zeros")
    return lines


def _settings(numbers: Iterable[Number]) -> list[str]:
    """A line for each measure, or for its parts that were measured in another way."""
    measures: dict[str, dict[str, list[str]]] = {}
    for number in numbers:
        if how := number.measured.get("how"):
            parts = measures.setdefault(str(number.measured.get("measure", "")), {}).setdefault(str(how), [])
            parts.append(str(number.measured.get("part", "")))
    lines = []
    for measure, ways in measures.items():
        for how, parts in ways.items():
            names = in_order(part for part in parts if part)
            named = names if len(ways) > 1 or len(names) <= _NAMED else []
            lines.append(f"{' '.join(filter(None, [measure.replace('_', '-'), ', '.join(named)]))}: {how}")
    return lines


def small_limit(summaries: Iterable[Summary]) -> list[str]:
    """Says how far a score on part of a task can be off, so that nobody takes it for the real one."""
    limited = [
        number
        for summary in summaries
        for number in numbers_of(summary).values()
        if number.unit == PERCENT and number.stderr is not None and number.measured.get("limit") is not None
    ]
    if not limited:
        return []
    fewest = min(number.measured.get("num_examples", number.measured["limit"]) for number in limited)
    worst = max(number.stderr or 0.0 for number in limited)
    return [
        f"{fewest} examples a task: +-{worst:.0f} points (one standard error) on a score; use evaluation=zero_shot for"
        " real numbers"
    ]


def _shared_windows(summary: Summary) -> list[str]:
    windows: Mapping[str, int] = summary.get("windows", {"evaluations": 0, "evaluated": 0})
    if windows["evaluations"] == windows["evaluated"]:
        return []
    return ["plan_seconds: without the windows that an earlier search had evaluated"]
