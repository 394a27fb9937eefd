"""Every method has a look of its own, everywhere the same."""

from __future__ import annotations

import itertools

from matplotlib.colors import to_rgb

from slm_pipeline.show.looks import METHODS, RECOVERIES, Look, combined, looks_of

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"}


def test_no_two_methods_and_no_two_recoveries_look_alike():
    for looks in (METHODS, RECOVERIES):
        assert len({(look.color, look.marker) for look in looks.values()}) == len(looks)
        assert {look.color for look in looks.values()} <= OKABE_ITO


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
    assert list(looks_of("calibration", ["c4", "bundled"])) == ["c4", "bundled"]


def test_two_options_share_out_colour_and_marker():
    assert combined(METHODS["slm"], RECOVERIES["distill"]) == Look("#0072B2", "^", "-.")
