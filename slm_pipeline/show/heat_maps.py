"""Similarity maps as pictures: what is alike, where the patches end, and what a plan did there."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.show.canvas import WIDTH, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {"cosine": "cosine similarity", "cka": "CKA"}
_PLAN_COLORS = ["#D55E00", "#CC79A7", "#56B4E9", "#009E73"]  # Okabe and Ito's, which stand out on cividis
_COLUMNS = 4
_ONE = 3.9  # inches, of a picture with a single map
_LETTERS = 14  # of a title to an inch


def heat_maps(
    panels: Sequence[Mapping[str, Any]], path_stem: Path, *, title: str, plans: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Similarity maps side by side, in the colours of one bar: two metrics are compared too.

    Args:
        panels: each ``title``; ``metric`` (cosine, cka, or another with its ``label``); ``matrix``, [L+1][L+1] numbers
            or None, where index 0 is the embeddings and i the output of layer i - 1; ``patches``, pairs of first and
            last layer, outlined.
        path_stem: where to write, without ``.png`` and ``.svg``.
        title: the picture's title.
        plans: each ``name``; ``windows``, pairs of first and last layer merged into one, outlined; ``dropped``, layers
            that are crossed out.

    Returns:
        The files written.
    """
    from matplotlib.lines import Line2D

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    large = columns < 3
    labels = list(dict.fromkeys(panel.get("label") or LABELS[panel["metric"]] for panel in panels))
    width = WIDTH if columns > 1 else _ONE
    words = textwrap.wrap(title, int(_LETTERS * width))
    with new_figure(width, rows * (width - 0.8) / columns + 0.65 + 0.15 * len(words)) as figure:
        figure.suptitle("\n".join(words), fontsize=9)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        finite = [x for panel in panels for row in panel["matrix"] for x in row if x is not None]
        lowest = min(finite, default=0.0)
        for axes, panel in zip(grid.flat, panels, strict=False):
            values = [[math.nan if x is None else x for x in row] for row in panel["matrix"]]
            image = axes.imshow(values, origin="lower", cmap="cividis", vmin=lowest, vmax=1.0)
            axes.set_title(panel["title"], fontsize=8)
            _outline(axes, panel["patches"], "white", width=0.8 if large else 0.6, dashed=True)
            for number, plan in enumerate(plans):
                color = _PLAN_COLORS[number % len(_PLAN_COLORS)]
                _outline(axes, plan["windows"], color, width=1.4 if large else 0.8)
                states = [layer + 1 for layer in plan["dropped"]]
                axes.scatter(states, states, marker="x", s=18 if large else 7, lw=1.0, color=color, zorder=4)
            _label_layers(axes, len(values), most=8 if large else 5)
        bar = figure.colorbar(image, ax=grid, shrink=0.8 if large else 1.0, aspect=30)
        bar.set_label(" and ".join(labels) if len(labels) < 3 else "similarity")
        for axes in grid[:, 0]:
            axes.set_ylabel("output of layer")
        for column in range(columns):
            lowest_axes = [axes for axes in grid[:, column] if axes.get_visible()][-1]
            lowest_axes.set_xlabel("output of layer")
        entries = [Line2D([], [], color="0.4", ls="--", lw=1.0, label="patch")]
        for number, plan in enumerate(plans):
            looks: dict[str, Any] = {
                "color": _PLAN_COLORS[number % len(_PLAN_COLORS)],
                "lw": 1.5 if plan["windows"] else 0.0,
            }
            did = [what for what, layers in (("merged", plan["windows"]), ("dropped: x", plan["dropped"])) if layers]
            marker = "x" if plan["dropped"] else ""
            label = f"{plan['name']}: {', '.join(did) or 'nothing changed'}"
            entries.append(Line2D([], [], marker=marker, ms=4, label=label, **looks))
        figure.legend(handles=entries, loc="outside lower center", ncols=min(3, len(entries)))
        return save(figure, path_stem)


def _outline(axes: Axes, runs: Sequence[Sequence[int]], color: str, *, width: float, dashed: bool = False) -> None:
    """Squares around the outputs of each run of two layers or more, seen on light and on dark."""
    from matplotlib.patches import Rectangle

    for first, last in runs:
        if last > first:
            corner, size = first + 0.5, last - first + 1  # layer 0's output is state 1
            for edge, points in (("black", width + (0.7 if dashed else 1.0)), (color, width)):
                style = "--" if dashed and edge == color else "-"
                looks: dict[str, Any] = {"fill": False, "ec": edge, "lw": points, "ls": style, "clip_on": False}
                axes.add_patch(Rectangle((corner, corner), size, size, **looks))


def _label_layers(axes: Axes, num_states: int, most: int) -> None:
    spacing = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if num_states <= most * n)
    layers = range(spacing if spacing > 1 else 0, num_states - 1, spacing)
    ticks, labels = [0, *(layer + 1 for layer in layers)], ["emb.", *map(str, layers)]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
