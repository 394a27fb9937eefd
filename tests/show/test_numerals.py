"""Numbers and times for people."""

from __future__ import annotations

import pytest

from slm_pipeline.show.numerals import count, counts, duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (172799, "48.0 h"),
        (172800, "2.0 days"),
    ],
)  # fmt: skip
def test_a_stretch_of_time(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"), [(999_999, "999999"), (1_000_000, "1.0M"), (134_515_008, "134.5M"), (6_738_415_616, "6.74B")]
)
def test_a_count(number, shown):
    assert count(number) == shown


def test_counts_that_would_look_alike_are_said_in_full():
    assert counts(102_662_784, 90_000) == ("102.7M", "90000")
    assert counts(102_662_784, 102_662_783) == ("102662784", "102662783")
    assert counts(5_000_000, 5_000_000) == ("5.0M", "5.0M")
