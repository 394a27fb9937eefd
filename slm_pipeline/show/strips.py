"""The layers that runs kept, merged and dropped, one strip above the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_pipeline.show.canvas import new_figure, put_title, save
from slm_pipeline.show.marks import Mark
from slm_pipeline.show.marks import looks as mark_looks

_WIDTH = 5.0  # inches, as `curves`
_KEPT, _MERGED, _DROPPED = "#D9D9D9", "#0072B2", "#B0B0B0"


@dataclass(frozen=True)
class Strip:
    """What became of the dense model's layers, in one plan."""

    label: str
    layer_groups: Sequence[Sequence[int]]
    dropped: Sequence[int]
    num_layers: int  # of the dense model
    marks: Sequence[Mark] = ()


def layer_strips(strips: Sequence[Strip], path_stem: Path, *, title: str, note: str = "") -> list[Path]:
    """A row for each plan over the dense model's layers: grey is kept, a blue bar became one layer, hatched is gone.

    Returns:
        The files written.
    """
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

    looks: dict[str, dict[str, Any]] = {
        "kept": {"fc": _KEPT, "ec": "white", "lw": 0.6},
        "merged into one": {"fc": _MERGED, "ec": "white", "lw": 0.6},
        "dropped": {"fc": "white", "ec": _DROPPED, "hatch": "//////", "lw": 0.4},
        **mark_looks((mark for strip in strips for mark in strip.marks), _KEPT, 0.4),
    }
    used = set()
    depth = max(strip.num_layers for strip in strips)
    with new_figure(_WIDTH, 0.95 + 0.24 * len(strips)) as figure:
        axes = figure.add_subplot()

        def cell(kind: str, left: float, bottom: float, width: float, height: float) -> None:
            used.add(kind)
            axes.add_patch(Rectangle((left, bottom), width, height, **looks[kind]))

        for row, strip in enumerate(strips):
            bottom = row - 0.36
            for group in strip.layer_groups:
                kind = "merged into one" if len(group) > 1 else "kept"
                for first, last in _neighbours(group):
                    cell(kind, first - 0.5, bottom, last - first + 1, 0.72)
            for layer in strip.dropped:
                cell("dropped", layer - 0.5, bottom, 1, 0.72)
            for mark in strip.marks:
                low = 0.72 * (1 - mark.bottom - mark.height)  # rows count downwards
                for layer in mark.layers:
                    cell(mark.label, layer - 0.5, bottom + low, 1, 0.72 * mark.height)
            axes.text(depth - 0.2, row, str(len(strip.layer_groups)), va="center", ha="left", size=7)
        axes.text(depth - 0.2, -0.72, "left", va="bottom", ha="left", size=7)
        axes.set(xlim=(-0.7, depth - 0.3), ylim=(len(strips) - 0.45, -0.55), xlabel="layer of the dense model")
        axes.set_yticks(range(len(strips)), [strip.label for strip in strips])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=16))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        put_title(figure, title)
        entries = [Patch(**looks[kind], label=kind) for kind in looks if kind in used]
        figure.legend(handles=entries, loc="outside lower center", ncols=min(3, len(entries)))
        if note:
            figure.supxlabel(note, x=0.01, ha="left", size=6.5, color="#555555", wrap=True)
        return save(figure, path_stem)


def _neighbours(group: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of neighbouring layers in a group, first and last of each."""
    runs: list[tuple[int, int]] = []
    for layer in group:
        if runs and runs[-1][1] + 1 == layer:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs
