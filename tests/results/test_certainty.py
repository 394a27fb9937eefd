"""How sure a number is, by hand-computed intervals."""

from __future__ import annotations

import math

import pytest

from slm_pipeline.results.certainty import bounds, cautions, chance, is_chance, within_noise
from slm_pipeline.results.number import Number, by_key, wilson


def score(key: str, value: float, stderr: float | None = None, **measured: object) -> Number:
    return Number(key, value, "%", stderr, True, measured)


def test_wilsons_interval_of_none_of_twenty_ends_where_one_would_no_longer_be_strange():
    assert wilson(0.0, 20, 1.0) == (0.0, pytest.approx(100 / 21))
    low, high = wilson(0.0, 20, 1.96)
    assert (low, high) == (0.0, pytest.approx(100 * 3.8416 / 23.8416))
    assert wilson(100.0, 20, 1.96) == (pytest.approx(100 - high), 100.0)
    assert wilson(50.0, 10**6, 1.0) == (pytest.approx(49.95, abs=1e-4), pytest.approx(50.05, abs=1e-4))


@pytest.mark.parametrize(
    ("number", "spread"),
    [
        (score("a", 0.0, 0.0, num_examples=20), "(0.0-4.8)"),
        (score("a", 100.0, 0.0, num_examples=20), "(95.2-100.0)"),
        (score("a", 20.0, 9.2, num_examples=20), "(12.6-30.3)"),  # 4 right
        (score("a", 25.0, 9.9, num_examples=20), "+-9.9"),  # 5 right
        (score("a", 0.0, 0.0), "+-0.0"),  # of nobody knows how many
        (score("a", 0.0, num_examples=1), ""),
    ],
)
def test_near_none_and_all_an_interval_stands_for_the_standard_error(number, spread):
    assert number.spread == spread
    assert str(number) == f"{number.value:.1f} {spread}".strip()


def test_chance_is_known_for_the_tasks_their_average_and_whatever_says_so():
    assert chance(score("a", 1.0, measure="zero_shot", part="boolq")) == 50
    assert chance(score("a", 1.0, measure="zero_shot", part="arc_easy")) == 25
    assert chance(score("a", 1.0, measure="zero_shot", tasks=["boolq", "hellaswag", "arc_easy"])) == 100 / 3
    assert chance(score("a", 1.0, measure="mine", chance=12.5)) == 12.5
    assert chance(score("a", 1.0, measure="mine", part="boolq")) is None
    assert chance(score("a", 1.0, measure="zero_shot", part="own")) is None


def test_two_numbers_differ_where_their_difference_is_over_two_errors_of_it():
    def numbers(difference: float) -> tuple[Number, Number]:
        return Number("a", 10.0, "nats", 0.3), Number("a", 10.0 + difference, "nats", 0.4)  # together 0.5

    assert within_noise(*numbers(0.979))
    assert not within_noise(*numbers(0.981))
    assert within_noise(*reversed(numbers(-0.979)))
    assert not within_noise(*reversed(numbers(-0.981)))
    assert within_noise(numbers(0)[0], Number("a", 10.0, "nats")) is None


def test_none_of_twenty_differs_from_six_and_not_from_three():

    def of_twenty(right: int) -> Number:
        share = right / 20
        return score("a", 100 * share, 100 * math.sqrt(share * (1 - share) / 19), num_examples=20)

    assert [within_noise(of_twenty(0), of_twenty(right)) for right in (1, 3, 6)] == [True, True, False]
    assert bounds(of_twenty(0)) == (0.0, pytest.approx(16.11, abs=0.01))


def test_a_score_is_guessing_unless_it_is_surely_above():
    found = [score("a", value, 4.0, measure="zero_shot", part="boolq") for value in (45.0, 57.8, 57.9)]
    assert [is_chance(number) for number in found] == [True, True, False]
    assert not is_chance(score("a", 20.0, 4.0))


def test_scores_that_rise_while_perplexity_does_are_called_out():
    """The first table that somebody saw: pruning seemed to help."""
    tasks = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    numbers = by_key(
        [
            score("dense/average", 40.7, 3.9, measure="zero_shot", tasks=tasks),
            score("pruned/average", 44.3, 3.9, measure="zero_shot", tasks=tasks),
            Number("dense/perplexity/bundled", 23.21, "perplexity"),
            Number("pruned/perplexity/bundled", 10300.0, "perplexity"),
        ]
    )
    assert cautions(numbers) == [
        "average of dense: within noise no better than guessing, 35.7",  # 250 / 7
        "pruned: average 44.3 is above the dense model's 40.7 within noise, but perplexity/bundled rose from 23.21 to"
        " 1.03e+04: average does not see the damage",
    ]
    del numbers["dense/perplexity/bundled"]
    assert len(cautions(numbers)) == 1
