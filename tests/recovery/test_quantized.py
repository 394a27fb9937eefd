"""LoRA beside weights of 4 or 8 bits: it is these that it trains beside, and the plain ones that it ends up in."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import random_source
from recovery.conftest import LORA_OPTIONS, run_lora
from recovery.test_lora import naive_loss, rows_of
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from slm_pipeline.errors import UserError
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.recovery.quantized import quantize

NF4 = torch.tensor([  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(weight):
    pieces = weight.reshape(-1, 64)
    scales = pieces.abs().amax(dim=1, keepdim=True)
    nearest = ((pieces / scales)[..., None] - NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * scales).reshape(weight.shape)


def int8(weight):
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scales).round() * scales


def model(hidden=64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=hidden, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=256, bos_token_id=257, eos_token_id=258, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("kind", "naive", "error"), [("nf4", nf4, 1e-4), ("int8", int8, 1e-2)])  # 8-bit inputs too
def test_adapters_train_beside_quantised_weights_and_end_in_the_plain_ones(folder, tmp_path, kind, naive, error):
    validation = rows_of(folder)[1]
    rounded = model()
    plain = {name: weight.clone() for name, weight in rounded.state_dict().items()}
    for name, weight in rounded.named_parameters():
        if name.endswith("proj.weight"):
            weight.data = naive(weight.data)
    result = run_lora(folder, tmp_path, model=model(), quantize=kind)
    assert result.metrics["initial_eval_loss"] == pytest.approx(naive_loss(rounded, validation), abs=error)
    assert abs(naive_loss(rounded, validation) - naive_loss(model(), validation)) > (4e-2 if kind == "nf4" else 1e-3)
    assert result.metrics["eval_loss"] < result.metrics["initial_eval_loss"] - 0.3

    assert type(result.model) is LlamaForCausalLM
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = set()
    for name, weight in result.model.state_dict().items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in adapter:
            changed.add(name)
            low_rank = adapter[f"{path}.lora_B.weight"] @ adapter[f"{path}.lora_A.weight"]
            assert torch.allclose(weight, plain[name] + 16 / 4 * low_rank, atol=1e-6), name
        else:
            assert torch.equal(weight, plain[name]), name
    assert changed == {name for name in plain if name.endswith("proj.weight")}
    assert naive_loss(result.model, validation) == pytest.approx(result.metrics["eval_loss"], abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "fp4"}, "recovery.quantize='fp4' is not one of null, nf4, int8"),
        ({"quantize": "nf4", "num_processes": 2, "sharding": True}, "recovery.sharding=true spreads weights of 16 or"),
        ({"quantize": "int8", "use_dora": True}, "recovery.use_dora=true learns how long the rows of weights are"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Lora(**LORA_OPTIONS, **options)


def test_eight_bits_are_those_of_each_row():
    rounded, plain = model(), model().model.layers[1].mlp.down_proj.weight
    quantize(rounded, "int8", torch.float32)
    found = rounded.model.layers[1].mlp.down_proj.weight
    wanted = int8(plain.detach())
    assert (found.CB * found.SCB[:, None] / 127 - wanted).norm() < 0.5 * (wanted - plain).norm()  # it rounds float16


def test_four_bits_of_narrow_rows_are_refused_on_a_processor():
    with pytest.raises(UserError, match="layers.0.self_attn.q_proj has 96 inputs, no multiple of 64, .* use int8"):
        quantize(model(96), "nf4", torch.float32)


def test_without_bitsandbytes_it_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Lora(**LORA_OPTIONS).check(random_source(), 4)
    with pytest.raises(UserError, match=r"recovery.quantize=nf4 needs bitsandbytes: pip install 'slm-pipeline\[quant"):
        Lora(**LORA_OPTIONS, quantize="nf4").check(random_source(), 4)
