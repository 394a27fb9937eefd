from __future__ import annotations

import itertools
import time

import pytest
import torch

from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.efficiency import Efficiency, Setting, check_machine, efficiency

OPTIONS = {"mode": "eager", "num_runs": 5, "num_warmup": 2, "prompt": "The Leaning Tower"}
TWO_BY_FIVE = Setting(2, None, 5)
CHECKPOINT_BYTES = 4  # of a float32 parameter


def clock_of(monkeypatch, *seconds):
    """What is timed takes these seconds, one after the other, with one second between."""
    moments = itertools.accumulate(itertools.chain.from_iterable((1, took) for took in seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))


def test_numbers_are_medians_of_the_counted_runs(tiny_llama, monkeypatch):
    model, tokenizer = tiny_llama
    # prompt and whole in turn, in every other round whole first: two rounds of 50 s to warm up, then three that count
    monkeypatch.setattr("slm_pipeline.evaluation.efficiency.machine", lambda _: {"cpu": "Some CPU", "number": 4})
    clock_of(monkeypatch, 50, 50, 50, 50, 1, 3, 8, 2, 1, 5)
    found = efficiency(model, tokenizer, TWO_BY_FIVE, **OPTIONS)
    assert found["runs"]["own"]["latency_seconds"] == [3, 8, 5]
    assert found["runs"]["own"]["prompt_seconds"] == [1, 2, 1]
    assert found["latency_seconds"] == 5
    assert found["spread"]["latency_seconds"]["q1"] == 4
    assert found["spread"]["latency_seconds"]["q3"] == 6.5
    assert found["spread"]["latency_seconds"]["mean"] == pytest.approx(16 / 3)
    assert found["latency_seconds_std"] == pytest.approx((38 / 9) ** 0.5)
    assert found["tokens_per_second"] == pytest.approx(10 / 5)
    assert found["prompt_seconds"] == 1
    assert found["token_seconds"] == pytest.approx((5 - 1) / 4)  # of 0.5, 1.5 and 1: the first comes with the prompt
    assert "speedup" not in found
    assert found["prompt_len"] == 17
    assert found["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert found["weights_gb"] == pytest.approx(1e-9 * CHECKPOINT_BYTES * found["num_parameters"])
    assert found["cache_bytes_per_token"] == 6 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their width, bytes
    assert (found["device"], found["dtype"], found["peak_memory_gb"]) == ("4 x Some CPU", "float32", None)


def test_the_dense_model_takes_turns_and_ratios_are_those_of_rounds(tiny_llama, monkeypatch):
    model, tokenizer = tiny_llama
    other = type(model)(model.config)
    # own prompt, own whole, dense prompt, dense whole, and in every other round the other way round
    rounds = [(1, 3, 2, 6), (12, 3, 8, 2), (1, 2, 3, 8)]
    clock_of(monkeypatch, *itertools.chain.from_iterable(rounds))
    found = efficiency(
        model, tokenizer, TWO_BY_FIVE, **{**OPTIONS, "num_runs": 3, "num_warmup": 0}, dense=lambda: other
    )
    assert found["runs"]["own"]["latency_seconds"] == [3, 8, 2]
    assert found["runs"]["dense"]["latency_seconds"] == [6, 12, 8]
    assert found["speedup"] == 2  # of 2, 1.5 and 4; the medians' ratio would be 8 / 3
    assert found["prompt_speedup"] == 2  # of 2, 1.5 and 3
    assert found["token_speedup"] == 2  # of 4/2, 9/6 and 5/1
    measure = Efficiency(enabled=True)
    numbers = {number.key: number for number in measure.numbers("", found)}
    assert [*numbers] == [name for name in measure.names("") if name != "peak_memory_gb"]
    assert numbers["speedup"].stderr == pytest.approx(1.2533 * (3 - 1.75) / 1.349 / 3**0.5)
    assert numbers["speedup"].higher_is_better
    assert numbers["speedup"].measured["device"] == found["device"]
    assert "device" not in numbers["weights_gb"].measured  # the same on any


def test_the_dense_model_itself_has_no_ratio(tiny_llama):
    model, tokenizer = tiny_llama
    assert efficiency(model, tokenizer, TWO_BY_FIVE, **OPTIONS, dense=lambda: model)["runs"].keys() == {"own"}


def test_an_early_end_of_text_does_not_shorten_a_run(tiny_llama):
    model, tokenizer = tiny_llama
    model.generation_config.eos_token_id = list(range(256))  # every letter ends the text
    assert efficiency(model, tokenizer, TWO_BY_FIVE, **OPTIONS)["output_len"] == 5


def test_a_prompt_that_is_only_read_generates_nothing(tiny_llama, monkeypatch):
    model, tokenizer = tiny_llama
    monkeypatch.setattr(model, "generate", None)
    found = efficiency(model, tokenizer, Setting.of("3x20+0"), **OPTIONS)
    assert [*found["spread"]] == ["prompt_seconds"]
    numbers = Efficiency(enabled=True, grid=["3x20+0"]).numbers("3x20+0", found)
    assert [number.key for number in numbers] == ["prompt_seconds"]


def test_random_prompts_are_those_of_the_setting(tiny_llama, monkeypatch):
    model, tokenizer = tiny_llama
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: seen.append(k["input_ids"]) or forward(*a, **k))
    efficiency(model, tokenizer, Setting.of("3x20+0"), **{**OPTIONS, "num_runs": 1, "num_warmup": 0})
    assert seen[0].shape == (3, 20)
    assert all(torch.equal(ids, seen[0]) for ids in seen if ids.shape == (3, 20))
    assert len({tuple(row) for row in seen[0].tolist()}) == 3


@pytest.mark.parametrize(
    ("text", "setting"),
    [("8x512", Setting(8, None, 512)), ("64x64+128", Setting(64, 64, 128)), ("1x2048+0", Setting(1, 2048, 0))],
)
def test_settings_of_a_grid(text, setting):
    assert Setting.of(text) == setting


@pytest.mark.parametrize("text", ["8", "x8", "8x", "0x8", "8x0", "1x0+4", "8 x 8", "8x8+", "99999x8"])
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(UserError, match=r"evaluation.efficiency.grid has"):
        Efficiency(enabled=True, grid=[text])


@pytest.mark.parametrize(
    ("setting", "settings", "message"),
    [
        (TWO_BY_FIVE, {"num_warmup": 5}, "num_warmup=5 must be less than evaluation.efficiency.num_runs=5"),
        (TWO_BY_FIVE, {"prompt": ""}, "prompt of 0 tokens"),
        (Setting(2, None, 2032), {}, "output_len=2032 after a prompt of 17 tokens: the model has 2048 positions"),
        (Setting(1, 2000, 49), {}, "49 after a prompt of 2000 tokens: the model has 2048 positions"),
    ],
)
def test_unusable_settings_are_user_errors(tiny_llama, setting, settings, message):
    model, tokenizer = tiny_llama
    with pytest.raises(UserError, match=message):
        efficiency(model, tokenizer, setting, **{**OPTIONS, **settings})


def test_a_machine_without_a_compiler_says_so_before_anything_is_timed(monkeypatch):
    monkeypatch.setenv("CXX", "none-such")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UserError, match=r"a\.mode=compile: torch.compile needs a C\+\+ compiler, .* \(none-such, g\+\+"
    ):
        check_machine("a.mode", "compile", "cpu")
    check_machine("a.mode", "eager", "cpu")
