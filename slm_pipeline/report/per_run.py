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
from slm_pipeline.show.looks import Look
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
    distinct = _distinct(study, found, options)
    looks = _looks(study, [i for _, i in distinct], options or ["recovery"])
    trainings = []
    for label, i in distinct:
        recovery = (study.runs[i].summary or {}).get("recovery", {"name": "recovery"})
        loss = recovery.get("loss", "nats per answer token")
        for unit, rows in pictures.by_unit(found[i], loss).items():
            trainings.append(Training(recovery["name"], unit, label, looks[i], rows))
    title = "training and validation loss"
    note = "thin: training, with markers: validation"
    files = curves.training_curves(trainings, folder / "training_loss", title=f"{study.name}: {title}", note=note)
    yield Picture(title, files)


def _looks(study: Study, runs: Sequence[int], options: Sequence[str]) -> dict[int, Look]:
    keys = {i: tuple(text_of(study.runs[i].option(name)) for name in options) for i in runs}
    looks = series_looks(study, options, list(dict.fromkeys(keys.values())))
    return {i: looks[key] for i, key in keys.items()}


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
    """A label and the first run for each different content, named by those of the options that it goes with."""
    alike: dict[str, list[int]] = {}
    for i, content in found.items():
        alike.setdefault(json.dumps(content, sort_keys=True), []).append(i)
    values = [[[text_of(study.runs[i].option(name)) for name in options] for i in runs] for runs in alike.values()]
    telling = [place for place in range(len(options)) if all(len({row[place] for row in rows}) == 1 for rows in values)]
    labels = [label_of([*filter(None, (rows[0][place] for place in telling))]) for rows in values]
    if len(set(labels)) < len(labels) or not all(labels):  # then by all that its runs differ in
        each = [list(dict.fromkeys(label_of([*filter(None, row)]) for row in rows)) for rows in values]
        labels = [" | ".join(names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]) for names in each]
    firsts = [runs[0] for runs in alike.values()]
    return [(label or f"job {study.runs[first].job}", first) for label, first in zip(labels, firsts, strict=True)]


def _cut(distinct: Sequence[Any]) -> list[str]:
    return [f"the first {MOST} of {len(distinct)}"] if len(distinct) > MOST else []


def _read(path: Path, shape: Any) -> Any:
    """The content of a file, None if it is not there or damaged."""
    try:
        return damage.read_json(path, shape)
    except Damaged as wrong:
        log.warning("%s: %s", path.parent, wrong)
        return None
