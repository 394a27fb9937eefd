"""The table of runs on the page: which columns, in which order, which of them from the start, and its cells."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slm_pipeline.report import damage
from slm_pipeline.report.runs import Run, text_of
from slm_pipeline.report.study import Study
from slm_pipeline.results.number import Number, parted
from slm_pipeline.show.tables import in_order
from slm_pipeline.surgery.plan import format_groups

_MOST = 12  # columns up to which all are shown from the start
MOST_OPTIONS = 5  # shown from the start where there are more columns than that
_FILTERS = 5  # choices above the table, each of an option with at most so many values:
_VALUES = 12
_TELLING = ("model", "method", "pruning_ratio", "repair", "recovery", "threshold.value")  # options that people look for
_TIME = re.compile(r"\d{4}-(\d\d-\d\d)_(\d\d-\d\d-\d\d)(?:-\d+)?")  # of a folder, as conf/config.yaml has it
_PACKAGES = ("slm_pipeline", "python", "torch", "transformers", "peft", "lm_eval")
_SHAPE = {"versions?": {str: damage.text}, "device?": damage.text, "git_commit?": damage.maybe(damage.text)}


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: of the option, or the number's key.
        label: what its head says, below the model's name if it is of one.
        group: the model; empty for none.
        part: where the menu of columns lists it.
        cell: its place in a row.
        is_number: whether it is one of the study's numbers.
        shown: whether it is there from the start.
        classes: of its head.
        first: the direction of its first sorting.
        sorted: as ``aria-sort``.
    """

    name: str
    label: str
    group: str = ""
    part: str = ""
    cell: int = 0
    is_number: bool = False
    shown: bool = True
    classes: str = ""
    first: str = "ascending"
    sorted: str = "none"


def columns_of(study: Study) -> list[Column]:
    """In the order of the table: the job, the metric, options that tell most, numbers by their model, other options."""
    options = ordered_options(study)
    numbers = [name for name in study.shown_columns(details=True) if name != study.metric]
    few = len(options) + len(numbers) <= _MOST
    main = options if few else options[:MOST_OPTIONS]
    same = {name for name in numbers if _is_the_same(study, name)}
    found = [Column("job", "job", classes="job", sorted="ascending" if study.sort_by == "job" else "none")]
    if study.metric is not None:
        kind = study.kinds[study.metric]
        found.append(_of_number(study, study.metric, kind, "number metric", shown=True, whole=True))
    found += [Column(name, name, part="options") for name in main]
    for name in _by_model(numbers):
        kind = study.kinds[name]
        extra = study.chosen is None and name != study.sort_by and (kind.detail or kind.cost)
        extra = extra or (study.chosen is None and (kind.target == "dense" or name in same))
        found.append(_of_number(study, name, kind, "number", shown=few or not extra))
    found += [Column(name, name, part="options", shown=name == study.sort_by) for name in options if name not in main]
    return [_sorted(study, replace(column, cell=cell)) for cell, column in enumerate(found)]


def _of_number(study: Study, name: str, kind: Number, classes: str, *, shown: bool, whole: bool = False) -> Column:
    target, quantity = parted(name)
    group = "" if whole else target
    part = target or ("what it took" if kind.cost else "the pruned model")
    first = "descending" if study.is_higher_better(name) else "ascending"
    return Column(name, name if whole else quantity, group, part, 0, True, shown, classes, first)


def _is_the_same(study: Study, column: str) -> bool:
    """Whether all of several runs have one value."""
    values = [numbers[column].value if column in numbers else None for numbers in study.numbers if numbers]
    return len(values) > 1 and len(set(values)) == 1


def _sorted(study: Study, column: Column) -> Column:
    return replace(column, sorted=column.first) if column.name == study.sort_by else column


def ordered_options(study: Study) -> list[str]:
    """Those that a study is about first, then those that people look for, then those that most runs have."""
    has = {name: sum(run.option(name) not in (None, "") for run in study.runs) for name in study.options}
    wanted = [*([study.x] if study.x in study.options else []), *study.series, *_TELLING]
    rank = {name: place for place, name in reversed([*enumerate(wanted)])}
    return sorted(study.options, key=lambda name: (rank.get(name, len(wanted)), -has[name], study.options.index(name)))


def _by_model(columns: Sequence[str]) -> list[str]:
    """The columns of a model side by side; before and after them those of none, as they came."""
    of = [parted(name)[0] for name in columns]
    targets = in_order(target for target in of if target)
    first = next((i for i, target in enumerate(of) if target), len(columns))
    plain = [name for name in columns[first:] if not parted(name)[0]]
    grouped = [name for target in targets for name in columns if parted(name)[0] == target]
    return [*columns[:first], *grouped, *plain]


def groups_of(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """What stands above the heads: over the columns of a model its name; the frozen ones have none."""
    free = [column for column in columns if "job" not in column.classes and "metric" not in column.classes]
    found = []
    for name, members in itertools.groupby(free, key=lambda column: column.group):
        cells = [*members]
        found.append({"name": name, "cells": [c.cell for c in cells], "shown": sum(c.shown for c in cells)})
    return found


def menu_of(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """The columns that can be shown and hidden, by where they belong."""
    parts = in_order(column.part for column in columns[1:] if "metric" not in column.classes)
    free = [column for column in columns[1:] if "metric" not in column.classes]
    return [(part, [column for column in free if column.part == part]) for part in parts]


def choices_of(study: Study, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The options of few values, by which the rows can be chosen and grouped."""
    found: list[dict[str, Any]] = []
    for column in columns:
        if column.part != "options" or len(found) == _FILTERS:
            continue
        values = {run.option(column.name) for run in study.runs}
        ordered = sorted((v for v in values if v is not None), key=lambda v: (isinstance(v, str), v))
        if 1 < len(ordered) <= _VALUES and len(ordered) < len(study.runs):
            options = [(str(value), text_of(value) or "null") for value in ordered if value != ""]
            found.append({"name": column.name, "cell": column.cell, "options": options})
    return found


def short_jobs(jobs: Sequence[str]) -> list[str]:
    """What to call jobs in little room: ``sweeps/ratios/2026-11-27_00-34-11-102122/3`` is ``ratios/3``.

    Times go, and the ``runs`` or ``sweeps`` that a path with a time begins with; other folders stay. Those that would
    be called alike have the time too, and if that does not help their whole name.
    """
    short, timed = [], []
    for job in jobs:
        parts = [part for part in job.split("/") if not _TIME.fullmatch(part)]
        ours = len(parts) > 1 and parts[0] in ("runs", "sweeps") and len(parts) < len(job.split("/"))
        kept = parts[1:] if ours else parts
        times = [
            f"{found[1]} {found[2].replace('-', ':')}" for part in job.split("/") if (found := _TIME.fullmatch(part))
        ]
        short.append("/".join(kept) or job)
        timed.append(" ".join([short[-1], *times]))
    called = [two if short.count(one) > 1 else one for one, two in zip(short, timed, strict=True)]
    return [name if called.count(name) == 1 else job for name, job in zip(called, jobs, strict=True)]


def row_of(study: Study, i: int, columns: Sequence[Column], name: str) -> dict[str, Any]:
    run = study.runs[i]
    best = i in study.best_runs and len(study.runs) > 1
    cells = [_cell(study, i, column, best=best) for column in columns[1:]]
    return {
        "job": run.job,
        "name": name,
        "status": run.status,
        "failed": run.status in ("FAILED", "unreadable"),
        "best": best,
        "reason": run.state if run.reason else "",
        "cells": cells,
        "more": _more(run),
    }


def _cell(study: Study, i: int, column: Column, *, best: bool) -> dict[str, Any]:
    run = study.runs[i]
    made: dict[str, Any] = {"text": "", "small": "", "value": "", "title": "", "shown": column.shown}
    classes = [column.classes]
    if column.is_number:
        is_metric = column.name == study.metric
        number = study.outcome(i) if is_metric else study.numbers[i].get(column.name)
        if number is not None:
            value, small = parts_of(number)
            other = study.other(number) if is_metric else ""
            made |= {
                "text": value,
                "small": " ".join(filter(None, [signed(small), other])),
                "value": repr(number.value),
            }
            classes += ["best"] if is_metric and best else []
        elif run.summary:
            made |= {"text": "\N{EN DASH}", "title": "not measured"}
            classes.append("absent")
    else:
        option = run.option(column.name)
        if option is not None:
            made |= {"text": text_of(option) or "null", "value": str(option)}
            classes += ["number"] if isinstance(option, (int, float)) else ["quiet"] if option == "" else []
        elif run.config:
            made |= {"text": "\N{EN DASH}", "title": "does not apply"}
            classes.append("absent")
    return {**made, "classes": " ".join(filter(None, classes))}


def _more(run: Run) -> list[tuple[str, list[str], bool]]:
    """What a row opens to: names with their lines, and whether these are code."""
    summary: Any = run.summary or {}
    facts: list[tuple[str, list[str], bool]] = [("folder", [str(run.path)], True)]
    if "command" in summary:
        facts.append(("command", [summary["command"]], True))
    elif run.overrides:
        facts.append(("overrides", [" ".join(run.overrides)], True))
    if "layer_groups" in summary:
        facts.append(("layers", [format_groups(summary["layer_groups"])], True))
        if summary.get("dropped"):
            facts.append(("dropped", [", ".join(map(str, summary["dropped"]))], True))
    if summary.get("warnings"):
        facts.append(("warnings", list(summary["warnings"]), False))
    if stages := summary.get("stages"):
        spent = [
            f"{name}: {stage['seconds']:.1f} s{' (reused)' if stage['reused'] else ''}"
            for name, stage in stages.items()
        ]
        facts.append(("stages", spent, False))
    return [*facts, *([("made with", made_with([run]), False)] if made_with([run]) else [])]


def made_with(runs: Sequence[Run]) -> list[str]:
    """When the runs ended, with which versions and on what; each line says of how many runs, unless of all."""
    done = [run for run in runs if run.summary]
    said: dict[str, int] = {}
    for run in done:
        found: Any = (run.summary or {}).get("provenance")
        if not isinstance(found, dict) or damage.fault(found, _SHAPE) is not None:
            continue
        versions = found.get("versions", {})
        words = [f"{name} {versions[name]}" for name in _PACKAGES if name in versions]
        words += [f"commit {found['git_commit'][:12]}"] if found.get("git_commit") else []
        for line in (", ".join(words), found.get("device", "")):
            if line:
                said[line] = said.get(line, 0) + 1
    lines = [line if times == len(done) else f"{line} ({times} of {len(done)} runs)" for line, times in said.items()]
    days = sorted(_day(run.finished_at) for run in done if run.finished_at)
    when = [f"results of {days[0]}" if days[0] == days[-1] else f"results from {days[0]} to {days[-1]}"] if days else []
    return [*when, *lines]


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).date().isoformat()


def parts_of(number: Number) -> tuple[str, str]:
    """A number's value, and whatever stands behind it."""
    value = number.shown(number.value)
    return value, str(number).removeprefix(value)


def signed(text: str) -> str:
    return text.replace("+-", "\N{PLUS-MINUS SIGN}")
