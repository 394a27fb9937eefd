"""A study as one self-contained HTML page: no network, no other file, and nothing in it can run but its own script.

Here the study becomes plain values; `page.html.j2` says where they stand, `page.js` sorts, filters and groups them.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import slm_pipeline
from slm_pipeline.errors import printable
from slm_pipeline.report import damage
from slm_pipeline.report.analyses import Analysis
from slm_pipeline.report.leaderboard import PLACES, STEP, Board, label, leaderboards, outcome
from slm_pipeline.report.plots import Picture
from slm_pipeline.report.runs import Run, text_of
from slm_pipeline.report.study import Study
from slm_pipeline.results.measurement import small_limit
from slm_pipeline.results.number import Number, parted
from slm_pipeline.results.of_run import parameters_at_work
from slm_pipeline.show.dark import with_dark_colors
from slm_pipeline.show.tables import Table, in_order
from slm_pipeline.surgery.plan import format_groups

_HERE = Path(__file__).resolve().parent
_MOST = 12  # columns up to which all are shown from the start
_MOST_OPTIONS = 5  # shown from the start where there are more columns than that
_FILTERS = 5  # choices above the table, each of an option with at most so many values:
_VALUES = 12
_TELLING = ("model", "method", "pruning_ratio", "repair", "recovery", "threshold.value")  # options that people look for
_TIME = re.compile(r"\d{4}-(\d\d-\d\d)_(\d\d-\d\d-\d\d)(?:-\d+)?")  # of a folder, as conf/config.yaml has it
_PACKAGES = ("slm_pipeline", "python", "torch", "transformers", "peft", "lm_eval")
_SHAPE = {"versions?": {str: damage.text}, "device?": damage.text, "git_commit?": damage.maybe(damage.text)}


@dataclass(frozen=True)
class _Column:
    """A column of the runs' table.

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


def html(study: Study, pictures: Sequence[Picture], analyses: Sequence[Analysis] = ()) -> str:
    """The whole page.

    Args:
        pictures: their SVGs are read and become part of the page.
        analyses: what `slm-analyze` left beside the runs, with its pictures.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    columns = _columns(study)
    boards = leaderboards(study)
    cautions = small_limit(run.summary for run in study.runs if run.summary)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, finalize=_for_people,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    averages = study.averages(sorted(study.shown_columns(costs=False), key=lambda name: name != study.metric))
    repeated = any(sum(study.newest[i] for i in members) > 1 for members in study.groups(study.varied).values())
    return environment.get_template("page.html.j2").render(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=Markup(style),
        script=Markup(script),
        title=study.question or study.name,
        counts=study.counts(),
        cautions=[_sign(line) for line in cautions],
        facts=_facts(study),
        boards=[_board(study, board, several=len(boards) > 1) for board in boards if _tells(board)],
        columns=columns,
        groups=_groups(columns),
        has_metric=study.metric is not None,
        choices=_choices(study, columns),
        menu=_menu(columns),
        rows=[_row(study, i, columns, name) for i, name in enumerate(short_jobs([run.job for run in study.runs]))],
        averages={"title": _sign(study.averages_title()), "table": _readable(averages)}
        if averages and repeated
        else None,
        plots=[_figure(picture) for picture in pictures],
        analyses=[
            {"title": one.title, "command": one.command, "plots": [_figure(picture) for picture in one.pictures]}
            for one in analyses
        ],
        notes=[
            ("About these runs", [*_shared(study), *map(_sign, study.remarks())]),
            ("How it was measured", [_sign(line) for line in study.measured() if line not in cautions]),
            ("Made with", made_with(study.runs)),
        ],
        version=slm_pipeline.__version__,
    )


def _for_people(value: Any) -> Any:
    """Text in one line without control characters; what is markup already stays as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _sign(text: str) -> str:
    return text.replace("+-", "\N{PLUS-MINUS SIGN}")


def _shared(study: Study) -> list[str]:
    return [f"All jobs: {' '.join(study.shared())}"] if study.shared() else []


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


def _facts(study: Study) -> list[tuple[str, str, str]]:
    """The best run in large print, unless sizes differ: then there is none."""
    if len(study.winners) != 1 or study.metric is None:
        return []
    winner = study.winners[0]
    best = winner.best.runs[0]
    run, metric = study.runs[best], winner.best.metric
    dense = study.dense.get(f"dense/{metric.quantity}")
    direction = "highest" if metric.higher_is_better else "lowest"
    facts = []
    if len(study.runs) > 1:
        told = [name for name in study.varied if run.option(name) not in (None, "")]
        options = ", ".join(f"{name} {text_of(run.option(name))}" for name in told[:_MOST_OPTIONS])
        jobs = job_of(study, winner.best.runs)
        tied = f"; {len(winner.tied)} more that noise does not tell from it" if winner.tied else ""
        facts.append(("Best run", options or f"job {run.job}", f"job {jobs}{tied}"))
    compared = direction if dense is None else f"dense model {dense.shown(dense.value)}"
    facts.append((study.metric, _sign(str(metric)), compared))
    summary = run.summary or {}
    for name in ("num_layers", "parameters"):
        if name in summary:
            kind = study.kinds[name]
            was = summary[name]["dense"]
            left = parameters_at_work(summary) if name == "parameters" else summary[name]["pruned"]
            kept = f"of {kind.shown(was)}, {100 * left / was:.1f}% left"
            kept += " at work" if left < summary[name]["pruned"] else ""
            facts.append((kind.unit, kind.shown(left), kept))
    return facts


def _tells(board: Board) -> bool:
    """Whether there is anything to choose from."""
    return sum(len(size.places) for size in board.sizes) > 1


def _board(study: Study, board: Board, *, several: bool) -> dict[str, Any]:
    title = f"Best at each size: {board.quantity}" + (f", {board.model}" if several else "")
    kind = board.sizes[0].places[0].choice.metric
    direction = f"{kind.direction} is better" if kind.direction else ""
    ties = any(place.ties for size in board.sizes for place in size.places[:PLACES])
    behind = any(not size.on_front for size in board.sizes)
    note = "; ".join(
        filter(None, [
            f"the last model of each run, sizes to the nearest {STEP}% of the parameters", direction, board.how,
            "\N{ALMOST EQUAL TO}: noise does not tell it from the best" if ties else "",
            "*: a smaller one is as good" if behind else "",
        ])
    )  # fmt: skip
    heads = ["size", "", board.quantity, "run", "model", "runs"]
    numbers = (False, False, True, False, False, True)
    rows = []
    for size in board.sizes:
        for rank, place in enumerate(size.places[:PLACES], 1):
            choice, first = place.choice, rank == 1
            value, error = _parts(choice.metric)
            named = f"{size.removed}% less" if size.removed else "as many"
            bold = " best" if (first or place.ties) and size.on_front else ""
            cells = [
                _text((named if size.on_front else f"{named}*") if first else "", "size"),
                _text("\N{ALMOST EQUAL TO}" if place.ties else f"{rank}.", "quiet"),
                _text(value, f"number{bold}", error),
                _text(label(study, choice), f"wide{bold}", job_of(study, choice.runs)),
                _text(choice.metric.target, "quiet"),
                _text(str(len(choice.runs)), "number"),
            ]
            rows.append({"cells": cells, "first": first})
    table = {"heads": [{"text": t, "number": n} for t, n in zip(heads, numbers, strict=True)], "rows": rows}
    return {"title": title, "note": note, "table": table}


def job_of(study: Study, runs: Sequence[int]) -> str:
    """What the first is called, and how many more there are."""
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{short_jobs([run.job for run in study.runs])[runs[0]]}{more}"


def _text(text: str, classes: str = "", small: str = "") -> dict[str, str]:
    return {"text": _sign(text), "classes": classes, "small": _sign(small)}


def _parts(number: Number) -> tuple[str, str]:
    """A number's value, and whatever stands behind it."""
    value = number.shown(number.value)
    return value, str(number).removeprefix(value)


def _columns(study: Study) -> list[_Column]:
    """In the order of the table: the job, the metric, options that tell most, numbers by their model, other options."""
    options = _ordered_options(study)
    numbers = [name for name in study.shown_columns(details=True) if name != study.metric]
    few = len(options) + len(numbers) <= _MOST
    main = options if few else options[:_MOST_OPTIONS]
    same = {name for name in numbers if _is_the_same(study, name)}
    found = [_Column("job", "job", classes="job", sorted="ascending" if study.sort_by == "job" else "none")]
    if study.metric is not None:
        kind = study.kinds[study.metric]
        found.append(_of_number(study, study.metric, kind, "number metric", shown=True, whole=True))
    found += [_Column(name, name, part="options") for name in main]
    for name in _by_model(numbers):
        kind = study.kinds[name]
        extra = study.chosen is None and name != study.sort_by and (kind.detail or kind.cost)
        extra = extra or (study.chosen is None and (kind.target == "dense" or name in same))
        found.append(_of_number(study, name, kind, "number", shown=few or not extra))
    found += [_Column(name, name, part="options", shown=name == study.sort_by) for name in options if name not in main]
    return [_sorted(study, replace(column, cell=cell)) for cell, column in enumerate(found)]


def _is_the_same(study: Study, column: str) -> bool:
    """Whether all of several runs have one value."""
    values = [numbers[column].value if column in numbers else None for numbers in study.numbers if numbers]
    return len(values) > 1 and len(set(values)) == 1


def _of_number(study: Study, name: str, kind: Number, classes: str, *, shown: bool, whole: bool = False) -> _Column:
    target, quantity = parted(name)
    group = "" if whole else target
    part = target or ("what it took" if kind.cost else "the pruned model")
    first = "descending" if study.is_higher_better(name) else "ascending"
    return _Column(name, name if whole else quantity, group, part, 0, True, shown, classes, first)


def _sorted(study: Study, column: _Column) -> _Column:
    return replace(column, sorted=column.first) if column.name == study.sort_by else column


def _ordered_options(study: Study) -> list[str]:
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


def _groups(columns: Sequence[_Column]) -> list[dict[str, Any]]:
    """What stands above the heads: over the columns of a model its name; the frozen ones have none."""
    free = [column for column in columns if "job" not in column.classes and "metric" not in column.classes]
    found = []
    for name, members in itertools.groupby(free, key=lambda column: column.group):
        cells = [*members]
        found.append({"name": name, "cells": [c.cell for c in cells], "shown": sum(c.shown for c in cells)})
    return found


def _menu(columns: Sequence[_Column]) -> list[tuple[str, list[_Column]]]:
    """The columns that can be shown and hidden, by where they belong."""
    parts = in_order(column.part for column in columns[1:] if "metric" not in column.classes)
    free = [column for column in columns[1:] if "metric" not in column.classes]
    return [(part, [column for column in free if column.part == part]) for part in parts]


def _choices(study: Study, columns: Sequence[_Column]) -> list[dict[str, Any]]:
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

    Those that would be called alike have the time too, and if that does not help their whole name.
    """
    short, timed = [], []
    for job in jobs:
        parts = [part for part in job.split("/") if not _TIME.fullmatch(part)]
        kept = parts[1:] if len(parts) > 1 and parts[0] in ("runs", "sweeps") else parts
        times = [
            f"{found[1]} {found[2].replace('-', ':')}" for part in job.split("/") if (found := _TIME.fullmatch(part))
        ]
        short.append("/".join(kept) or job)
        timed.append(" ".join([short[-1], *times]))
    called = [two if short.count(one) > 1 else one for one, two in zip(short, timed, strict=True)]
    return [name if called.count(name) == 1 else job for name, job in zip(called, jobs, strict=True)]


def _row(study: Study, i: int, columns: Sequence[_Column], name: str) -> dict[str, Any]:
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


def _cell(study: Study, i: int, column: _Column, *, best: bool) -> dict[str, Any]:
    run = study.runs[i]
    made: dict[str, Any] = {"text": "", "small": "", "value": "", "title": "", "shown": column.shown}
    classes = [column.classes]
    if column.is_number:
        is_metric = column.name == study.metric
        number = outcome(study, i) if is_metric else study.numbers[i].get(column.name)
        if number is not None:
            value, small = _parts(number)
            other = number.target if number.key != column.name else ""
            made |= {"text": value, "small": " ".join(filter(None, [_sign(small), other])), "value": repr(number.value)}
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


def _readable(table: Table) -> dict[str, Any]:
    """A table that is only read."""
    flush = [
        all(row[i][:1] in tuple("+-0123456789") or not row[i] for row in table.rows) for i in range(len(table.columns))
    ]
    heads = [{"text": column, "number": number} for column, number in zip(table.columns, flush, strict=True)]
    rows = []
    for i, row in enumerate(table.rows):
        cells = [
            _text(cell, " ".join([*(["number"] if flush[j] else []), *(["best"] if (i, j) in table.bold else [])]))
            for j, cell in enumerate(row)
        ]
        rows.append({"cells": cells, "first": False})
    return {"heads": heads, "rows": rows}


def _figure(picture: Picture) -> dict[str, str]:
    (svg,) = [path for path in picture.files if path.suffix == ".svg"]
    data = base64.b64encode(with_dark_colors(svg.read_text(encoding="utf-8")).encode()).decode()
    return {"title": picture.title, "source": f"data:image/svg+xml;base64,{data}"}
