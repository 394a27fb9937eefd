"""Numbers of one key that were measured in different ways."""

from __future__ import annotations

import pytest
from studies import finished

from slm_pipeline.results.number import Number, by_key
from slm_pipeline.results.of_run import numbers_of, of_pruning
from slm_pipeline.results.settings import told_apart


def perplexity(value: float, **settings: object) -> dict[str, Number]:
    measured = {"measure": "perplexity", "part": "bundled", "how": "in words", "window": 2048, "bos": False}
    return {"pruned/perplexity": Number("pruned/perplexity", value, measured={**measured, **settings})}


def keys(*runs: dict[str, Number]) -> list[list[str]]:
    found, _ = told_apart(runs)
    assert all(name == number.key for run in found for name, number in run.items())
    return [list(run) for run in found]


def test_what_follows_from_the_text_and_the_tokenizer_is_no_setting():
    runs = [perplexity(1.0, num_tokens=8184, batch_size=4), {}, perplexity(2.0, num_tokens=9000, batch_size=8, how="x")]
    assert keys(*runs) == [["pruned/perplexity"], [], ["pruned/perplexity"]]
    assert told_apart(runs)[1] == {}


def test_settings_that_differ_and_these_alone_are_in_the_key():
    runs = [perplexity(1.0), perplexity(2.0, window=1024), perplexity(3.0, bos=True, stride=None)]
    found, before = told_apart(runs)
    # a setting that an earlier version did not write down is as good as null
    names = [f"pruned/perplexity[{name}]" for name in ("window=2048,bos=false", "window=1024,bos=false")]
    names.append("pruned/perplexity[window=2048,bos=true]")
    assert [list(run) for run in found] == [[name] for name in names]
    assert before == dict.fromkeys(names, "pruned/perplexity")


def test_the_batch_size_is_a_setting_of_speed_and_a_long_value_is_cut():
    def speed(**settings: object) -> dict[str, Number]:
        return {"a": Number("a", 1.0, "tokens/s", measured={"measure": "efficiency", **settings})}

    assert keys(speed(batch_size=1, num_runs=3), speed(batch_size=8, num_runs=4)) == [
        ["a[batch_size=1]"],
        ["a[batch_size=8]"],
    ]
    # whatever belongs to a device is a speed, such as one that is predicted by the times of single blocks
    predicted = [
        {"latency": {"device": "cpu", "mode": "eager", "context": 128, "batch_size": size, "predicted": 1.5}}
        for size in (1, 64)
    ]
    assert [list(run)[-1] for run in told_apart([by_key(of_pruning(one)) for one in predicted])[0]] == [
        "predicted_speedup[batch_size=1]",
        "predicted_speedup[batch_size=64]",
    ]
    runs = [speed(prompt=f"Once upon a time, {size}") for size in (40, 80)]
    assert keys(*runs, runs[0]) == [
        ["a[prompt=Once upon a]"],
        ["a[prompt=Once upon a]#2"],
        ["a[prompt=Once upon a]"],
    ]
    assert keys(speed(device="NVIDIA H100 80GB"), speed(device="cpu")) == [["a"], ["a"]]  # see `results.devices`


@pytest.mark.parametrize("limit", [20, None])
def test_an_average_of_before_its_limit_was_written_down_has_that_of_its_tasks(tmp_path, limit):
    def run(task_limit: int | None, **said: object) -> dict[str, Number]:
        numbers = [
            Number(f"dense/{task}", 50.0, "%", 4.0, True, {"measure": "zero_shot", "part": task, "limit": task_limit})
            for task in ("boolq", "piqa")
        ]
        measured = {"measure": "zero_shot", "tasks": ["boolq", "piqa"], **said}
        numbers.append(Number("dense/average", 50.0, "%", 3.0, True, measured))
        return numbers_of({"numbers": {number.key: number.to_json() for number in numbers}})

    before, now, other = run(limit), run(limit, limit=limit), run(100, limit=100)
    assert list(told_apart([before, now])[0][0]) == ["dense/boolq", "dense/piqa", "dense/average"]
    names = {key for found in told_apart([before, now, other])[0] for key in found if "average" in key}
    assert names == {f"dense/average[limit={limit or 'null'}]", "dense/average[limit=100]"}
    # and of before numbers had keys
    summary = finished(tmp_path, 24, 20.0)
    assert numbers_of(summary)["pruned/average"].measured["limit"] == 20


def test_how_far_a_search_ended_from_the_dense_model_is_a_number():
    found = by_key(of_pruning({"held_out": {"kl": 0.3, "same_top_1": 0.7}}))["merge/kl_held_out"]
    assert (found.value, found.unit, found.higher_is_better) == (0.3, "nats", False)
