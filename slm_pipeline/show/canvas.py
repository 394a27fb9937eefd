"""What all pictures have in common: their style, and how they get to disk.

The same input gives the same bytes: no dates, fixed identifiers in the SVG, and none of the user's matplotlib settings.
"""

from __future__ import annotations

import os
import secrets
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "slm_pipeline",
    "text.parse_math": False,  # a $ in a path is a $
}
WIDTH = 6.9  # inches, both columns of a paper
DPI = 200
_PER_INCH = 12.5  # characters of a title


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches in our style, drawn without a display."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def put_title(figure: Figure, title: str) -> None:
    """Above everything, in as many lines as the figure's width asks for."""
    characters = int(_PER_INCH * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.wrap(title, characters)), x=0.01, ha="left", size=9)


def save(figure: Figure, path_stem: Path) -> list[Path]:
    """Write ``<path_stem>.png`` and ``.svg``, whole or not at all; returns both."""
    path_stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        path = path_stem.with_name(f"{path_stem.name}.{kind}")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
    return paths


def spans_decades(values: Sequence[float], factor: float = 10.0) -> bool:
    """Whether positive numbers differ so much that a linear axis would hide the small ones."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= factor


def log_scale(axes: Axes, name: str) -> None:
    """A logarithmic axis with plain numbers on it, and more of them where it spans little."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis = axes.xaxis if name == "x" else axes.yaxis
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    low, high = axis.get_data_interval()
    narrow = high / low < 200
    axis.set_major_locator(LogLocator(subs=[1, 2, 5] if narrow else [1]))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
