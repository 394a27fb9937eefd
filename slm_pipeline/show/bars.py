"""Numbers of a benchmark as bars, each beside what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm_pipeline.show.canvas import WIDTH, new_figure, save
from slm_pipeline.show.looks import BLACK, BLUE


def bars(numbers: Sequence[tuple[str, float | None, str, float | None]], path_stem: Path) -> list[Path]:
    """One panel for each unit.

    Args:
        numbers: name, value (None: there is none), unit, and what is asked of it or None.
        path_stem: where to write, without ``.png`` and ``.svg``.

    Returns:
        The files written.
    """
    units = list(dict.fromkeys(unit for _, _, unit, _ in numbers))
    heights = [sum(unit == one for _, _, unit, _ in numbers) + 2.5 for one in units]
    with new_figure(WIDTH, 0.3 * sum(heights)) as figure:
        panels = figure.subplots(len(units), squeeze=False, height_ratios=heights)[:, 0]
        for axes, unit in zip(panels, units, strict=True):
            rows = [row for row in numbers if row[2] == unit][::-1]
            values = [value or 0.0 for _, value, _, _ in rows]
            drawn = axes.barh(range(len(rows)), values, height=0.6, color=BLUE)
            texts = ["none" if value is None else f"{value:.3g}" for _, value, _, _ in rows]
            axes.bar_label(drawn, texts, padding=3)
            axes.set_yticks(range(len(rows)), [name for name, _, _, _ in rows])
            for place, (_, _, _, asked) in enumerate(rows):
                if asked is not None:
                    axes.plot([asked, asked], [place - 0.4, place + 0.4], color=BLACK, lw=1.5)
            axes.margins(x=0.12)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"{unit}; a black line: asked" if any(row[3] for row in rows) else unit)
        return save(figure, path_stem)
