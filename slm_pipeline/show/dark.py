"""A picture for a page that is light or dark as the reader's system is: SVG that brings the colours for both."""

from __future__ import annotations

import colorsys
import re

from slm_pipeline.show.looks import BROWN, INDIGO

PAPER = "#17181a"  # of a dark page
_TWINS = {BROWN: "#e69f00", INDIGO: "#56b4e9"}  # Okabe and Ito's own
_CONTRAST = 3.0  # to 1, what WCAG 2.1 asks of graphics (1.4.11)


def with_dark_colors(svg: str) -> str:
    """The SVG that matplotlib wrote, with a style for ``prefers-color-scheme: dark``.

    Its paper becomes the page's, its greys are turned round, and a colour that is too dark becomes lighter.
    """
    colors = sorted({found.lower() for found in re.findall(r'(?:fill|stroke)(?:: |=")(#[0-9a-fA-F]{6})\b', svg)})
    rules = ["svg { fill: " + dark("#000000") + " }"]  # text has no colour of its own
    for color in colors:
        for kind in ("fill", "stroke"):
            named = f'[style*="{kind}: {color}" i], [{kind}="{color}" i]'  # the latter in hatches
            rules.append(f"{named} {{ {kind}: {dark(color)} !important }}")
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    head, tag, rest = svg.partition("<defs>")
    return f"{head}{style}{tag}{rest}"


def dark(color: str) -> str:
    """What stands for a colour, ``#rrggbb``, on dark paper."""
    if twin := {light.lower(): twin for light, twin in _TWINS.items()}.get(color.lower()):
        return twin
    red, green, blue = _parts(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if saturation < 0.1:  # from white, the paper, to black, which is the ink
        paper, ink = _parts(PAPER)[0], 0.9
        return _hex(*[paper + (ink - paper) * (1 - lightness)] * 3) if lightness < 1 else PAPER
    found = color.lower()
    while contrast(found, PAPER) < _CONTRAST and lightness < 1:
        lightness += 0.01
        found = _hex(*colorsys.hls_to_rgb(hue, min(lightness, 1.0), saturation))
    return found


def contrast(one: str, other: str) -> float:
    """Of two colours, 1 to 21, as WCAG 2.1 defines it."""
    low, high = sorted(_luminance(color) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in _parts(color)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _parts(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _hex(*parts: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)
