"""How a method, a recovery or any other value is drawn: the same in every plot of every study.

Colour alone cannot tell sixteen methods apart, so each has a colour, a marker and a line style of its own. The colours
are Okabe and Ito's, which colour-blind readers can tell apart, less yellow, which white paper swallows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

Value = str | int | float  # of an option


BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
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
    "shortgpt": Look(ORANGE, "o", "--"),
    "angular": Look(ORANGE, "s", "-."),
    "streamline": Look(ORANGE, "D", ":"),
    "replaceme": Look(ORANGE, "X", "-"),
    "sleb": Look(GREEN, "v", "--"),
    "finercut": Look(PURPLE, "^", "--"),
    "shortened_ppl": Look(SKY, "o", "-"),
    "shortened_taylor": Look(SKY, "^", "--"),
    "shortened_magnitude": Look(SKY, "v", ":"),
    "reverse": Look(BLACK, "X", ":"),
    "from_plan": Look(BLACK, "s", "--"),
    "none": Look(BLACK, "*", "-"),
    "combined": Look(BLUE, "P", "--"),
    "flap": Look(VERMILION, "P", "-."),
    "wanda_sp": Look(GREEN, "P", "-."),
    "llm_pruner": Look(PURPLE, "P", "-."),
    "fisher_mask": Look(SKY, "P", "-."),
    "obs": Look(BLACK, "P", "-."),
    "nystrom": Look(ORANGE, "P", "-."),
    "head_importance": Look(PURPLE, "h", "-."),
    "kcm": Look(SKY, "h", "-."),
}
RECOVERIES = {
    "none": Look(GREY, "*", ":"),
    "lora": Look(BLUE, "o", "-"),
    "partial_layers": Look(ORANGE, "s", "--"),
    "full": Look(VERMILION, "D", "-"),
    "distill": Look(GREEN, "^", "-."),
    "block_mse": Look(PURPLE, "v", ":"),
}
_FIXED = {"method": METHODS, "recovery": RECOVERIES}


def looks_of(option: str, values: Sequence[Value]) -> dict[Value, Look]:
    """A look for each value of an option.

    Methods and recoveries have theirs by name. Where a value has none, all values of the option take colours of a
    sequential map in their order: that of numbers by size, else the one given.
    """
    fixed = _FIXED.get(option, {})
    if values and all(value in fixed for value in values):
        return {value: fixed[str(value)] for value in values}
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    distinct = list(dict.fromkeys(values))
    if all(not isinstance(value, str) for value in distinct):
        distinct.sort()
    places = [0.9 * i / max(1, len(distinct) - 1) for i in range(len(distinct))]
    colors = [to_hex(colormaps["viridis"](place)) for place in places]
    found = {
        v: Look(color, marker, line)
        for v, color, marker, line in zip(distinct, colors, cycle(MARKERS), cycle(LINES), strict=False)
    }
    return {**found, **{value: fixed[str(value)] for value in distinct if value in fixed}}


def combined(color: Look, marker: Look, line: Look | None = None) -> Look:
    """The look of a curve that two or three options name: each decides what it is called here."""
    return Look(color.color, marker.marker, (line or marker).line)
