"""Which runs of a study are the best: at each size, over the seeds, and with all that noise does not tell from them.

A study in which the size varies has no best run: the least pruned one nearly always wins. And of many seeds the best is
the luckiest. So runs that differ in seeds alone are one choice, choices of one size compete with one another, and those
that the best is not surely better than are tied with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from slm_pipeline.report.runs import Value, text_of
from slm_pipeline.results.certainty import SURE, within_noise
from slm_pipeline.results.number import Number
from slm_pipeline.show.tables import Table

if TYPE_CHECKING:
    from slm_pipeline.report.study import Study

ALIKE = 0.01  # sizes that differ by less of the larger one count as the same
# Student's t for 95 % of 1, 2, ... degrees of freedom: a spread over two or three seeds is hardly known itself
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Choice:
    """Runs that differ in seeds alone.

    Attributes:
        values: of the options that are no repetition.
        runs: those that count, as indices into the study's.
        size: mean number of parameters at work; None if unknown.
        metric: the mean over the runs; its error is the standard deviation over them, of a single run its own.
        error: of the mean, one standard error, for comparisons: larger where it comes of few runs; None if unknown.
    """

    values: tuple[Value | None, ...]
    runs: tuple[int, ...]
    size: float | None
    metric: Number
    error: float | None

    def is_told_from(self, other: Choice) -> bool:
        """Whether the two means differ by more than noise; without errors, whether they differ at all."""
        one, two = (choice._with_error() for choice in (self, other))
        alike = within_noise(one, two)
        return one.value != two.value if alike is None else not alike

    def _with_error(self) -> Number:
        """The metric with the error for comparisons; a single run's own error comes with the interval of its sample."""
        if self.metric.stderr is not None and self.metric.stderr == self.error:
            return self.metric
        return replace(self.metric, stderr=self.error, measured={})


@dataclass(frozen=True)
class Winner:
    """The best choice of a size.

    Attributes:
        others: the other choices of that size, the better ones first.
        on_front: whether no smaller one is as good: these are the Pareto set of size and metric.
    """

    best: Choice
    others: tuple[Choice, ...]
    on_front: bool

    @cached_property
    def tied(self) -> tuple[Choice, ...]:
        """The others that noise does not tell from the best."""
        return tuple(choice for choice in self.others if not choice.is_told_from(self.best))

    @property
    def runs(self) -> frozenset[int]:
        """Of the best choice and of those tied with it."""
        return frozenset(run for choice in (self.best, *self.tied) for run in choice.runs)


def choice_of(values: tuple[Value | None, ...], found: Sequence[tuple[int, Number, float | None]]) -> Choice:
    """A choice from its runs: for each its index, its metric and its size."""
    numbers = [number for _, number, _ in found]
    sizes = [size for *_, size in found if size is not None]
    mean = statistics.fmean(number.value for number in numbers)
    deviation = statistics.stdev([number.value for number in numbers]) if len(numbers) > 1 else None
    if deviation is None:
        metric, error = numbers[0], numbers[0].stderr
    else:
        metric = replace(numbers[0], value=mean, stderr=deviation, measured={})  # no interval of one sample
        freedom = len(numbers) - 1
        student = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else SURE
        error = deviation / math.sqrt(len(numbers)) * student / SURE
    size = statistics.fmean(sizes) if sizes else None
    return Choice(values, tuple(run for run, *_ in found), size, metric, error)


def winners(choices: Sequence[Choice], *, higher_is_better: bool) -> list[Winner]:
    """The best at each size, the largest first.

    Args:
        choices: with a finite metric; one alone in having a single run is compared as if it were as uncertain as the
            others are on average.
    """
    choices = _with_errors(choices)
    sign = -1 if higher_is_better else 1

    def rank(choice: Choice) -> float:
        return sign * choice.metric.value

    found: list[Winner] = []
    for members in _by_size(choices):  # the smallest first
        first, *others = sorted(members, key=rank)
        on_front = all(rank(first) < rank(smaller.best) for smaller in found)
        found.append(Winner(first, tuple(others), on_front))
    return found[::-1]


def _with_errors(choices: Sequence[Choice]) -> list[Choice]:
    """Choices of one run without an error of its own get the deviation that runs of the others have on average."""
    variances = [choice.metric.stderr**2 for choice in choices if len(choice.runs) > 1 and choice.metric.stderr]
    if not variances:
        return list(choices)
    usual = math.sqrt(statistics.fmean(variances))
    return [
        replace(choice, error=usual) if len(choice.runs) == 1 and choice.error is None else choice for choice in choices
    ]


def _by_size(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Choices of one size together, the smallest first; those of unknown size count as one size, below all others."""
    groups: list[list[Choice]] = []
    for choice in sorted(choices, key=lambda choice: choice.size or 0.0):
        smallest = groups[-1][0].size if groups else None
        if groups and (choice.size or 0.0) * (1 - ALIKE) <= (smallest or 0.0):
            groups[-1].append(choice)
        else:
            groups.append([choice])
    return groups


def winners_of(study: Study) -> list[Winner]:
    """The winners among a study's runs: the newest ones that are done, all seeds of which keep to its budget.

    Each dense model has its own: with another tokenizer perplexities do not compare, with other weights sizes do not.
    """
    of_models: dict[str, list[Choice]] = {}
    for values, members in study.groups(study.varied).items():
        known = {i: study.value(i, study.metric) for i in members if study.newest[i]}
        done = [i for i, value in known.items() if value is not None and math.isfinite(value)]
        if done and all(study.within_budget[i] for i in done):
            found = [(i, study.numbers[i][str(study.metric)], study.value(i, "parameters")) for i in done]
            of_models.setdefault(study.models[done[0]], []).append(choice_of(values, found))
    higher = study.is_higher_better(study.metric)
    return [winner for choices in of_models.values() for winner in winners(choices, higher_is_better=higher)]


def scope(study: Study) -> str:
    """What each winner is the best of, as the end of a sentence: sizes, dense models; empty of a single winner."""
    models = [study.models[winner.best.runs[0]] for winner in study.winners]
    sizes = " at each size" if len(set(models)) < len(models) else ""
    return sizes + (" of each model" if len(set(models)) > 1 else "")


def table(study: Study) -> Table:
    """A row for each size with its best choice and what noise does not tell from it.

    Empty where a bold number in the table of runs says all of it: one size, one run that is the best.
    """
    alone = len(study.winners) == 1 and not study.winners[0].tied and not study.repeated
    if study.metric is None or len(study.runs) < 2 or alone:
        return Table([], [])
    sized = any(winner.best.size is not None for winner in study.winners)
    rows = []
    for winner in study.winners:
        size = [study.kinds["parameters"].shown(winner.best.size or 0.0)] if sized else []
        notes = [f"tied with {_in_words(winner.tied)}"] if winner.tied else []
        notes += [] if winner.on_front else ["a smaller one is as good"]
        runs = [str(len(winner.best.runs))] if study.repeated else []
        options = [text_of(value) for value in winner.best.values]
        rows.append([*size, *options, *runs, str(winner.best.metric), "; ".join(notes)])
    head = [
        *(["parameters"] if sized else []),
        *study.varied,
        *(["runs"] if study.repeated else []),
        study.metric,
        "note",
    ]
    noted = any(row[-1] for row in rows)
    return Table(head if noted else head[:-1], rows if noted else [row[:-1] for row in rows])


def title(study: Study) -> str:
    """What `table` shows, in words."""
    over = f" over {' and '.join(study.repeated)}, +- standard deviation" if study.repeated else ""
    return f"Best{scope(study)}{over}"


def _in_words(choices: Sequence[Choice]) -> str:
    """What tells choices from one another: the values of their options."""
    named = [" ".join(filter(None, map(text_of, choice.values))) for choice in choices]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
