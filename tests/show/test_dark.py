"""The colours that a picture has on a dark page, in the SVG and as a browser shows them."""

from __future__ import annotations

import re

import pytest
from browser import Browser
from matplotlib.patches import Rectangle

from slm_pipeline.show.canvas import new_figure, save
from slm_pipeline.show.dark import PAPER, contrast, dark, with_dark_colors
from slm_pipeline.show.looks import INDIGO


@pytest.fixture
def svg(tmp_path):
    """A line, text, and a hatched box, with every colour that matplotlib writes."""
    with new_figure(2.0, 2.0) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=INDIGO)
        axes.set_xlabel("grey", color="#555555")
        axes.add_patch(Rectangle((0, 0), 0.5, 0.5, fc="white", ec="#B0B0B0", hatch="///"))
        *_, path = save(figure, tmp_path / "plot")
    return path


def test_every_colour_of_the_file_has_one_on_dark_paper(svg):
    text = svg.read_text()
    colors = {color.lower() for color in re.findall(r"#[0-9a-fA-F]{6}\b", text)}
    assert colors == {"#ffffff", "#000000", "#555555", "#b0b0b0", INDIGO.lower()}
    style = re.search(r"<style>@media \(prefers-color-scheme: dark\)(.*?)</style>", with_dark_colors(text))
    assert style is not None
    assert set(re.findall(r'style\*="fill: (#\w+)"', style[1])) == colors
    assert with_dark_colors(text).replace(style[0], "") == text  # on white it stays what it was


def test_twins_by_hand():
    assert (dark("#FFFFFF"), dark(INDIGO)) == (PAPER, "#56b4e9")
    assert dark("#d55e00") == "#d55e00"  # light enough
    assert contrast(dark("#000000"), PAPER) > 12
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.01)  # as every table of WCAG has it


@pytest.mark.browser
def test_a_browser_in_dark_mode_shows_them(svg, tmp_path):
    page = tmp_path / "page.svg"
    page.write_text(with_dark_colors(svg.read_text()))
    with Browser(400, 400, dark=True) as browser:
        browser.open(page)
        fill = "return getComputedStyle(document.querySelector('#patch_1 path')).fill"
        assert browser.run(fill) == "rgb(23, 24, 26)"
        assert browser.run("return getComputedStyle(document.querySelector('pattern rect')).fill") == "rgb(23, 24, 26)"
        line = "return [...document.querySelectorAll('path')].map(path => getComputedStyle(path).stroke)"
        assert "rgb(86, 180, 233)" in browser.run(line)
