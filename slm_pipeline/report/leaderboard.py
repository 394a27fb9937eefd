"""Who is best at each size: the last model of every run, whatever made it, beside those that are as large."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from slm_pipeline.config import TARGETS
from slm_pipeline.report.study import Study, mean_and_deviation, text_of
from slm_pipeline.results.number import Number, parted
from slm_pipeline.results.of_run import parameters_at_work

STEP = 5  # percent of the dense model's parameters: runs whose share rounds to the same multiple are of one size
PLACES = 3  # shown of each size
_SURE = 1.96  # standard errors: 95 % of a normal distribution


@dataclass(frozen=True)
class Place:
    """Runs that differ in seeds alone.

    Attributes:
        runs: their indices in the study.
        number: the mean; its error is the standard deviation over the runs, of one run that of its number.
        removed: percent of the dense model's parameters that do no work any more, mean over the runs.
        ties: whether it differs from the best of its size by less than what is sure at 95 %.
    """

    runs: Sequence[int]
    number: Number
    removed: float
    ties: bool = False


@dataclass(frozen=True)
class Board:
    """The best of each size, of one dense model and measured in one way.

    Attributes:
        model: the dense model.
        quantity: what they are compared by.
        how: how it was measured, in words; empty if unknown.
        sizes: percent removed, a multiple of `STEP` -> the best runs, best first; the smallest cut first.
    """

    model: str
    quantity: str
    how: str
    sizes: dict[int, list[Place]]


def outcome(study: Study, run: int) -> Number | None:
    """The run's metric, else the number of that kind of its last model: recovered, repaired or pruned."""
    found = study.numbers[run]
    if study.metric is None or study.metric in found:
        return found.get(study.metric or "")
    target, quantity = parted(study.metric)
    names = [f"{other}/{quantity}" for other in reversed(TARGETS) if target and other != "dense"]
    return next((found[name] for name in names if name in found), None)


def leaderboards(study: Study) -> list[Board]:
    """A board for each dense model and way of measuring, that of most runs first; none without a metric of a model."""
    target, quantity = parted(study.metric or "")
    if not target or target == "dense":
        return []
    boards: dict[tuple[str, str], dict[int, list[Place]]] = {}
    hows: dict[tuple[str, str], str] = {}
    for key, place in _places(study):
        hows[key] = str(place.number.measured.get("how", ""))
        boards.setdefault(key, {}).setdefault(STEP * round(place.removed / STEP), []).append(place)
    found = [
        Board(model, quantity, hows[model, how], {size: _ranked(sizes[size]) for size in sorted(sizes)})
        for (model, how), sizes in boards.items()
    ]
    return sorted(found, key=lambda board: -sum(len(place.runs) for size in board.sizes.values() for place in size))


def label(study: Study, place: Place) -> str:
    """What its runs were told, as far as runs differ in that; a single job's folder where they differ in nothing."""
    run = study.runs[place.runs[0]]
    told = [
        name for name in study.varied if name not in ("name", "model") and run.option(name) not in (None, "", "none")
    ]
    words = [text_of(run.option(name)) if "." not in name else f"{name}={text_of(run.option(name))}" for name in told]
    return ", ".join(words) or f"job {run.job}"


def _places(study: Study) -> Iterator[tuple[tuple[str, str], Place]]:
    """Each with the dense model, and how its number was measured, as JSON."""
    for members in study.groups(study.varied).values():
        alike: dict[tuple[str, str, str], list[tuple[int, Number]]] = {}
        for i in members:
            number, summary = outcome(study, i), study.runs[i].summary or {}
            if number is None or not summary.get("parameters") or not (study.newest[i] and study.within_budget[i]):
                continue
            measured = json.dumps(dict(number.measured), sort_keys=True, default=str)
            alike.setdefault((str(summary.get("model", "")), measured, number.target), []).append((i, number))
        for (model, measured, _), found in alike.items():
            runs, numbers = [i for i, _ in found], [number for _, number in found]
            mean, deviation = mean_and_deviation([number.value for number in numbers])
            number = replace(numbers[0], value=mean, stderr=deviation if len(numbers) > 1 else numbers[0].stderr)
            yield (model, measured), Place(runs, number, statistics.fmean(_removed(study, i) for i in runs))


def _removed(study: Study, run: int) -> float:
    summary = study.runs[run].summary or {}
    return 100 * (1 - parameters_at_work(summary) / summary["parameters"]["dense"])


def _ranked(places: Sequence[Place]) -> list[Place]:
    sign = -1 if places[0].number.higher_is_better else 1
    ordered = sorted(places, key=lambda place: sign * place.number.value)
    best = ordered[0]
    return [best, *(replace(place, ties=_alike(best, place)) for place in ordered[1:])]


def _alike(one: Place, other: Place) -> bool:
    if one.number.value == other.number.value:
        return True
    errors = [_error_of_mean(place) for place in (one, other)]
    if any(error is None for error in errors):
        return False
    return abs(one.number.value - other.number.value) <= _SURE * math.hypot(*(error or 0.0 for error in errors))


def _error_of_mean(place: Place) -> float | None:
    return None if place.number.stderr is None else place.number.stderr / math.sqrt(len(place.runs))
