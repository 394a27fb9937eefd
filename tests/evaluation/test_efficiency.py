from __future__ import annotations

import itertools
import time

import pytest

from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.efficiency import efficiency

OPTIONS = {"batch_size": 2, "output_len": 5, "num_runs": 5, "num_warmup": 2, "prompt": "The Leaning Tower"}


def test_numbers_come_from_the_counted_runs(tiny_llama, monkeypatch):
    model, tokenizer = tiny_llama
    lengths = []
    generate = model.generate

    def counted(*args, **kwargs):
        output = generate(*args, **kwargs)
        lengths.append(output.shape)
        return output

    monkeypatch.setattr(model, "generate", counted)
    # runs of 50 s, 50 s (not counted), then 1 s, 2 s and 3 s, a second between them
    clock = itertools.accumulate([0, 50, 1, 50, 1, 1, 1, 2, 1, 3])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    result = efficiency(model, tokenizer, **OPTIONS)
    assert lengths == [(2, len("The Leaning Tower") + 5)] * 5
    assert result["latency_seconds"] == pytest.approx(2.0)
    assert result["latency_seconds_std"] == pytest.approx((2 / 3) ** 0.5)
    assert result["tokens_per_second"] == pytest.approx((10 / 1 + 10 / 2 + 10 / 3) / 3)
    assert result["prompt_len"] == 17
    assert result["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert result["weights_gb"] == pytest.approx(4e-9 * result["num_parameters"])
    assert (result["device"], result["dtype"], result["peak_memory_gb"]) == ("cpu", "float32", None)


def test_an_early_end_of_text_does_not_shorten_a_run(tiny_llama):
    model, tokenizer = tiny_llama
    model.generation_config.eos_token_id = list(range(256))  # every letter ends the text
    assert efficiency(model, tokenizer, **OPTIONS)["output_len"] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_warmup": 5}, "num_warmup=5 must be less than evaluation.efficiency.num_runs=5"),
        ({"prompt": ""}, "prompt of 0 tokens"),
        ({"output_len": 2032}, "output_len=2032 after a prompt of 17 tokens: the model has 2048 positions"),
    ],
)
def test_unusable_settings_are_user_errors(tiny_llama, settings, message):
    model, tokenizer = tiny_llama
    with pytest.raises(UserError, match=message):
        efficiency(model, tokenizer, **{**OPTIONS, **settings})
