"""Numbers of one key that were measured in different ways."""

from __future__ import annotations

from slm_pipeline.results.number import Number
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
    runs = [speed(prompt=f"Once upon a time, {size}") for size in (40, 80)]
    assert keys(*runs, runs[0]) == [
        ["a[prompt=Once upon a]"],
        ["a[prompt=Once upon a]#2"],
        ["a[prompt=Once upon a]"],
    ]
    assert keys(speed(device="NVIDIA H100 80GB"), speed(device="cpu")) == [["a"], ["a"]]  # see `results.devices`
