"""The plots that compare a study's runs, and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_pipeline.errors import only_warned_about
from slm_pipeline.report.runs import Value
from slm_pipeline.report.study import Study, mean_and_deviation, text_of, usual_metric, usual_size
from slm_pipeline.results.number import PERCENT, parted
from slm_pipeline.results.of_run import zeroed_parameters
from slm_pipeline.show import curves
from slm_pipeline.show.canvas import spans_decades
from slm_pipeline.show.curves import Axis, Curve, Point, pareto_front
from slm_pipeline.show.looks import BLUE, Look, combined, looks_of, told_apart

_PLAIN = Look(BLUE, "o", "-")
_LONGEST = 36  # characters of a value in a legend


@dataclass(frozen=True)
class Picture:
    """A plot on disk."""

    title: str
    files: Sequence[Path]  # PNG and SVG


def draw(study: Study, folder: Path) -> list[Picture]:
    """Every one of `PLOTS` for which the study has numbers, written into ``folder``."""
    drawn: list[Picture] = []
    for name, plot in PLOTS.items():
        with only_warned_about(f"no plot of the {name}"):
            drawn += plot(study, folder)
    return drawn


def _metric(study: Study, folder: Path) -> Iterator[Picture]:
    if study.metric is None or study.x is None:
        return
    title = f"{study.metric} by {study.x}"
    values = [run.option(study.x) for run in study.runs]
    if study.x not in study.columns and any(isinstance(value, str) for value in values):
        if files := _ranked(study, study.metric, study.x, folder / "metric", title):
            yield Picture(title, files)
    elif files := _against(study, study.metric, study.x, folder / "metric", title):
        yield Picture(title, files)


def _layers(study: Study, folder: Path) -> Iterator[Picture]:
    score, size = usual_metric(study.columns, score=True), usual_size(study.runs)
    if score is not None and size is not None and (score, size) != (study.metric, study.x):
        title = f"{score} by {size}"
        if files := _against(study, score, size, folder / "score_by_layers", title):
            yield Picture(title, files)


def _against(study: Study, column: str, x: str, path_stem: Path, title: str) -> list[Path]:
    found = [*_curves(study, column, x)]
    before = _before(study, column)
    if before is not None:
        found += [Curve(c.label, c.look, c.points, faint=True) for c in _curves(study, before, x)]
    ys = [point.y for curve in found for point in curve.points]
    xs = [point.x for curve in found for point in curve.points]
    if len(set(xs)) < 2:
        return []  # a single place on the axis says nothing that the table does not
    reference = _dense(study, column)
    note = _note(study, column, [runs for row in _places(study, column, x).values() for runs in row.values()], x)
    log_y = not study.kinds[column].is_score and spans_decades([*ys, *([reference[1]] if reference else [])])
    return curves.against(
        found,
        path_stem,
        title=f"{study.name}: {title}",
        x=Axis(_words(study, x), log=x in study.options and spans_decades(xs)),
        y=_axis(study, column, log=log_y),
        reference=reference,
        legend=", ".join(study.series),
        note="; ".join(filter(None, ["hollow: pruned, before what followed" if before else "", note])),
    )


def _ranked(study: Study, column: str, x: str, path_stem: Path, title: str) -> list[Path]:
    """A row for each value of an option that is no number, the best on top."""
    points: dict[tuple[Value, tuple[Value, ...]], Point] = {}
    averaged = []
    for (name, *others), members in study.groups([x, *study.series]).items():
        done = [i for i in members if column in study.numbers[i] and study.newest[i]]
        if name is not None and done:
            points[name, tuple(map(text_of, others))] = _point(study, column, 0.0, done)
            averaged.append(done)
    if not points:
        return []
    best: dict[Value, float] = {}
    for (name, _), point in points.items():
        value = -point.y if study.is_higher_better(column) else point.y
        best[name] = min(best.get(name, math.inf), value)
    rows = sorted(best, key=lambda name: best[name])
    by_series = series_looks(study, study.series, list(dict.fromkeys(key for _, key in points))) if study.series else {}
    by_name = looks_of(x, rows)
    merged: dict[tuple[str, Look], list[Point]] = {}
    for (name, key), point in points.items():
        label, look = label_of(key), by_series.get(key) or by_name[name]
        merged.setdefault((label, look), []).append(Point(float(rows.index(name)), point.y, point.error))
    reference = _dense(study, column)
    ys = [*(point.y for point in points.values()), *([reference[1]] if reference else [])]
    return curves.ranked(
        [label_of([name]) for name in rows],
        [Curve(label, look, places) for (label, look), places in merged.items()],
        path_stem,
        title=f"{study.name}: {title}",
        x=_axis(study, column, log=not study.kinds[column].is_score and spans_decades(ys)),
        reference=reference,
        legend=", ".join(study.series),
        note=_note(study, column, averaged, x),
    )


def _places(study: Study, column: str, x: str) -> dict[tuple[Value, ...], dict[float, list[int]]]:
    """For each combination of the series' values and each place on the axis, the runs that are there."""
    found: dict[tuple[Value, ...], dict[float, list[int]]] = {}
    for i, run in enumerate(study.runs):
        place = study.value(i, x) if x in study.columns else run.option(x)
        if column in study.numbers[i] and study.newest[i] and isinstance(place, (int, float)):
            key = tuple(text_of(run.option(name)) for name in study.series)
            found.setdefault(key, {}).setdefault(float(place), []).append(i)
    return found


def _curves(study: Study, column: str, x: str) -> list[Curve]:
    """A curve for each combination of the series' values; runs alike in these and in x are one point, their mean."""
    groups = _places(study, column, x)
    return [
        Curve(
            label_of(key) or parted(column)[0] or column,
            look,
            [_point(study, column, place, members) for place, members in sorted(groups[key].items())],
        )
        for key, look in series_looks(study, study.series, list(groups)).items()
    ]


def series_looks(
    study: Study, options: Sequence[str], keys: Sequence[tuple[Value, ...]]
) -> dict[tuple[Value, ...], Look]:
    """A look for each combination of the options' values, in their order; no two alike.

    Of the options that differ the first decides the colour, the second the marker, the last of three the line; but the
    method, if it is one of them, always decides the colour. Combinations that this leaves alike, in a fourth option
    say, keep the colour and get another marker; with four options lines do not count, for most points stand alone.
    """
    if not options:
        return dict.fromkeys(keys, _PLAIN)
    tables = []
    for place, option in enumerate(options):
        wanted = {key[place] for key in keys}
        values = {"" if (value := run.option(option)) is None else value for run in study.runs}  # not all have it
        named = [value for value in values if text_of(value) in wanted]
        order = sorted(named, key=lambda value: (isinstance(value, str), value))
        looks = looks_of(option, order)
        tables.append({text_of(value): looks[value] for value in order})
    ranks = [list(table) for table in tables]
    ordered = sorted(keys, key=lambda key: [rank.index(str(text)) for rank, text in zip(ranks, key, strict=False)])
    telling = [place for place, rank in enumerate(ranks) if len(rank) > 1] or [0]
    telling.sort(key=lambda place: options[place] != "method")
    if len(telling) == 1:
        return {key: tables[telling[0]][str(key[telling[0]])] for key in ordered}
    found = [combined(*(tables[place][str(key[place])] for place in telling[:3])) for key in ordered]
    return dict(zip(ordered, told_apart(found, markers=len(telling) > 3), strict=True))


def _point(study: Study, column: str, place: float, members: Sequence[int]) -> Point:
    """The mean and, over several runs, their standard deviation; of one run its standard error."""
    numbers = [study.numbers[i][column] for i in members]
    mean, deviation = mean_and_deviation([number.value for number in numbers])
    return Point(place, mean, deviation if len(members) > 1 else numbers[0].stderr)


def _before(study: Study, column: str) -> str | None:
    """For a number after the repair or the recovery, the same number before either."""
    target, quantity = parted(column)
    before = f"pruned/{quantity}"
    return before if target in ("repaired", "recovered") and before in study.columns else None


def _dense(study: Study, column: str) -> tuple[str, float] | None:
    dense = study.dense.get(f"dense/{parted(column)[1]}")
    return None if dense is None else (f"dense: {dense.shown(dense.value)}", dense.value)


def _axis(study: Study, column: str, *, log: bool = False) -> Axis:
    kind = study.kinds[column]
    words = "percent" if kind.unit == PERCENT else kind.unit
    unit = f" in {words}" if words and words not in column else ""
    return Axis(f"{column}{unit}" + (f" ({kind.direction} is better)" if kind.direction else ""), log)


def _is_uncertain(study: Study, column: str, run: int) -> bool:
    return column in study.numbers[run] and study.numbers[run][column].stderr is not None


def _words(study: Study, x: str) -> str:
    """What stands at the axis: the column, and what it counts where a checkpoint counts otherwise."""
    zeroed = any(zeroed_parameters(run.summary) for run in study.runs if run.summary)
    return "parameters at work" if x == "parameters" and zeroed else x


def _note(study: Study, column: str, members: Sequence[Sequence[int]], x: str | None = None) -> str:
    """Small print: what was averaged, what the error bars are, what is missing; ``members``: the runs of each point."""
    words = []
    drawn = {i for runs in members for i in runs}
    if any(len(runs) > 1 for runs in members):
        over = [
            name
            for name in study.options
            if any(len({study.runs[i].option(name) for i in runs}) > 1 for runs in members)
        ]
        words.append(f"points: mean over {', '.join(over)}; bars: standard deviation")
        if any(len(runs) == 1 and _is_uncertain(study, column, runs[0]) for runs in members):
            words[-1] += ", one standard error where there is one run"
    elif any(_is_uncertain(study, column, i) for i in drawn):
        words.append("bars: one standard error")
    if repeats := study.newest.count(False):
        words.append(f"{repeats} other runs of the same jobs left out")
    missing = [run for i, run in enumerate(study.runs) if i not in drawn and study.newest[i]]
    if missing:
        kinds = {run.status: sum(other.status == run.status for other in missing) for run in missing}
        said = ", ".join(f"{n} {'done without it' if kind == 'done' else kind}" for kind, n in kinds.items())
        words.append(f"left out: {len(missing)} of {len(study.runs)} jobs ({said})")
    return "; ".join(words)


def _speed(study: Study, folder: Path) -> Iterator[Picture]:
    """The usual score against speed in each setting, and where that was measured the study's metric, if it is another
    one."""
    asked = study.metric if study.metric and not _is_speed(study.metric) else None
    scores = dict.fromkeys(name for name in (usual_metric(study.columns, score=True), asked) if name is not None)
    for name, score in zip(("score", "metric"), scores, strict=False):
        for setting, speed in _speeds(study, parted(score)[0]).items():
            if name == "metric" and speed not in study.columns:
                continue
            yield from _front(study, score, speed, folder / f"{name}_by_speed{'_' if setting else ''}{setting}")


def _is_speed(column: str) -> bool:
    return parted(column)[1].startswith("efficiency/")


def _speeds(study: Study, model: str) -> dict[str, str]:
    """Of each setting what speed is measured by, the nameless one first: the study's x where that is a speed, the ratio
    to the dense model where the two took turns, else tokens per second, measured or not."""
    start, names = f"{model}/efficiency/", ("speedup", "tokens_per_second")
    found = {"": f"{start}{names[-1]}"}
    for name in reversed(names):
        for column in study.columns:
            if column.startswith(start) and column.endswith(f"/{name}"):
                found[column.removeprefix(start).removesuffix(name).rstrip("/")] = column
    if study.x in study.columns and _is_speed(study.x) and study.x.startswith(start):
        found[study.x.removeprefix(start).rpartition("/")[0]] = study.x
    return found


def _front(study: Study, score: str, speed: str, path_stem: Path) -> Iterator[Picture]:
    """Score against speed, or against what is left of the parameters where it was not measured, or not on one
    device."""
    measured = speed in study.columns and speed not in study.devices
    places: list[float | None] = []
    for number, run in enumerate(study.runs):
        left = None
        if not measured and run.summary and "parameters" in run.summary:
            left = 100 * run.summary["parameters"]["pruned"] / run.summary["parameters"]["dense"]
        places.append(study.value(number, speed) if measured else left)
    drawn = [i for i, place in enumerate(places) if place is not None and score in study.numbers[i] and study.newest[i]]
    if len({places[i] for i in drawn}) < 2:
        return
    options = study.series or telling_options(study)
    keys = {i: tuple(text_of(study.runs[i].option(name)) for name in options) for i in drawn}
    looks = series_looks(study, options, list(dict.fromkeys(keys.values())))
    grouped: dict[tuple[Value, ...], list[Point]] = {}
    for i in drawn:
        of_run = study.numbers[i][score]
        grouped.setdefault(keys[i], []).append(Point(float(places[i] or 0), of_run.value, of_run.stderr))
    is_faster_more = measured and study.is_higher_better(speed)
    sign = (1 if is_faster_more else -1, 1 if study.is_higher_better(score) else -1)
    competing = [i for i in drawn if study.within_budget[i]]
    found_at = [(float(places[i] or 0), study.numbers[i][score].value) for i in competing]
    # a percent of the parameters is one size, as among the winners
    goals = [(sign[0] * (place if measured else round(place)), sign[1] * value) for place, value in found_at]
    best = sorted(found_at[i] for i in pareto_front(goals))
    dense = study.dense.get(f"dense/{parted(score)[1]}")
    dense_place = _dense_speed(study, speed) if measured else 100.0
    reference = None if dense is None or dense_place is None else ("dense", Point(dense_place, dense.value))
    ys = [study.numbers[i][score].value for i in drawn] + ([dense.value] if dense is not None else [])
    title = f"{score} by {speed if measured else 'parameters left'}"
    why = "speed was measured on several devices" if speed in study.devices else "speed was not measured"
    label = f"{speed} ({'higher' if is_faster_more else 'lower'} is better)"
    label = label if measured else f"parameters left in percent ({why})"
    files = curves.front(
        [Curve(label_of(key) or "runs", looks[key], grouped[key]) for key in looks],
        best,
        path_stem,
        title=f"{study.name}: {title}",
        x=Axis(label),
        y=_axis(study, score, log=not study.kinds[score].is_score and spans_decades(ys)),
        reference=reference,
        legend=", ".join(options),
        note=_note(study, score, [[i] for i in drawn]),
    )
    yield Picture(title, files)


def _dense_speed(study: Study, speed: str) -> float | None:
    if speed.endswith("speedup"):
        return 1.0
    dense = study.dense.get(f"dense/{parted(speed)[1]}")
    return None if dense is None else dense.value


def label_of(values: Sequence[Value]) -> str:
    """Values for a legend; of a long one, a path say, its end."""
    texts = [text_of(value) for value in values]
    return ", ".join(text if len(text) <= _LONGEST else f"...{text[3 - _LONGEST :]}" for text in texts)


def telling_options(study: Study) -> list[str]:
    """The options that tell runs apart in pictures without a given series: at most two, the method first, then x."""
    names = dict.fromkeys(["method", study.x or "", *study.varied])
    return [name for name in names if name in study.options][:2]


# By what a warning calls them, in their order on the page. A plugin adds one when it is imported.
PLOTS: dict[str, Callable[[Study, Path], Iterator[Picture]]] = {
    "metric": _metric,
    "score by layers": _layers,
    "score by speed": _speed,
}
