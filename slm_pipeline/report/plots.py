"""Which plots a study gets, and the numbers in them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_pipeline.report import curves
from slm_pipeline.report.columns import higher_is_better, is_score, parted, shown
from slm_pipeline.report.curves import Axis, Curve, Point, Trace, Training, pareto_front, spans_decades
from slm_pipeline.report.looks import BLUE, Look, combined, looks_of
from slm_pipeline.report.runs import Run, Value
from slm_pipeline.report.strips import Strip, layer_strips
from slm_pipeline.report.study import Study, mean_and_deviation, text_of

MOST = 40  # strips, traces or trainings in one picture

_PLAIN = Look(BLUE, "o", "-")


@dataclass(frozen=True)
class Picture:
    """A plot on disk."""

    title: str
    files: Sequence[Path]  # PNG and SVG


def draw(study: Study, folder: Path) -> list[Picture]:
    """Every plot for which the study has numbers, written into ``folder``."""
    return [*_metric(study, folder), *_layers(study, folder), *_speed(study, folder), *_per_run(study, folder)]


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
    score = _score(study)
    if score is not None and (score, "layers") != (study.metric, study.x):
        title = f"{score} by layers"
        if files := _against(study, score, "layers", folder / "score_by_layers", title):
            yield Picture(title, files)


def _score(study: Study) -> str | None:
    """The last model's average, else its perplexity."""
    for start in ("average", "perplexity"):
        found = [name for name in study.columns if name.startswith(f"{start} ")]
        if found:
            return found[-1]
    return None


def _against(study: Study, column: str, x: str, path_stem: Path, title: str) -> list[Path]:
    found = [*_curves(study, column, x, study.series)]
    before = _before(study, column)
    if before is not None:
        hollow = _curves(study, before, x, study.series)
        found += [Curve(f"{c.label}, {parted(before)[1]}", c.look, c.points, faint=True) for c in hollow]
    if not found:
        return []
    ys = [point.y for curve in found for point in curve.points]
    xs = [point.x for curve in found for point in curve.points]
    reference = _dense(study, column)
    log_y = not is_score(column) and spans_decades([*ys, *([reference[1]] if reference else [])])
    return curves.against(
        found,
        path_stem,
        title=f"{study.name}: {title}",
        x=Axis(x, log=x in study.options and spans_decades(xs)),
        y=_axis(column, log=log_y),
        reference=reference,
        legend=", ".join(study.series),
        note=_note(study, column, x),
    )


def _ranked(study: Study, column: str, x: str, path_stem: Path, title: str) -> list[Path]:
    """A row for each value of an option that is no number, the best on top."""
    points: dict[tuple[Value, tuple[Value, ...]], Point] = {}
    for (name, *others), members in study.groups([x, *study.series]).items():
        if name is not None and _numbers(study, column, members):
            points[name, tuple(map(text_of, others))] = _point(study, column, 0.0, members)
    if not points:
        return []
    sign = -1 if higher_is_better(column) else 1
    best: dict[Value, float] = {}
    for (name, _), point in points.items():
        best[name] = min(best.get(name, math.inf), sign * point.y)
    rows = sorted(best, key=lambda name: best[name])
    keys = list(dict.fromkeys(key for _, key in points))
    looks = _series_looks(study, keys) if study.series else {}
    by_name = looks_of(x, rows)
    found = []
    for name, key in points:
        look = looks.get(key) or by_name[name]
        at = Point(float(rows.index(name)), points[name, key].y, points[name, key].error)
        found.append((", ".join(map(str, key)), look, at))
    merged: dict[tuple[str, Look], list[Point]] = {}
    for label, look, at in found:
        merged.setdefault((label, look), []).append(at)
    reference = _dense(study, column)
    ys = [*(point.y for point in points.values()), *([reference[1]] if reference else [])]
    return curves.ranked(
        [text_of(name) for name in rows],
        [Curve(label, look, places) for (label, look), places in merged.items()],
        path_stem,
        title=f"{study.name}: {title}",
        x=_axis(column, log=not is_score(column) and spans_decades(ys)),
        reference=reference,
        legend=", ".join(study.series),
        note=_note(study, column, x),
    )


def _curves(study: Study, column: str, x: str, series: Sequence[str]) -> list[Curve]:
    """A curve for each combination of the series' values; runs alike in these and in x are one point, their mean."""
    groups: dict[tuple[Value, ...], dict[float, list[int]]] = {}
    for i, run in enumerate(study.runs):
        place = study.measures[i].get(x) if x in study.columns else run.option(x)
        if column in study.measures[i] and isinstance(place, (int, float)):
            key = tuple(text_of(run.option(name)) for name in series)
            groups.setdefault(key, {}).setdefault(float(place), []).append(i)
    looks = _series_looks(study, list(groups))
    return [
        Curve(
            ", ".join(map(str, key)) or parted(column)[1] or column,
            looks[key],
            [_point(study, column, place, members) for place, members in sorted(places.items())],
        )
        for key, places in groups.items()
    ]


def _series_looks(study: Study, keys: Sequence[tuple[Value, ...]]) -> dict[tuple[Value, ...], Look]:
    """Of each combination of the series' values: the first option decides the colour, the second marker and line."""
    return _looks(study, list(study.series), keys)


def _looks(study: Study, options: Sequence[str], keys: Sequence[tuple[Value, ...]]) -> dict[tuple[Value, ...], Look]:
    if not options:
        return dict.fromkeys(keys, _PLAIN)
    tables = []
    for place, option in enumerate(options[:2]):
        wanted = {key[place] for key in keys}
        values = {run.option(option) for run in study.runs}
        named = [value for value in values if value is not None and text_of(value) in wanted]
        order = sorted(named, key=lambda value: (isinstance(value, str), value))
        looks = looks_of(option, order)
        tables.append({text_of(value): looks[value] for value in order})
    if len(tables) == 1:
        return {key: tables[0][str(key[0])] for key in keys}
    return {key: combined(tables[0][str(key[0])], tables[1][str(key[1])]) for key in keys}


def _numbers(study: Study, column: str, members: Sequence[int]) -> list[float]:
    return [study.measures[i][column] for i in members if column in study.measures[i]]


def _point(study: Study, column: str, place: float, members: Sequence[int]) -> Point:
    """The mean and, over several runs, their standard deviation; of one run its standard error."""
    numbers = _numbers(study, column, members)
    mean, deviation = mean_and_deviation(numbers)
    if len(numbers) > 1:
        return Point(place, mean, deviation)
    (member,) = [i for i in members if column in study.measures[i]]
    return Point(place, mean, study.errors[member].get(column))


def _before(study: Study, column: str) -> str | None:
    """For a number after the recovery, the same number before it."""
    quantity, target = parted(column)
    before = f"{quantity} pruned"
    return before if target == "recovered" and before in study.columns else None


def _dense(study: Study, column: str) -> tuple[str, float] | None:
    name = f"{parted(column)[0]} dense"
    return (f"dense: {shown(name, study.dense[name])}", study.dense[name]) if name in study.dense else None


def _axis(column: str, *, log: bool = False) -> Axis:
    unit = " in percent" if is_score(column) else ""
    direction = "higher" if higher_is_better(column) else "lower"
    return Axis(f"{column}{unit} ({direction} is better)", log)


def _note(study: Study, column: str, x: str) -> str:
    """Small print: what the error bars are, what was averaged, what is missing."""
    words = []
    drawn = [i for i, found in enumerate(study.measures) if column in found]
    sizes = {len(members) for members in study.groups([x, *study.series]).values()}
    if x not in study.columns and max(sizes) > 1:
        over = [name for name in study.options if name not in (x, *study.series)]
        words.append(f"points: mean over {', '.join(over)}; bars: standard deviation")
    elif any(column in study.errors[i] for i in drawn):
        words.append("bars: one standard error")
    missing = [run for i, run in enumerate(study.runs) if i not in drawn]
    if missing:
        kinds = {run.status: sum(other.status == run.status for other in missing) for run in missing}
        said = ", ".join(f"{n} {'done without it' if kind == 'done' else kind}" for kind, n in kinds.items())
        words.append(f"left out: {len(missing)} of {len(study.runs)} jobs ({said})")
    return "; ".join(words)


def _speed(study: Study, folder: Path) -> Iterator[Picture]:
    """Score against speed, or against what is left of the parameters where no speed was measured."""
    score = _score(study)
    if score is None:
        return
    target = parted(score)[1]
    speed = f"tokens per second {target}"
    measured = speed in study.columns
    places: list[float | None] = []
    for run, found in zip(study.runs, study.measures, strict=True):
        left = None
        if not measured and run.summary and "parameters" in run.summary:
            left = 100 * run.summary["parameters"]["pruned"] / run.summary["parameters"]["dense"]
        places.append(found.get(speed) if measured else left)
    drawn = [i for i, place in enumerate(places) if place is not None and score in study.measures[i]]
    if len({places[i] for i in drawn}) < 2:
        return
    options = study.series or _telling(study)
    keys = {i: tuple(text_of(study.runs[i].option(name)) for name in options) for i in drawn}
    looks = _looks(study, options, list(dict.fromkeys(keys.values())))
    grouped: dict[tuple[Value, ...], list[Point]] = {}
    for i in drawn:
        at = Point(float(places[i] or 0), study.measures[i][score], study.errors[i].get(score))
        grouped.setdefault(keys[i], []).append(at)
    sign = (1 if measured else -1, 1 if higher_is_better(score) else -1)
    goals = [(sign[0] * float(places[i] or 0), sign[1] * study.measures[i][score]) for i in drawn]
    best = sorted((sign[0] * goals[i][0], sign[1] * goals[i][1]) for i in pareto_front(goals))
    dense = study.dense.get(f"{parted(score)[0]} dense")
    dense_place = study.dense.get("tokens per second dense") if measured else 100.0
    reference = None if dense is None or dense_place is None else ("dense", Point(dense_place, dense))
    ys = [study.measures[i][score] for i in drawn] + ([dense] if dense is not None else [])
    title = f"{score} by {speed if measured else 'parameters left'}"
    label = f"{speed} (higher is better)" if measured else "parameters left in percent (speed was not measured)"
    files = curves.front(
        [Curve(", ".join(map(str, key)) or "runs", looks[key], points) for key, points in grouped.items()],
        best,
        folder / "score_by_speed",
        title=f"{study.name}: {title}",
        x=Axis(label),
        y=_axis(score, log=not is_score(score) and spans_decades(ys)),
        reference=reference,
        legend=", ".join(options),
        note=_note(study, score, speed),
    )
    yield Picture(title, files)


def _telling(study: Study) -> list[str]:
    """The options that tell runs apart in pictures without a given series: at most two, x first."""
    return [name for name in dict.fromkeys([study.x or "", *study.varied]) if name in study.options][:2]


def _per_run(study: Study, folder: Path) -> Iterator[Picture]:
    """What each run did on its way: its search, its layers, its training."""
    done = [i for i, run in enumerate(study.runs) if run.summary]
    plans = {i: _json(study.runs[i].path / "plan.json") for i in done}
    options = [*_telling(study)]
    keys = {i: tuple(text_of(study.runs[i].option(name)) for name in options) for i in done}
    looks = _looks(study, options, list(dict.fromkeys(keys.values())))

    searches = {i: plan["scores"]["steps"] for i, plan in plans.items() if plan and plan["scores"].get("steps")}
    if searches:
        title = "similarity at each step of the search"
        traces = [
            Trace(label, looks[keys[i]], searches[i], (plans[i] or {}).get("threshold"))
            for label, i in _distinct(study, searches)
        ]
        note = "filled: accepted, hollow: rejected, dotted: the threshold" + _cut(len(traces))
        files = curves.search_traces(traces[:MOST], folder / "search_traces", title=f"{study.name}: {title}", note=note)
        yield Picture(title, files)

    strips = {}
    for i in done:
        summary = study.runs[i].summary or {}
        if "layer_groups" in summary:
            lost = summary.get("sublayers", {})
            without = {name: lost.get(name, []) for name in ("attention", "mlp")}
            strips[i] = {"groups": summary["layer_groups"], "dropped": summary["dropped"], "without": without}
            strips[i]["num_layers"] = summary["num_layers"]["dense"]
    if strips:
        title = "layers kept, merged and dropped"
        drawn = [
            Strip(label, found["groups"], found["dropped"], found["num_layers"], found["without"])
            for label, found in ((label, strips[i]) for label, i in _distinct(study, strips))
        ]
        note = _cut(len(drawn)).removeprefix("; ")
        files = layer_strips(drawn[:MOST], folder / "layer_strips", title=f"{study.name}: {title}", note=note)
        yield Picture(title, files)

    trained = {i: rows for i in done if (rows := training_rows(study.runs[i]))}
    if trained:
        yield from _trainings(study, trained, folder)


def _trainings(study: Study, trained: Mapping[int, Any], folder: Path) -> Iterator[Picture]:
    options = [name for name in study.varied if name != "recovery"] or ["recovery"]
    distinct = _distinct(study, trained, [name for name in study.varied if name != "recovery"])
    keys = {i: tuple(text_of(study.runs[i].option(name)) for name in options) for _, i in distinct}
    looks = _looks(study, options, list(dict.fromkeys(keys.values())))
    title = "training and validation loss"
    trainings = []
    for label, i in distinct[:MOST]:
        recovery = (study.runs[i].summary or {}).get("recovery", {})
        loss = recovery.get("loss", "nats per answer token")
        trainings.append(Training(recovery.get("name", "recovery"), loss, label, looks[keys[i]], trained[i]))
    note = "thin: training, with markers: validation" + _cut(len(distinct))
    files = curves.training_curves(trainings, folder / "training_loss", title=f"{study.name}: {title}", note=note)
    yield Picture(title, files)


def training_rows(run: Run) -> list[dict[str, float]]:
    """A recovery's curve, as it is kept with its result or else as it was logged; empty without a recovery."""
    stage = (run.summary or {}).get("stages", {}).get("recover")
    if stage is None:
        return []
    for path in (Path(stage["path"]) / "curve.json", run.path / "recover" / "curve.json"):
        if (found := _json(path)) is not None:
            return list(found)
    log = run.path / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["stage"] == "recover" and "step" in row]


def _distinct(study: Study, found: Mapping[int, Any], options: Sequence[str] | None = None) -> list[tuple[str, int]]:
    """A label and the first run for each different content; what its runs have in common names them."""
    alike: dict[str, list[int]] = {}
    for i, content in found.items():
        alike.setdefault(json.dumps(content, sort_keys=True), []).append(i)
    options = study.varied if options is None else options
    labels = []
    for members in alike.values():
        texts = [[text_of(study.runs[i].option(name)) for i in members] for name in options]
        common = [values[0] for values in texts if len(set(values)) == 1 and values[0]]
        if not common and options:
            each = list(dict.fromkeys(" ".join(filter(None, values)) for values in zip(*texts, strict=True)))
            common = each if len(each) <= 3 else [*each[:2], f"{len(each) - 2} more"]
        labels.append((", ".join(common) or f"job {study.runs[members[0]].job}", members[0]))
    return labels


def _cut(number: int) -> str:
    return f"; the first {MOST} of {number}" if number > MOST else ""


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
