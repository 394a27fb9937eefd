"""LoRA recovery on a tiny Llama: what trains and what comes back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import random_source
from peft import PeftModel, get_peft_model
from recovery.conftest import LORA_OPTIONS, WHOLE, run_lora
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from slm_pipeline.data import tokens
from slm_pipeline.errors import UserError
from slm_pipeline.recovery.lora import Lora, merge_adapter
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer


def naive_loss(model, rows):
    """Mean negative log-likelihood of the labelled tokens, one example at a time, without padding."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                losses.append(-logits[position].log_softmax(-1)[label].item())
    return sum(losses) / len(losses)


def rows_of(folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return Lora(**{**LORA_OPTIONS, **changes}).tokenized_split(tokenizer, folder)


def test_losses_are_those_of_the_models(folder, undisturbed):
    result, logged = undisturbed
    _, validation = rows_of(folder)
    assert type(result.model) is LlamaForCausalLM
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert result.metrics["initial_eval_loss"] == pytest.approx(naive_loss(before, validation), abs=1e-5)
    assert result.metrics["eval_loss"] == pytest.approx(naive_loss(result.model, validation), abs=1e-5)
    assert result.metrics["eval_loss"] < result.metrics["initial_eval_loss"] - 0.3
    evaluated = {row["step"]: row["eval_loss"] for row in result.curve if "eval_loss" in row}
    assert list(evaluated) == [0, 3, 6, 9, 10]
    best = min(list(evaluated)[1:], key=lambda step: evaluated[step])
    assert best == 6  # neither the last step nor a multiple of save_steps
    assert (result.metrics["best_step"], result.metrics["eval_loss"]) == (best, evaluated[best])
    assert [(step, metrics) for step, metrics in logged if "eval_loss" in metrics] == [
        (step, {"eval_loss": loss}) for step, loss in evaluated.items()
    ]


def test_metrics_count_what_was_trained_on(folder, undisturbed):
    metrics = undisturbed[0].metrics
    train, _ = rows_of(folder)
    # 20 examples in batches of 4: ten steps are exactly two epochs
    assert (metrics["num_steps"], metrics["num_examples"], metrics["num_validation_examples"]) == (10, 20, 6)
    assert metrics["num_tokens"] == 2 * sum(len(row["input_ids"]) for row in train)
    assert metrics["num_label_tokens"] == 2 * sum(label != -100 for row in train for label in row["labels"])
    # rank x (inputs + outputs) of q, k, v, o, gate, up, down, in 4 layers
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert metrics["trainable_parameters"] == 4 * 4 * sum(inputs + outputs for inputs, outputs in shapes)


def test_the_learning_rate_warms_up_and_decays_to_zero(undisturbed):
    rates = {row["step"]: row["learning_rate"] for row in undisturbed[0].curve if "loss" in row}
    # logged every 3 steps and with every save; a step uses the rate of the steps done before it
    assert rates == pytest.approx({step: 1e-2 * (10 - (step - 1)) / 8 for step in (3, 4, 6, 8, 9, 10)})


def test_train_loss_is_the_mean_over_steps(undisturbed):
    logged = [row for row in undisturbed[0].curve if "loss" in row]
    assert [row["step"] for row in logged] == [3, 4, 6, 8, 9, 10]
    weights = [3, 1, 2, 2, 1, 1]
    expected = sum(weight * row["loss"] for weight, row in zip(weights, logged, strict=True)) / 10
    assert undisturbed[0].metrics["train_loss"] == pytest.approx(expected)


def test_only_adapters_get_gradients(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = get_peft_model(model, Lora(**LORA_OPTIONS)._peft_config([]))
    ids = torch.arange(10)[None]
    adapted(ids, labels=ids).loss.backward()
    touched = {name.split(".")[-2] for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert touched == {"default"}
    assert all(".lora_" in name for name, weight in adapted.named_parameters() if weight.requires_grad)
    assert not [name for name, weight in adapted.named_parameters() if "lm_head" in name and weight.requires_grad]


def test_merged_equals_adapter_on(folder, undisturbed):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(folder / "undisturbed" / "adapter")).eval()
        assert adapted.peft_config["default"].base_model_name_or_path == str(folder / "model")
        with_adapter = adapted(ids).logits
        merged = undisturbed[0].model(ids).logits
    assert (merged - with_adapter).abs().max() < 1e-4
    assert (merged - plain).abs().max() > 0.1
    assert not [name for name, _ in undisturbed[0].model.named_modules() if "lora" in name]
    assert all(weight.requires_grad for weight in undisturbed[0].model.parameters())
    assert undisturbed[0].model.config.use_cache


def test_merging_rounds_once(folder):
    """bfloat16 weight + float32 product, rounded once: not the sum of two rounded ones."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    base = {name: weight.clone() for name, weight in model.named_parameters()}
    adapted = get_peft_model(model, Lora(**LORA_OPTIONS)._peft_config([]))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    delta = (16 / 4) * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    assert delta.dtype == torch.float32
    merged = merge_adapter(adapted)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = dict(merged.named_parameters())
    assert torch.equal(weights[name], (base[name].float() + delta).bfloat16())
    assert not torch.equal(weights[name], base[name] + delta.bfloat16())
    assert all(torch.equal(weights[other], base[other]) for other in base if other != name)


def test_another_seed_trains_otherwise(folder, undisturbed):
    other = run_lora(folder, folder / "other_seed", seed=1)
    assert other.metrics["initial_eval_loss"] == undisturbed[0].metrics["initial_eval_loss"]
    assert other.metrics["train_loss"] != undisturbed[0].metrics["train_loss"]


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"use_rslora": True}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}]
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_variants(folder, tmp_path, undisturbed, changes):
    result = run_lora(folder, tmp_path, max_steps=4, **changes)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (
        changes.get("use_dora", False),
        changes.get("use_rslora", False),
    )
    assert result.metrics["eval_loss"] < result.metrics["initial_eval_loss"]
    assert not any(getattr(module, "gradient_checkpointing", False) for module in result.model.modules())
    if changes == {"gradient_checkpointing": True}:
        plain = run_lora(folder, tmp_path / "plain", max_steps=4)
        assert result.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], abs=1e-5)


def test_packed_examples_train_alike(folder, tmp_path):
    """Two examples fit in a row: the same loss before training, and every token counted once an epoch."""
    options = {"cutoff_len": 600, "max_steps": None, "num_epochs": 2.0, "batch_size": 2, "learning_rate": 1e-3}
    plain = run_lora(folder, tmp_path / "plain", **options)
    packed = run_lora(folder, tmp_path / "packed", **options, packing=True)
    assert (plain.metrics["num_examples"], packed.metrics["num_examples"]) == (20, 10)
    assert packed.metrics["num_steps"] == 10
    for name in ("num_tokens", "num_label_tokens"):
        assert packed.metrics[name] == plain.metrics[name]
    assert packed.metrics["initial_eval_loss"] == pytest.approx(plain.metrics["initial_eval_loss"], abs=1e-5)
    assert packed.metrics["eval_loss"] < packed.metrics["initial_eval_loss"]


def test_time_limit_ends_with_a_validated_checkpoint(folder, tmp_path):
    result = run_lora(folder, tmp_path, max_minutes=1e-6)
    assert result.metrics["num_steps"] == result.metrics["best_step"] == 1
    assert [row["step"] for row in result.curve] == [0, 1, 1]


def test_number_of_steps():
    rows = [{"input_ids": [0] * 10}] * 30  # 300 tokens an epoch, in 4 steps of 8
    options = {"batch_size": 8, "micro_batch_size": 8, "num_epochs": 2.0, "warmup_steps": 0}
    assert Lora(**options).num_steps(rows) == 8
    assert Lora(**{**options, "num_epochs": 0.6}).num_steps(rows) == 3
    assert Lora(**options, max_steps=5).num_steps(rows) == 5
    assert Lora(**options, max_steps=50).num_steps(rows) == 8
    assert Lora(**options, budget_tokens=450).num_steps(rows) == 6
    assert Lora(**options, budget_tokens=1).num_steps(rows) == 1


def test_a_warm_up_as_long_as_the_training_is_cut_to_a_tenth(folder, tmp_path, caplog):
    """Of one step: none, so that it trains at the whole learning rate."""
    assert [Lora(warmup_steps=100).warmup(steps) for steps in (3, 99, 100, 101, 2000)] == [0, 9, 10, 100, 100]
    result = run_lora(folder, tmp_path, max_steps=1, warmup_steps=100, logging_steps=1)
    assert "recovery.warmup_steps=100 is cut to 0: the training has 1 steps" in caplog.text
    assert [row["learning_rate"] for row in result.curve if "learning_rate" in row] == [LORA_OPTIONS["learning_rate"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "recovery.rank=0 must be at least 1"),
        ({"dropout": 1.0}, r"recovery.dropout=1.0 must lie in \[0, 1\)"),
        ({"source": "web"}, "recovery.source='web' is not one of bundled, hub, file"),
        ({"dtype": "float16"}, "recovery.dtype='float16' is not one of bfloat16, float32"),
        ({"learning_rate": 0.0}, "recovery.learning_rate=0.0 must be above 0"),
        ({"max_minutes": float("inf")}, "recovery.max_minutes=inf must be a finite number above 0"),
        ({"batch_size": 6, "micro_batch_size": 4}, "recovery.micro_batch_size=4 must divide recovery.batch_size=6"),
        ({"warmup_steps": -1}, "recovery.warmup_steps=-1 must be at least 0"),
        ({"validation_size": 0}, "recovery.validation_size=0 must be at least 1"),
        ({"target_modules": []}, r"recovery.target_modules=\[\] trains nothing"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        Lora(**{**LORA_OPTIONS, **changes})


def test_unknown_target_modules():
    with pytest.raises(UserError, match="blocks of a llama model have no linear layer 'w1'; they have down_proj"):
        Lora(target_modules=["q_proj", "w1"]).check(random_source(), 4)
    Lora(target_modules=["fc1", "out_proj"]).check(random_source("opt"), 4)


def test_a_zeroed_sublayer_gets_no_adapter(folder, tmp_path):
    """FinerCut's stock export: an adapter on a projection that was set to zero would bring the sublayer back."""
    removed = [(1, "mlp"), (2, "attention")]
    ops = [DropSublayer((i,), part, "stock") for i, part in removed]
    plan = dataclasses.replace(WHOLE, ops=ops)
    model = apply(plan, AutoModelForCausalLM.from_pretrained(folder / "model"))
    result = run_lora(folder, tmp_path, model=model, plan=plan, max_steps=4)
    layers = result.model.model.layers
    assert layers[1].mlp.down_proj.weight.count_nonzero() == 0
    assert layers[2].self_attn.o_proj.weight.count_nonzero() == 0
    before = AutoModelForCausalLM.from_pretrained(folder / "model").model.layers
    assert torch.equal(layers[1].mlp.up_proj.weight, before[1].mlp.up_proj.weight)
    assert not torch.equal(layers[2].mlp.down_proj.weight, before[2].mlp.down_proj.weight)


def test_missing_data_are_found_without_training(folder):
    options = Lora(**LORA_OPTIONS)
    assert options.identity(folder)["data"]["fingerprint"].startswith("sha256:")
    with pytest.raises(UserError, match="there is no file"):
        options.identity(folder / "elsewhere")


def test_tokens_are_checked_without_tokenizing_everything(folder, monkeypatch):
    """One example of each part where the first is good; all where none is."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    seen = []
    tokenize = tokens.tokenize_example
    monkeypatch.setattr(tokens, "tokenize_example", lambda *a, **k: seen.append(a[1]) or tokenize(*a, **k))
    options = Lora(**LORA_OPTIONS)
    options.check_tokens(tokenizer, folder)
    train, validation = options.examples(folder)
    assert seen == [train[0], validation[0]]
    seen.clear()
    with pytest.raises(UserError, match="cutoff_len=100 leaves no output in any of the 20 examples"):
        Lora(**{**LORA_OPTIONS, "cutoff_len": 100}).check_tokens(tokenizer, folder)
    assert seen == train
    Lora(**{**LORA_OPTIONS, "cutoff_len": 100, "completion_only": False}).check_tokens(tokenizer, folder)


def test_loss_on_prompts_on_request(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    (masked, _), (whole, _) = (
        Lora(**LORA_OPTIONS, completion_only=value).tokenized_split(tokenizer, folder) for value in (True, False)
    )
    assert [row["input_ids"] for row in whole] == [row["input_ids"] for row in masked]
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in whole)
    assert all(row["labels"].count(-100) > 100 for row in masked)
