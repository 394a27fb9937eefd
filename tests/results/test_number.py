"""A number: its key, how people read it, and what summary.json keeps of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_pipeline.config import TARGETS
from slm_pipeline.results.number import Number, by_key, change, parted

NAMES = st.text(st.characters(exclude_characters="/"), min_size=1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.builds(
    Number,
    key=st.lists(NAMES, min_size=1, max_size=3).map("/".join),
    value=FINITE,
    unit=st.sampled_from(["%", "perplexity", "seconds", "GB", "layers", "parameters", "tokens", "nats/token", ""]),
    stderr=st.none() | FINITE.map(abs),
    higher_is_better=st.none() | st.booleans(),
    measured=st.dictionaries(NAMES, st.none() | st.booleans() | st.integers() | st.text()),
    detail=st.booleans(),
    cost=st.booleans(),
)


@given(NUMBERS)
def test_what_is_written_is_read_back(number):
    said = json.loads(json.dumps(number.to_json()))
    assert Number.from_json(number.key, said) == number


@given(NUMBERS)
def test_every_number_can_be_shown(number):
    shown = str(number)
    assert shown.isprintable()
    assert ("+-" in shown or "(" in shown) == (number.stderr is not None)
    float(number.shown(number.value).rstrip("MB"))


def test_json_has_no_flags_that_are_not_set_and_more_keys_of_a_later_version_are_left_out():
    number = Number("pruned/piqa", 61.5, "%", 1.5, True, {"measure": "zero_shot"})
    said = {"value": 61.5, "unit": "%", "stderr": 1.5, "higher_is_better": True, "measured": {"measure": "zero_shot"}}
    assert number.to_json() == said
    assert Number("a", 1, detail=True).to_json()["detail"] is True
    assert Number("a", 1, cost=True).to_json()["cost"] is True
    assert Number.from_json("pruned/piqa", {**said, "from_the_future": 1}) == number
    assert Number.from_json("a", {"value": 1.0}) == Number("a", 1.0)


@given(st.sampled_from(TARGETS), st.lists(NAMES, min_size=1, max_size=3).map("/".join))
def test_a_key_is_a_model_and_a_quantity(target, quantity):
    number = Number(quantity, 1.0).below(target)
    assert parted(number.key) == (number.target, number.quantity) == (target, quantity)


@pytest.mark.parametrize("key", ["num_layers", "recovery/num_tokens", "dense", "dense/", "denser/piqa", ""])
def test_a_key_of_no_one_model(key):
    assert parted(key) == ("", key)


def test_a_longer_key_leaves_out_what_is_empty():
    assert Number("", 1.0).below("pruned", "perplexity/bundled").key == "pruned/perplexity/bundled"
    assert Number("kl", 1.0).below("pruned", "", "fidelity").key == "pruned/fidelity/kl"
    assert Number("", 1.0).below("").key == ""


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (Number("a", 61.25, "%", 1.04), "61.2 +-1.0"),
        (Number("a", 15.236, "perplexity"), "15.24"),
        (Number("a", 9999.994, "perplexity"), "9999.99"),
        (Number("a", 123456.0, "perplexity"), "1.23e+05"),
        (Number("a", 15.236, "perplexity", 0.0123), "15.24 +-0.012"),
        (Number("a", 15.236, "perplexity", 0.123), "15.24 +-0.12"),
        (Number("a", 15.236, "perplexity", 0.0), "15.24 +-0.00"),
        (Number("a", 99.94, "seconds", cost=True), "99.9"),
        (Number("a", 1234.5, "seconds", cost=True), "1234"),
        (Number("a", 0.01234, "seconds"), "0.0123"),
        (Number("a", 24, "layers"), "24"),
        (Number("a", 23.5, "layers"), "23.5"),
        (Number("a", 134_515_008, "parameters"), "134.5M"),
        (Number("a", 999_999, "parameters"), "999999"),
        (Number("a", 6_738_415_616, "parameters"), "6.74B"),
        (Number("a", 1_500_000.4, "tokens"), "1.5M"),
        (Number("a", 0.012345, "nats/token", 0.00012345), "0.0123 +-0.000123"),
        (Number("a", 1234.4, "tokens/s"), "1234"),
        (Number("a", -1234.4), "-1234"),
    ],
)
def test_numbers_as_people_read_them(number, shown):
    assert str(number) == shown


def test_which_values_are_better():
    assert [Number("a", 1, higher_is_better=better).direction for better in (True, False, None)] == [
        "higher", "lower", "",
    ]  # fmt: skip
    assert Number("a", 1, "%", higher_is_better=True).is_score
    assert not Number("a", 1, "%", higher_is_better=False).is_score
    assert not Number("a", 1, "GB", higher_is_better=True).is_score
    assert [unit for unit in ("layers", "parameters", "tokens", "GB", "%") if Number("a", 1, unit).is_count] == [
        "layers", "parameters", "tokens",
    ]  # fmt: skip


def test_numbers_by_their_keys_keep_their_order_and_no_two_have_one():
    numbers = [Number(key, 1.0) for key in ("b", "a", "c")]
    assert list(by_key(numbers).items()) == [("b", numbers[0]), ("a", numbers[1]), ("c", numbers[2])]
    with pytest.raises(ValueError, match="two numbers are called a$"):
        by_key([*numbers, Number("a", 2.0)])


def test_a_change_in_percent():
    assert change({"dense": 30, "pruned": 24}) == "-20.0%"
    assert change({"dense": 30, "pruned": 30}) == "+0.0%"
