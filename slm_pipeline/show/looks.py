"""How a method, a recovery or any other value is drawn: the same in every plot of every study.

Colour alone cannot tell sixteen methods apart, so each has a colour, a marker and a line style of its own. The colours
are Okabe and Ito's, which colour-blind readers can tell apart, less yellow; their orange and sky blue, which white
paper swallows, are a brown and an indigo on it, and themselves on a dark page (`show.dark`). Every one has a contrast
of at least 3 to 1 with what it stands on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product

Value = str | int | float  # of an option


BLACK, BROWN, INDIGO, GREEN = "#000000", "#6B3300", "#4A2A90", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
CATEGORIES = (BLUE, VERMILION, GREEN, PURPLE, BROWN, INDIGO)
MARKERS = "osD^vPX*"
LINES = ["-", "--", "-.", ":"]


@dataclass(frozen=True)
class Look:
    """How a curve is drawn."""

    color: str
    marker: str
    line: str  # matplotlib's line style


# Papers of one family share a colour.
METHODS = {
    "slm": Look(BLUE, "o", "-"),
    "come": Look(VERMILION, "s", "-"),
    "come_posterior": Look(VERMILION, "D", "--"),
    "laco": Look(GREEN, "^", "-"),
    "mka": Look(PURPLE, "v", "-"),
    "shortgpt": Look(BROWN, "o", "--"),
    "angular": Look(BROWN, "s", "-."),
    "streamline": Look(BROWN, "D", ":"),
    "replaceme": Look(BROWN, "X", "-"),
    "sleb": Look(GREEN, "v", "--"),
    "finercut": Look(PURPLE, "^", "--"),
    "shortened_ppl": Look(INDIGO, "o", "-"),
    "shortened_taylor": Look(INDIGO, "^", "--"),
    "shortened_magnitude": Look(INDIGO, "v", ":"),
    "reverse": Look(BLACK, "X", ":"),
    "from_plan": Look(BLACK, "s", "--"),
    "none": Look(BLACK, "*", "-"),
    "combined": Look(BLUE, "P", "--"),
    "flap": Look(VERMILION, "P", "-."),
    "wanda_sp": Look(GREEN, "P", "-."),
    "llm_pruner": Look(PURPLE, "P", "-."),
    "fisher_mask": Look(INDIGO, "P", "-."),
    "obs": Look(BLACK, "P", "-."),
    "nystrom": Look(BROWN, "P", "-."),
    "head_importance": Look(PURPLE, "h", "-."),
    "kcm": Look(INDIGO, "h", "-."),
}
RECOVERIES = {
    "none": Look(GREY, "*", ":"),
    "lora": Look(BLUE, "o", "-"),
    "partial_layers": Look(BROWN, "s", "--"),
    "full": Look(VERMILION, "D", "-"),
    "distill": Look(GREEN, "^", "-."),
    "block_mse": Look(PURPLE, "v", ":"),
}
_FIXED = {"method": METHODS, "recovery": RECOVERIES}


def looks_of(option: str, values: Sequence[Value]) -> dict[Value, Look]:
    """A look for each value of an option, no two alike.

    Methods and recoveries have theirs by name. Other names are categories: `CATEGORIES`, one marker after the other.
    Numbers take colours of a sequential map, by size.
    """
    distinct = list(dict.fromkeys(values))
    fixed = {value: look for value in distinct if (look := _FIXED.get(option, {}).get(str(value))) is not None}
    if all(not isinstance(value, str) for value in distinct):
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        distinct.sort()
        places = [
            0.56 * i / max(1, len(distinct) - 1) for i in range(len(distinct))
        ]  # beyond it white paper swallows it
        colors = [to_hex(colormaps["viridis"](place)) for place in places]
        shapes = [(MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]) for i in range(len(distinct))]
        return {value: Look(color, *shape) for value, color, shape in zip(distinct, colors, shapes, strict=True)}
    free = unused(fixed.values())
    return {value: fixed.get(value) or next(free) for value in distinct}


def unused(taken: Iterable[Look]) -> Iterator[Look]:
    """Looks in the colours of `CATEGORIES` whose colour and marker none of the taken ones has; their lines differ last.

    Endless: after 192, or less what is taken, they come again.
    """
    known = {(look.marker, look.color) for look in taken}
    marks, colors = len(MARKERS), len(CATEGORIES)
    half = math.lcm(marks, colors)  # 24: then each colour meets the other half of the markers
    shapes = [(MARKERS[(i + i // half) % marks], CATEGORIES[i % colors]) for i in range(marks * colors)]
    free = [shape for shape in shapes if shape not in known]
    rounds = range(len(LINES))
    return cycle([Look(c, m, LINES[(i + turn) % len(LINES)]) for turn in rounds for i, (m, c) in enumerate(free)])


def told_apart(looks: Sequence[Look], *, markers: bool = False) -> list[Look]:
    """The looks in their order; of those that are equal all but the first keep the colour alone.

    ``markers``: those with one colour and marker count as equal, as far as there are other markers: a point that stands
    alone has no line.
    """
    found: list[Look] = []
    for look in looks:
        taken = {(one.color, one.marker) for one in found}
        if look in found or (markers and (look.color, look.marker) in taken):
            others = [Look(look.color, marker, line) for line, marker in product(LINES, MARKERS)]
            free = [one for one in others if one not in found and one not in looks]
            free.sort(key=lambda one: markers and (one.color, one.marker) in taken)
            look = next(iter(free), look)
        found.append(look)
    return found


def combined(color: Look, marker: Look, line: Look | None = None) -> Look:
    """The look of a curve that two or three options name: each decides what it is called here."""
    return Look(color.color, marker.marker, (line or marker).line)
