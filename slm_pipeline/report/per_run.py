"""What each run did on its way, over or beside each other: its search, its layers, its training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slm_pipeline.errors import only_warned_about
from slm_pipeline.report import damage
from slm_pipeline.report.damage import Damaged
from slm_pipeline.report.plots import Picture, label_of, series_looks, telling_options
from slm_pipeline.report.runs import Run
from slm_pipeline.report.study import Study, text_of
from slm_pipeline.show import curves, pictures
from slm_pipeline.show.curves import Trace, Training
from slm_pipeline.show.looks import Look, told_apart
from slm_pipeline.show.strips import Strip, layer_strips
from slm_pipeline.surgery.changes import Changes

log = logging.getLogger(__name__)

MOST = 40  # strips or traces in one picture


def draw(study: Study, folder: Path) -> list[Picture]:
    """Every picture for which some run has left something, written into ``folder``."""
    drawn: list[Picture] = []
    for name, plot in (("searches", _searches), ("layers", _strips), ("trainings", _trainings)):
        with only_warned_about(f"no plot of the {name}"):
            drawn += plot(study, folder)
    return drawn


def _searches(study: Study, folder: Path) -> Iterator[Picture]:
    plans = {i: _read(run.path / "plan.json", damage.PLAN) for i, run in enumerate(study.runs) if run.summary}
    found = {i: plan["scores"]["steps"] for i, plan in plans.items() if plan and plan["scores"].get("steps")}
    if not found:
        return
    distinct = _distinct(study, found, study.varied)
    looks = _looks(study, [i for _, i in distinct], telling_options(study))
    traces = [Trace(label, looks[i], found[i], plans[i].get("threshold")) for label, i in distinct[:MOST]]
    title = "similarity at each step of the search"
    note = "; ".join(["filled: accepted, hollow: rejected, dotted: the threshold", *_cut(distinct)])
    files = curves.search_traces(traces, folder / "search_traces", title=f"{study.name}: {title}", note=note)
    yield Picture(title, files)


def _strips(study: Study, folder: Path) -> Iterator[Picture]:
    found = {}
    for i, run in enumerate(study.runs):
        if run.summary and "layer_groups" in run.summary and "num_layers" in run.summary:
            depth = run.summary["num_layers"]["dense"]
            marks = Changes.of(run.summary).marks
            found[i] = Strip("", run.summary["layer_groups"], run.summary.get("dropped", []), depth, marks)
    if not found:
        return
    distinct = _distinct(study, {i: asdict(strip) for i, strip in found.items()}, study.varied)
    strips = [replace(found[i], label=label) for label, i in distinct[:MOST]]
    title = "layers kept, merged and dropped"
    note = "; ".join(_cut(distinct))
    yield Picture(title, layer_strips(strips, folder / "layer_strips", title=f"{study.name}: {title}", note=note))


def _trainings(study: Study, folder: Path) -> Iterator[Picture]:
    found = {i: rows for i, run in enumerate(study.runs) if (rows := training_rows(run))}
    if not found:
        return
    options = [name for name in study.varied if name != "recovery"]  # each recovery has a panel
    panels: dict[str, dict[int, list[dict[str, float]]]] = {}
    for i, rows in found.items():
        panels.setdefault(_recovery(study.runs[i])["name"], {})[i] = rows
    trainings = []
    for name, members in panels.items():
        distinct = _distinct(study, members, options)
        looks = _looks(study, [i for _, i in distinct], options or ["recovery"])
        for label, i in distinct[:MOST]:
            loss = _recovery(study.runs[i]).get("loss", "nats per answer token")
            for unit, rows in pictures.by_unit(found[i], loss).items():
                trainings.append(Training(name, unit, label, looks[i], rows))
    title = "training and validation loss"
    note = "thin: training, with markers: validation"
    files = curves.training_curves(trainings, folder / "training_loss", title=f"{study.name}: {title}", note=note)
    yield Picture(title, files)


def _recovery(run: Run) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (run.summary or {}).get("recovery", {"name": "recovery"})
    return found


def _looks(study: Study, runs: Sequence[int], options: Sequence[str]) -> dict[int, Look]:
    """A look for each of the runs, no two alike."""
    keys = {i: tuple(text_of(study.runs[i].option(name)) for name in options) for i in runs}
    looks = series_looks(study, options, list(dict.fromkeys(keys.values())))
    return dict(zip(keys, told_apart([looks[key] for key in keys.values()]), strict=True))


def training_rows(run: Run) -> list[dict[str, float]]:
    """A recovery's curve, as it is kept with its result or else as it was logged; empty without a recovery."""
    stage = (run.summary or {}).get("stages", {}).get("recover")
    if stage is None:
        return []
    for path in (*([Path(stage["path"])] if "path" in stage else []), run.path / "recover"):
        if (found := _read(path / "curve.json", [damage.CURVE_ROW])) is not None:
            return list(found)
    try:
        rows = damage.read_lines(run.path / "metrics.jsonl", damage.LOGGED_ROW)
    except Damaged as wrong:
        log.warning("%s: %s", run.path, wrong)
        return []
    return [row for row in rows if row["stage"] == "recover"]


def _distinct(study: Study, found: Mapping[int, Any], options: Sequence[str]) -> list[tuple[str, int]]:
    """A label and the first run for each different content, named by as few of the options as tell them apart; where
    these do not, by the jobs."""
    alike: dict[str, list[int]] = {}
    for i, content in found.items():
        alike.setdefault(json.dumps(content, sort_keys=True), []).append(i)
    values = [[[text_of(study.runs[i].option(name)) for name in options] for i in runs] for runs in alike.values()]
    labels: list[tuple[str, ...]] = [()] * len(values)
    for place in range(len(options)):
        if any(len({row[place] for row in rows}) > 1 for rows in values):
            continue  # runs that differ in it have one content
        longer = [(*label, rows[0][place]) for label, rows in zip(labels, values, strict=True)]
        if len(set(longer)) > len(set(labels)):
            labels = longer
    if len(values) == 1:  # nothing to be told from: what all of its runs have
        common = [column[0] for column in zip(*values[0], strict=True) if len(set(column)) == 1]
        labels = [tuple(common[:2])]
    names = [label_of([*filter(None, label)]) for label in labels]
    firsts = [runs[0] for runs in alike.values()]
    if len(set(names)) < len(names) or not all(names):
        more = [f" and {len(runs) - 1} more" if len(runs) > 1 else "" for runs in alike.values()]
        names = [f"job {study.runs[first].job}{also}" for first, also in zip(firsts, more, strict=True)]
    return list(zip(names, firsts, strict=True))


def _cut(distinct: Sequence[Any]) -> list[str]:
    return [f"the first {MOST} of {len(distinct)}"] if len(distinct) > MOST else []


def _read(path: Path, shape: Any) -> Any:
    """The content of a file, None if it is not there or damaged."""
    try:
        return damage.read_json(path, shape)
    except Damaged as wrong:
        log.warning("%s: %s", path.parent, wrong)
        return None
