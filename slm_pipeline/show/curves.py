"""Plots over many runs, from plain numbers: each as PNG to look at and as SVG for a paper."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.show import pictures
from slm_pipeline.show.canvas import log_scale, new_figure, put_title, save, spans_decades
from slm_pipeline.show.looks import BLACK, Look
from slm_pipeline.show.numerals import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL = 44  # characters of a line in the legend of a panel
_NOTE = "#555555"
_WIDTH = 5.0  # inches: two beside each other on a screen, and still to be read on a phone
_FRONT = "#555555"
_ROW = 0.155  # inches, a line of the legend
_LEAST_SPAN = 0.04  # of an axis of sizes, in their own unit: no scale of hundredths of a percent


@dataclass(frozen=True)
class Point:
    """Where a number lies; ``error`` is half the length of its bar, None for no bar."""

    x: float
    y: float
    error: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points that belong together. A faint one goes with another: hollow markers, a thin line, not in the legend."""

    label: str
    look: Look
    points: Sequence[Point]
    faint: bool = False


@dataclass(frozen=True)
class Axis:
    """What is drawn along it, and whether in powers of ten."""

    label: str
    log: bool = False


def against(
    curves: Sequence[Curve],
    path_stem: Path,
    *,
    title: str,
    x: Axis,
    y: Axis,
    reference: tuple[str, float] | None = None,
    legend: str = "",
    note: str = "",
) -> list[Path]:
    """One number against another, a line for each curve, with error bars.

    Args:
        reference: label and height of a dotted line, the dense model's number.
        legend: title of the legend, which is left out if there is but one curve and no reference.
        note: small print below.

    Returns:
        The files written.
    """
    with new_figure(_WIDTH, 3.1 + _legend_height(curve.label for curve in curves if not curve.faint)) as figure:
        axes = figure.add_subplot()
        for curve in curves:
            _draw(axes, curve)
        if reference is not None:
            axes.axhline(reference[1], color=BLACK, lw=0.8, ls=":", label=reference[0], zorder=1)
        _scales(axes, x, y)
        _titles(figure, axes, title, note)
        if len(curves) > 1 or reference is not None:
            _legend(figure, axes, legend)
        return save(figure, path_stem)


def _draw(axes: Axes, curve: Curve) -> None:
    points = sorted(curve.points, key=lambda point: point.x)
    style: dict[str, Any] = {"color": curve.look.color, "ls": curve.look.line, "lw": 1.3, "marker": curve.look.marker}
    style |= {"ms": 4.5, "label": curve.label, "zorder": 3}
    if curve.faint:
        style |= {"lw": 0.7, "mfc": "white", "label": None, "zorder": 2}
    xs, ys = [point.x for point in points], [point.y for point in points]
    if any(point.error for point in points):
        bars = [point.error or 0.0 for point in points]
        axes.errorbar(xs, ys, yerr=bars, capsize=2, elinewidth=0.8, **style)
    else:
        axes.plot(xs, ys, **style)


def ranked(
    rows: Sequence[str],
    curves: Sequence[Curve],
    path_stem: Path,
    *,
    title: str,
    x: Axis,
    reference: tuple[str, float] | None = None,
    legend: str = "",
    note: str = "",
) -> list[Path]:
    """A number for each of some names: a row for each, the first on top.

    Args:
        rows: the names.
        curves: their points lie at row ``x`` (0 is the first) with the number ``y``; a look of its own for each.

    Returns:
        The files written.
    """
    height = _legend_height(curve.label for curve in curves) if legend else 0.0
    with new_figure(_WIDTH, 1.1 + 0.21 * len(rows) + height) as figure:
        axes = figure.add_subplot()
        for curve in curves:
            style: dict[str, Any] = {"color": curve.look.color, "marker": curve.look.marker, "ms": 5.5, "ls": "none"}
            if curve.faint:
                style |= {"mfc": "white"}
            for i, point in enumerate(curve.points):
                label = curve.label if i == 0 else None
                axes.errorbar([point.y], [point.x], xerr=point.error, capsize=2, elinewidth=0.8, label=label, **style)
        if reference is not None:
            axes.axvline(reference[1], color=BLACK, lw=0.8, ls=":", label=reference[0], zorder=1)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", color="#E6E6E6", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x.label)
        if x.log:
            log_scale(axes, "x")
        _titles(figure, axes, title, note)
        if legend or reference is not None:
            _legend(figure, axes, legend)
        return save(figure, path_stem)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other one beats, as indices, in the order of their first number.

    A point is beaten by one that is at least as large in both numbers and larger in one.
    """
    front = [i for i, (x, y) in enumerate(points) if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)]
    return sorted(front, key=lambda i: points[i])


def front(
    curves: Sequence[Curve],
    best: Sequence[tuple[float, float]],
    path_stem: Path,
    *,
    title: str,
    x: Axis,
    y: Axis,
    reference: tuple[str, Point] | None = None,
    legend: str = "",
    note: str = "",
) -> list[Path]:
    """Runs as points between two goals, and a line through those that no other run beats in both.

    Args:
        best: the points of the Pareto front, in the order of x.
        reference: label and place of the dense model.

    Returns:
        The files written.
    """
    with new_figure(_WIDTH, 3.3 + _legend_height([*(curve.label for curve in curves), "Pareto front"])) as figure:
        axes = figure.add_subplot()
        if best:
            xs, ys = zip(*best, strict=True)
            axes.plot(xs, ys, color=_FRONT, lw=1.6, ls="-", zorder=2, label="Pareto front")
            axes.plot(xs, ys, color=_FRONT, marker="o", ms=10, mfc="none", mew=1.2, ls="none", zorder=2)
        for curve in curves:
            style: dict[str, Any] = {"color": curve.look.color, "marker": curve.look.marker, "ms": 5.5, "ls": "none"}
            for i, point in enumerate(curve.points):
                label = curve.label if i == 0 else None
                axes.errorbar([point.x], [point.y], yerr=point.error, elinewidth=0.6, label=label, zorder=3, **style)
        if reference is not None:
            place = reference[1]
            axes.plot([place.x], [place.y], color=BLACK, marker="*", ms=9, ls="none", label=reference[0], zorder=4)
        _scales(axes, x, y)
        _titles(figure, axes, title, note)
        _legend(figure, axes, legend)
        return save(figure, path_stem)


@dataclass(frozen=True)
class Trace:
    """A threshold search: its steps (a plan's ``scores.steps``) in order, and the threshold."""

    label: str
    look: Look
    steps: Sequence[Mapping[str, Any]]
    threshold: float | None


def search_traces(
    traces: Sequence[Trace], path_stem: Path, *, title: str, legend: str = "", note: str = ""
) -> list[Path]:
    """The similarity at each step of several searches, over each other.

    Returns:
        The files written.
    """
    from matplotlib.ticker import MaxNLocator

    with new_figure(_WIDTH, 3.3 + _legend_height(trace.label for trace in traces)) as figure:
        axes = figure.add_subplot()
        for trace in traces:
            color = trace.look.color
            numbers = range(1, len(trace.steps) + 1)
            similarities = [step["similarity"] for step in trace.steps]
            axes.plot(numbers, similarities, color=color, lw=0.9, alpha=0.8, label=trace.label, zorder=2)
            for accepted, face in ((True, color), (False, "white")):
                chosen = [i for i, step in enumerate(trace.steps) if step["accepted"] == accepted]
                places = [i + 1 for i in chosen], [similarities[i] for i in chosen]
                axes.scatter(*places, s=14, fc=face, ec=color, lw=0.9, marker=trace.look.marker, zorder=3)
            if trace.threshold is not None:
                axes.axhline(trace.threshold, color=color, lw=0.6, ls=":", zorder=1)
        _titles(figure, axes, title, note)
        axes.set(xlabel="search step", ylabel="similarity to the dense model")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if len(traces) > 1:
            _legend(figure, axes, legend)
        return save(figure, path_stem)


@dataclass(frozen=True)
class Training:
    """The curve of a recovery: rows of ``step`` with ``loss`` or ``eval_loss``."""

    panel: str
    loss: str  # what the numbers are
    label: str
    look: Look
    rows: Sequence[Mapping[str, float]]


def training_curves(trainings: Sequence[Training], path_stem: Path, *, title: str, note: str = "") -> list[Path]:
    """Training losses (thin) and validation losses (with markers), a panel for each recovery and unit of its losses.

    Returns:
        The files written.
    """
    from matplotlib.ticker import MaxNLocator

    panels: dict[tuple[str, str], list[Training]] = {}
    for training in trainings:
        panels.setdefault((training.panel, training.loss), []).append(training)
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    with new_figure(_WIDTH, 0.5 + 2.4 * down) as figure:
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, ((name, loss), members) in zip(grid.flat, panels.items(), strict=False):
            for training in members:
                for rows in pictures.trainings(training.rows):
                    _draw_training(axes, training, rows)
            axes.set_title(name, loc="left")
            axes.set(xlabel="optimiser step", ylabel=f"loss ({loss})")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=5))
            if spans_decades([value for line in axes.lines for value in line.get_ydata()]):
                log_scale(axes, "y")
            handles, labels = axes.get_legend_handles_labels()
            first = dict(reversed([*zip(labels, handles, strict=True)]))  # of each label
            if first and set(first) != {""}:
                names = [textwrap.fill(label, _LABEL) for label in sorted(first)]
                legend = axes.legend([first[label] for label in sorted(first)], names, fontsize=6.5)
                legend.set_in_layout(False)  # else a long label leaves no room for the curves
        put_title(figure, title)
        _note(figure, note)
        return save(figure, path_stem)


def _draw_training(axes: Axes, training: Training, rows: Sequence[Mapping[str, float]]) -> None:
    look = training.look
    for key in ("loss", "eval_loss"):
        if points := pictures.loss_points(rows, key):
            style: dict[str, Any] = {"lw": 0.6, "alpha": 0.6, "zorder": 2, "marker": "" if len(points) > 1 else "."}
            if key == "eval_loss":
                style = {"lw": 1.3, "marker": look.marker, "ms": 3.5, "label": training.label, "zorder": 3}
            axes.plot(*zip(*points, strict=True), color=look.color, ls=look.line, **style)


def _scales(axes: Axes, x: Axis, y: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x.label, ylabel=y.label)
    for name, axis in (("x", x), ("y", y)):
        if axis.log:
            log_scale(axes, name)
    if x.label in ("layers", "num_layers"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    elif x.label.startswith("parameters") and not x.log:
        axes.xaxis.set_major_formatter(lambda value, _: count(round(value)) if value > 1e3 else f"{value:g}")
        low, high = axes.dataLim.intervalx
        if high - low < (least := _LEAST_SPAN * high):
            axes.set_xlim((low + high - least) / 2, (low + high + least) / 2)
    axes.grid(color="#EDEDED", lw=0.6)
    axes.set_axisbelow(True)


def _titles(figure: Figure, axes: Axes, title: str, note: str) -> None:
    """The small print stands below the title, for the legend stands below the axes."""
    axes.set_title("\n".join(textwrap.wrap(note, 88)), loc="left", size=6.5, color=_NOTE)
    put_title(figure, title)


def _legend(figure: Figure, axes: Axes, title: str) -> None:
    """Below the axes: beside them it would take the width that a phone has."""
    handles, labels = axes.get_legend_handles_labels()
    looks: dict[str, Any] = {"ncols": _legend_columns(labels), "fontsize": 7, "title_fontsize": 7, "alignment": "left"}
    figure.legend(handles, labels, loc="outside lower left", title=title or None, **looks)


def _legend_columns(labels: Sequence[str]) -> int:
    """As many as there is room for."""
    longest = max(map(len, labels), default=1)
    return max(1, min(4, len(labels), 86 // (longest + 6)))


def _legend_height(labels: Iterable[str]) -> float:
    """In inches; of the curves', a reference and a title."""
    found = list(dict.fromkeys(labels))
    return _ROW * (2 + math.ceil(len(found) / _legend_columns(found)))


def _note(figure: Figure, note: str) -> None:
    if note:
        figure.supxlabel(note, x=0.01, ha="left", size=6.5, color=_NOTE, wrap=True)
