"""What a job is worth to a sweeper that searches."""

from __future__ import annotations

import math

import pytest

from slm_pipeline.config import ObjectiveConfig
from slm_pipeline.errors import UserError
from slm_pipeline.results.number import Number
from slm_pipeline.results.objective import check, value

KNOWN = {"num_layers": True, "pruned/perplexity/bundled": True, "pruned/lm_eval/both": False}


def found(**values: float) -> dict[str, Number]:
    return {key: Number(key, number) for key, number in values.items()}


@pytest.mark.parametrize(
    "metric",
    [None, "num_layers", "pruned/perplexity/bundled", "pruned/lm_eval/both", "pruned/lm_eval/both/acc"],
)
def test_what_will_be_measured_can_be_the_objective(metric):
    check(ObjectiveConfig(metric=metric), KNOWN)


@pytest.mark.parametrize(
    ("options", "known", "message"),
    [
        ({"direction": "down"}, KNOWN, "objective.direction='down' is not one of minimize, maximize"),
        ({"max_layers": 24}, KNOWN, "objective.max_layers=24 is a budget for objective.metric, which is null"),
        (
            {"metric": "pruned/perplexity/bundled", "max_layers": 24},
            {"pruned/perplexity/bundled": True},
            "objective.max_layers needs the merge stage",
        ),
        (
            {"metric": "pruned/perplexity"},
            KNOWN,
            r"objective.metric='pruned/perplexity' is not measured by this job; it measures: \['num_layers',"
            r" 'pruned/perplexity/bundled', 'pruned/lm_eval/both/...'\]",
        ),
        ({"metric": "pruned/perplexity/bundled/more"}, KNOWN, "is not measured by this job"),
        ({"metric": "pruned/lm_eval/bothers/acc"}, KNOWN, "is not measured by this job"),
    ],
)
def test_what_will_not_be_measured_is_refused(options, known, message):
    with pytest.raises(UserError, match=message):
        check(ObjectiveConfig(**options), known)


def test_without_a_metric_there_is_no_value():
    assert value(ObjectiveConfig(), found(num_layers=4)) is None


def test_within_the_budget_the_metric_is_the_value():
    numbers = found(kl=0.5, num_layers=24)
    for direction in ("minimize", "maximize"):
        assert value(ObjectiveConfig("kl", direction, max_layers=24), numbers) == 0.5
        assert value(ObjectiveConfig("kl", direction), found(kl=0.5)) == 0.5


def test_each_layer_over_the_budget_counts_on_the_bad_side():
    numbers = found(kl=0.5, num_layers=26)
    assert value(ObjectiveConfig("kl", "minimize", max_layers=24), numbers) == 2e9
    assert value(ObjectiveConfig("kl", "maximize", max_layers=24), numbers) == -2e9


def test_what_was_not_measured_or_is_not_finite_is_an_error():
    with pytest.raises(UserError, match=r"objective.metric='kl' was not measured; there is: \['num_layers', 'ppl'\]"):
        value(ObjectiveConfig("kl"), found(ppl=1.0, num_layers=4))
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match=f"objective.metric='kl' is {bad}, not a number to compare"):
            value(ObjectiveConfig("kl"), found(kl=bad))


def test_speed_of_another_device_is_no_objective_beside_this_ones():
    def speed(device: str) -> dict[str, Number]:
        return {"speed": Number("speed", 2.0, measured={"device": device})}

    objective = ObjectiveConfig(metric="speed", direction="maximize")
    assert value(objective, speed("H100"), [speed("H100"), {}, found(speed=1.0)]) == 2.0
    with pytest.raises(UserError, match="speed was measured on H100 here and on A100 in another job"):
        value(objective, speed("H100"), [speed("H100"), speed("A100")])


def test_other_jobs_are_not_looked_at_for_a_number_that_holds_on_any_device():
    assert value(ObjectiveConfig(metric="num_layers"), found(num_layers=3.0), map(pytest.fail, ["read"])) == 3.0
