"""Who is best at each size: the last model of every run, whatever made it, beside those that are as large.

`slm_pipeline.report.winners` compares runs by the metric of a study, which has one question. Here many studies meet, of
several models, recovered and not: each dense model and way of measuring has a board of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slm_pipeline.config import TARGETS
from slm_pipeline.report.runs import text_of
from slm_pipeline.report.study import Study, plain
from slm_pipeline.report.winners import Choice, choice_of, winners
from slm_pipeline.results.devices import device_of
from slm_pipeline.results.number import Number, parted
from slm_pipeline.results.of_run import parameters_at_work
from slm_pipeline.results.settings import settings
from slm_pipeline.show.tables import Table

STEP = 5  # percent of the dense model's parameters: runs whose share rounds to the same multiple are of one size
PLACES = 3  # shown of each size
TIED = "~"  # as in the table of a run


@dataclass(frozen=True)
class Place:
    """Runs that differ in seeds alone; ``ties``: noise does not tell them from the best of their size."""

    choice: Choice
    ties: bool


@dataclass(frozen=True)
class Size:
    """The runs that lost about so many percent of the parameters, best first; ``on_front``: no smaller is as good."""

    removed: int
    places: list[Place]
    on_front: bool

    @property
    def name(self) -> str:
        """With a mark if it is not on the front."""
        return (f"{self.removed}% less" if self.removed else "as many") + ("" if self.on_front else "*")


@dataclass(frozen=True)
class Board:
    """The best of each size, of one dense model and measured in one way.

    Attributes:
        model: the dense model.
        quantity: what they are compared by.
        how: how it was measured, in words; empty if unknown.
        sizes: the smallest cut first.
    """

    model: str
    quantity: str
    how: str
    sizes: list[Size]

    @property
    def tells(self) -> bool:
        """Whether there is anything to choose from."""
        return sum(len(size.places) for size in self.sizes) > 1

    def title(self, *, several: bool) -> str:
        """What it is; ``several``: there are others, of other models."""
        return f"Best at each size: {self.quantity}" + (f", {self.model}" if several else "")

    @property
    def note(self) -> str:
        """What its numbers and marks mean."""
        direction = self.sizes[0].places[0].choice.metric.direction
        shown = [place for size in self.sizes for place in size.places[:PLACES]]
        parts = [
            f"the last model of each run, sizes to the nearest {STEP}% of the parameters",
            f"{direction} is better" if direction else "",
            self.how,
            f"{TIED}: noise does not tell it from the best" if any(place.ties for place in shown) else "",
            "*: a smaller one is as good" if any(not size.on_front for size in self.sizes) else "",
        ]
        return "; ".join(filter(None, parts))


def leaderboards(study: Study) -> list[Board]:
    """A board for each dense model and way of measuring, that of most choices first; none without a model's metric."""
    target, quantity = parted(plain(study.metric or ""))
    if not target or target == "dense":
        return []
    boards: dict[tuple[str, str], list[Choice]] = {}
    for key, choice in _choices(study):
        boards.setdefault(key, []).append(choice)
    found = []
    for (model, _), choices in sorted(boards.items(), key=lambda item: -len(item[1])):
        how = str(next((study.numbers[c.runs[0]][c.metric.key].measured.get("how", "") for c in choices), ""))
        found.append(Board(model, quantity, how, _sizes(choices, bool(choices[0].metric.higher_is_better))))
    return found


def is_mixed(study: Study) -> bool:
    """Whether the last model of some runs is another than that of the metric, so that boards alone hold all runs."""
    return any(study.metric not in study.numbers[run] and study.outcome(run) for run in range(len(study.runs)))


def table(study: Study, board: Board, places: int = PLACES) -> Table:
    """The first places of each size, for a document or a terminal."""
    rows: list[list[str]] = []
    bold: set[tuple[int, int]] = set()
    for size in board.sizes:
        for rank, place in enumerate(size.places[:places]):
            choice = place.choice
            jobs = study.runs[choice.runs[0]].job + (f" and {len(choice.runs) - 1} more" * (len(choice.runs) > 1))
            mark = TIED if place.ties else f"{rank + 1}."
            if size.on_front and (rank == 0 or place.ties):
                bold.add((len(rows), 2))
            named = "" if rank else size.name
            rows.append([named, mark, str(choice.metric), label(study, choice), choice.metric.target, jobs])
    return Table(["size", "", board.quantity, "run", "model", "job"], rows, frozenset(bold))


def label(study: Study, choice: Choice) -> str:
    """What its runs were told, as far as runs differ in that and the number depends on it; a single job's folder where
    they differ in nothing."""
    run = study.runs[choice.runs[0]]
    told = [name for name in study.varied if _counts(name, choice.metric.target, run.summary or {})]
    told = [name for name in told if run.option(name) not in (None, "", "none")]
    words = [text_of(run.option(name)) if "." not in name else f"{name}={text_of(run.option(name))}" for name in told]
    return ", ".join(words) or f"job {run.job}"


# What a board has in common, and what changes no model.
_NOT_TOLD = ("name", "model", "stages", "force", "evaluation", "measure", "objective", "pictures")
_OF_MODEL = ("model.name", "model.source", "model.path", "model.repo", "model.revision")  # which model it is


def _counts(option: str, target: str, summary: Mapping[str, Any]) -> bool:
    """Whether a model, ``pruned``, ``repaired`` or ``recovered``, may depend on an option."""
    group = option.partition(".")[0]
    if option in _OF_MODEL or option in _NOT_TOLD or ("." in option and group in _NOT_TOLD and group != "model"):
        return False
    if group in ("repair", "recovery"):  # they may have been chosen and not run
        return TARGETS.index(target) >= TARGETS.index({"repair": "repaired", "recovery": "recovered"}[group])
    planned = group in ("threshold", "calibration") and "merge" in summary.get("stages", ())
    return not planned or summary.get(group) is not None  # some methods have no use for them


def _choices(study: Study) -> Iterator[tuple[tuple[str, str], Choice]]:
    """Each with the dense model and, as JSON, how and where its number was measured; its size is the percent left, in
    steps."""
    for values, members in study.groups(study.varied).items():
        alike: dict[tuple[str, str, str], list[tuple[int, Number, float | None]]] = {}
        for i in members:
            number, summary = study.outcome(i), study.runs[i].summary or {}
            counts = study.newest[i] and study.within_budget[i] and "parameters" in summary
            if number is not None and counts and math.isfinite(number.value):
                left = 100 * parameters_at_work(summary) / summary["parameters"]["dense"]
                way = json.dumps({**settings(number), "device": device_of(number)}, sort_keys=True, default=str)
                alike.setdefault((study.models[i], way, number.target), []).append((i, number, left))
        for (model, way, _), found in alike.items():
            choice = choice_of(values, found)
            yield (model, way), replace(choice, size=float(STEP * round((choice.size or 0.0) / STEP)))


def _sizes(choices: list[Choice], higher_is_better: bool) -> list[Size]:
    sizes = []
    for winner in winners(choices, higher_is_better=higher_is_better):
        places = [Place(choice, choice in winner.tied) for choice in (winner.best, *winner.others)]
        sizes.append(Size(round(100 - (winner.best.size or 0.0)), places, winner.on_front))
    return sizes
