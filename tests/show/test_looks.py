"""Every method has a look of its own, everywhere the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from slm_pipeline.show.dark import PAPER, contrast, dark
from slm_pipeline.show.looks import BLACK, CATEGORIES, METHODS, RECOVERIES, Look, combined, looks_of, told_apart, unused

# Linear RGB as seen with full protanopia, deuteranopia and tritanopia (Machado et al., IEEE TVCG 15, 2009).
SEEN = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(color: str, eyes: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as these eyes see it."""
    parts = np.array(to_rgb(color))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SEEN[eyes]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ seen / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
@pytest.mark.parametrize("on", ["white", "dark"])
def test_categories_can_be_told_apart_by_everybody_on_white_and_on_dark(eyes, on):
    colors = [color if on == "white" else dark(color) for color in CATEGORIES]
    distances = [np.linalg.norm(lab(a, eyes) - lab(b, eyes)) for a, b in itertools.combinations(colors, 2)]
    assert min(distances) > 16  # Okabe and Ito's own eight come to 16


def test_every_look_has_a_contrast_of_three_to_one_on_white_and_on_dark():
    numbers = looks_of("threshold.value", [i / 10 for i in range(10)])
    for look in [*METHODS.values(), *RECOVERIES.values(), *numbers.values()]:
        assert contrast(look.color, "#ffffff") >= 3
        assert contrast(dark(look.color), PAPER) >= 3
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert dark("#ffffff") == PAPER
    assert contrast(dark("#D9D9D9"), PAPER) < contrast(dark("#555555"), PAPER) < contrast(dark("#000000"), PAPER)


def test_no_two_methods_and_no_two_recoveries_look_alike():
    for looks in (METHODS, RECOVERIES):
        assert len({(look.color, look.marker) for look in looks.values()}) == len(looks)
        assert {look.color for look in looks.values()} <= {*CATEGORIES, BLACK, "#8C8C8C"}


def test_the_methods_of_the_readme_have_one():
    assert set(METHODS) >= {
        "slm", "come", "come_posterior", "laco", "mka", "shortgpt", "angular", "streamline", "replaceme", "sleb",
        "finercut", "shortened_ppl", "shortened_taylor", "shortened_magnitude", "reverse", "from_plan", "none",
    }  # fmt: skip
    assert set(RECOVERIES) == {"lora", "partial_layers", "full", "distill", "block_mse", "none"}


def test_a_method_looks_the_same_whatever_stands_beside_it():
    assert looks_of("method", ["slm", "laco"])["slm"] == looks_of("method", ["come", "slm"])["slm"] == METHODS["slm"]
    assert looks_of("method", ["slm", "mine"])["slm"] == METHODS["slm"]  # "mine" has none of its own


def test_other_values_take_a_sequential_map_in_their_order():
    looks = looks_of("threshold.value", [0.9, 0.5, 0.7])
    assert list(looks) == [0.5, 0.7, 0.9]
    brightness = [sum(to_rgb(look.color)) for look in looks.values()]
    assert all(a < b for a, b in itertools.pairwise(brightness))
    assert len({look.marker for look in looks.values()}) == 3


def test_names_without_a_look_are_categories_and_no_two_are_alike():
    names = [f"corpus_{i}" for i in range(48)]
    looks = list(looks_of("calibration", names).values())
    assert [look.color for look in looks[:6]] == list(CATEGORIES)
    assert len({look.marker for look in looks[:6]}) == 6  # of use where another option has the colour
    assert len({(look.color, look.marker) for look in looks}) == 48
    assert list(looks_of("calibration", ["c4", "bundled"])) == ["c4", "bundled"]
    mine = looks_of("method", [*METHODS, "mine", "yours"])
    assert len({(look.color, look.marker) for look in mine.values()}) == len(METHODS) + 2
    assert next(unused([])) == Look(CATEGORIES[0], "o", "-")


def test_looks_that_are_alike_keep_their_colour_alone():
    same = [METHODS["slm"]] * 3 + [METHODS["laco"]]
    found = told_apart(same)
    assert (found[0], found[3]) == (METHODS["slm"], METHODS["laco"])
    assert len(set(found)) == 4
    assert {look.color for look in found[:3]} == {METHODS["slm"].color}


def test_points_that_stand_alone_differ_in_colour_or_marker_as_far_as_there_are_markers():
    alike = [Look("#0072B2", "o", line) for line in ("-", "--", "-.")]
    assert told_apart(alike) == alike
    assert [look.marker for look in told_apart(alike, markers=True)] == ["o", "s", "D"]
    many = told_apart([Look("#0072B2", "o", "-")] * 12, markers=True)
    assert len({look.marker for look in many}) == 8
    assert len(set(many)) == 12


def test_two_options_share_out_colour_and_marker():
    assert combined(METHODS["slm"], RECOVERIES["distill"]) == Look("#0072B2", "^", "-.")
