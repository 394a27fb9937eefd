"""Marks on the layers of a plan's picture: whatever became of a layer that is neither merged nor dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_HATCHES = {
    "upper": ("////", "\\\\\\\\", "----"),
    "lower": ("....", "oooo", "****"),
    "whole": ("xxx", "+++", "|||"),
}
_PLACES = {"upper": (0.5, 0.5), "lower": (0.0, 0.5), "whole": (0.0, 1.0)}  # bottom and height in a cell of height 1


@dataclass(frozen=True)
class Mark:
    """Hatching on some layers.

    Attributes:
        label: in the legend.
        layers: of the dense model; of a merged layer its lowest.
        part: upper | lower: that half of the cell is empty; whole: the hatching lies over all of the cell.
    """

    label: str
    layers: Sequence[int]
    part: str = "whole"

    @property
    def bottom(self) -> float:
        """Where it begins in a cell of height 1."""
        return _PLACES[self.part][0]

    @property
    def height(self) -> float:
        return _PLACES[self.part][1]


def looks(marks: Iterable[Mark], edge: str, line_width: float) -> dict[str, dict[str, Any]]:
    """How the patches of each label are drawn, in order of appearance; labels of one part differ in their hatches."""
    parts = {mark.label: mark.part for mark in marks}
    number = dict.fromkeys(_HATCHES, -1)
    found: dict[str, dict[str, Any]] = {}
    for label, part in parts.items():
        number[part] += 1
        hatch = _HATCHES[part][number[part] % len(_HATCHES[part])]
        face = "none" if part == "whole" else "white"
        found[label] = {"fc": face, "ec": edge, "hatch": hatch, "lw": line_width}
    return found
