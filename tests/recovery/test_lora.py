"""LoRA recovery on a tiny Llama: what trains, what comes back, and that a killed training ends the same."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_source
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slm_pipeline.config import CONF_DIR
from slm_pipeline.data import examples
from slm_pipeline.errors import UserError
from slm_pipeline.recovery import checkpoints, training
from slm_pipeline.recovery.base import RecoveryProblem
from slm_pipeline.recovery.lora import Lora, merge_adapter
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.plan import Plan

PLAN = Plan(
    model={"name": "tiny", "fingerprint": "x", "num_layers": 4},
    method="none",
    options={},
    calibration={},
    layer_groups=[[0], [1], [2], [3]],
    ops=[],
)
OPTIONS = {
    "source": "file",
    "path": "alpaca.json",
    "validation_size": 6,
    "rank": 4,
    "learning_rate": 1e-2,
    "max_steps": 10,
    "num_epochs": 9.0,
    "batch_size": 4,
    "micro_batch_size": 2,
    "warmup_steps": 2,
    "cutoff_len": 220,
    "eval_steps": 3,
    "save_steps": 4,
    "logging_steps": 3,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a byte tokenizer in model/, and 26 examples of one easy rule in alpaca.json."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("recovery")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    letters = random.Random(0).sample("abcdefghijklmnopqrstuvwxyz", 26)
    rows = [
        {"instruction": "Repeat.", "input": letter, "output": letter * (3 + row % 4)}
        for row, letter in enumerate(letters)
    ]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    return folder


def run(folder, out, log=lambda metrics, step: None, model=None, seed=1234, plan=None, **changes):
    out.mkdir(parents=True, exist_ok=True)
    problem = RecoveryProblem(
        teacher=None,
        model=model or AutoModelForCausalLM.from_pretrained(folder / "model"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        plan=plan or PLAN,
        out=out,
        base_path=str(folder / "model"),
        seed=seed,
        data_dir=folder,
        log=log,
    )
    return Lora(**{**OPTIONS, **changes}).run(problem)


@pytest.fixture(scope="module")
def undisturbed(folder):
    logged = []
    result = run(folder, folder / "undisturbed", log=lambda metrics, step: logged.append((step, metrics)))
    return result, logged


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
    return Lora(**{**OPTIONS, **changes}).tokenized_split(tokenizer, folder)


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
    adapted = get_peft_model(model, Lora(**OPTIONS)._peft_config([]))
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
    adapted = get_peft_model(model, Lora(**OPTIONS)._peft_config([]))
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


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from test_lora import run
torch.set_num_threads(1)
def log(metrics, step):
    if step == 6 and "loss" in metrics:
        os.kill(os.getpid(), signal.SIGKILL)
run(Path(sys.argv[1]), Path(sys.argv[2]), log)
"""


def test_killed_and_run_again_ends_as_undisturbed(folder, undisturbed, caplog):
    """The kill is in the second epoch, the last checkpoint in the first."""
    out = folder / "killed"
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent, CONF_DIR.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), str(out)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    logged = []
    with caplog.at_level(logging.INFO):
        result = run(folder, out, log=lambda metrics, step: logged.append({"step": step, **metrics}))
    assert f"recovery goes on from {out}/checkpoints/checkpoint-4" in caplog.text
    expected = undisturbed[0]
    assert logged == [row for row in expected.curve if row["step"] > 4]
    assert {**result.metrics, "seconds": 0} == {**expected.metrics, "seconds": 0}
    assert result.curve == expected.curve
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], weight), name


@pytest.mark.parametrize(("save_steps", "stop", "resumed_from"), [(5, 6, 5), (4, 9, 8)])
def test_resumes_at_an_epochs_end_and_in_its_middle(folder, undisturbed, caplog, save_steps, stop, resumed_from):
    def interrupt(metrics, step):
        if step == stop and "loss" in metrics:
            raise KeyboardInterrupt

    out = folder / f"interrupted_at_{stop}"
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, interrupt, save_steps=save_steps)
    with caplog.at_level(logging.INFO):
        result = run(folder, out, save_steps=save_steps)
    assert f"recovery goes on from {out}/checkpoints/checkpoint-{resumed_from}" in caplog.text
    for name, weight in undisturbed[0].model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], weight), name
    assert result.metrics["num_tokens"] == undisturbed[0].metrics["num_tokens"]


def test_a_finished_training_is_not_trained_again(folder, undisturbed):
    out = folder / "undisturbed"
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    again = run(folder, out, log=lambda metrics, step: pytest.fail("trained again"))
    assert torch.equal(again.model.lm_head.weight, undisturbed[0].model.lm_head.weight)
    assert torch.equal(
        again.model.model.layers[0].mlp.up_proj.weight, undisturbed[0].model.model.layers[0].mlp.up_proj.weight
    )
    assert all(weight.dtype == torch.float32 for weight in adapter.values())


def test_killed_after_the_last_step(folder, undisturbed, monkeypatch):
    """All steps done, results not written: nothing is trained beyond the last step."""
    out = folder / "killed_at_the_end"
    monkeypatch.setattr(training, "_summarize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(folder, out)
    monkeypatch.undo()
    result = run(folder, out, log=lambda metrics, step: pytest.fail("trained again"))
    assert result.curve == undisturbed[0].curve
    assert result.metrics["num_tokens"] == undisturbed[0].metrics["num_tokens"]


def test_checkpoints_half_written_or_half_deleted_are_not_taken(tmp_path):
    whole, torn, unmarked = (tmp_path / f"checkpoint-{step}" for step in (9, 10, 11))
    for checkpoint in (whole, torn, unmarked):
        checkpoint.mkdir()
        (checkpoint / "weights").write_text("0123")
        (checkpoint / "optimizer").write_text("4567")
    progress = checkpoints.Progress(num_tokens=5, num_label_tokens=3, seconds=1.5, finished=True)
    checkpoints.mark_complete(whole, progress)
    checkpoints.mark_complete(torn, progress)
    (torn / "optimizer").unlink()
    assert checkpoints.last_complete_checkpoint(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9"]
    assert checkpoints.read_progress(whole) == progress
    (whole / "weights").write_text("012")
    assert checkpoints.last_complete_checkpoint(tmp_path) is None


def test_loss_gone_bad_names_the_step(folder, tmp_path):
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+; lower recovery.learning_rate \(1e\+30 now\)"):
        run(folder, tmp_path / "training", learning_rate=1e30, warmup_steps=0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(UserError, match="validation loss is nan at step 0"):
        run(folder, tmp_path / "start", model=model)


def test_gradient_gone_bad_is_never_applied(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.layers[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("inf"),))
    with pytest.raises(UserError, match="the gradient is (nan|inf) at step 1"):
        run(folder, tmp_path, model=model)
    weights = dict(model.named_parameters())
    assert all(weight.isfinite().all() for weight in weights.values())


def test_another_seed_trains_otherwise(folder, undisturbed):
    other = run(folder, folder / "other_seed", seed=1)
    assert other.metrics["initial_eval_loss"] == undisturbed[0].metrics["initial_eval_loss"]
    assert other.metrics["train_loss"] != undisturbed[0].metrics["train_loss"]


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"use_rslora": True}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}]
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_variants(folder, tmp_path, undisturbed, changes):
    result = run(folder, tmp_path, max_steps=4, **changes)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (
        changes.get("use_dora", False),
        changes.get("use_rslora", False),
    )
    assert result.metrics["eval_loss"] < result.metrics["initial_eval_loss"]
    assert not any(getattr(module, "gradient_checkpointing", False) for module in result.model.modules())
    if changes == {"gradient_checkpointing": True}:
        plain = run(folder, tmp_path / "plain", max_steps=4)
        assert result.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], abs=1e-5)


def test_packed_examples_train_alike(folder, tmp_path):
    """Two examples fit in a row: the same loss before training, and every token counted once an epoch."""
    options = {"cutoff_len": 600, "max_steps": None, "num_epochs": 2.0, "batch_size": 2, "learning_rate": 1e-3}
    plain = run(folder, tmp_path / "plain", **options)
    packed = run(folder, tmp_path / "packed", **options, packing=True)
    assert (plain.metrics["num_examples"], packed.metrics["num_examples"]) == (20, 10)
    assert packed.metrics["num_steps"] == 10
    for name in ("num_tokens", "num_label_tokens"):
        assert packed.metrics[name] == plain.metrics[name]
    assert packed.metrics["initial_eval_loss"] == pytest.approx(plain.metrics["initial_eval_loss"], abs=1e-5)
    assert packed.metrics["eval_loss"] < packed.metrics["initial_eval_loss"]


def test_time_limit_ends_with_a_validated_checkpoint(folder, tmp_path):
    result = run(folder, tmp_path, max_minutes=1e-6)
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


def test_a_warm_up_longer_than_the_training_is_warned_about(folder, tmp_path, caplog):
    run(folder, tmp_path, max_steps=None, num_epochs=0.2, warmup_steps=100)
    assert "recovery.warmup_steps=100 is not below the 1 steps of training" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "recovery.rank=0 must be at least 1"),
        ({"dropout": 1.0}, r"recovery.dropout=1.0 must be in \[0, 1\)"),
        ({"source": "web"}, "recovery.source='web' is not one of bundled, hub, file"),
        ({"dtype": "float16"}, "recovery.dtype='float16' is not one of bfloat16, float32"),
        ({"learning_rate": 0.0}, "recovery.learning_rate=0.0 must be a positive number"),
        ({"max_minutes": float("inf")}, "recovery.max_minutes=inf must be"),
        ({"batch_size": 6, "micro_batch_size": 4}, "recovery.micro_batch_size=4 must divide recovery.batch_size=6"),
        ({"max_steps": 2}, "recovery.warmup_steps=2 is not below recovery.max_steps=2"),
        ({"warmup_steps": -1}, "recovery.warmup_steps=-1 must be at least 0"),
        ({"validation_size": 0}, "recovery.validation_size=0 must be at least 1"),
        ({"target_modules": []}, r"recovery.target_modules=\[\] trains nothing"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        Lora(**{**OPTIONS, **changes})


def test_unknown_target_modules():
    with pytest.raises(UserError, match="blocks of a llama model have no linear layer 'w1'; they have down_proj"):
        Lora(target_modules=["q_proj", "w1"]).check(random_source(), 4)
    Lora(target_modules=["fc1", "out_proj"]).check(random_source("opt"), 4)


def test_a_zeroed_sublayer_gets_no_adapter(folder, tmp_path):
    """FinerCut's stock export: an adapter on a projection that was set to zero would bring the sublayer back."""
    removed = [(1, "mlp"), (2, "attention")]
    ops = [{"op": "drop_sublayer", "layers": [i], "sublayer": part, "export": "stock"} for i, part in removed]
    plan = dataclasses.replace(PLAN, ops=ops)
    model = apply(plan, AutoModelForCausalLM.from_pretrained(folder / "model"))
    result = run(folder, tmp_path, model=model, plan=plan, max_steps=4)
    layers = result.model.model.layers
    assert layers[1].mlp.down_proj.weight.count_nonzero() == 0
    assert layers[2].self_attn.o_proj.weight.count_nonzero() == 0
    before = AutoModelForCausalLM.from_pretrained(folder / "model").model.layers
    assert torch.equal(layers[1].mlp.up_proj.weight, before[1].mlp.up_proj.weight)
    assert not torch.equal(layers[2].mlp.down_proj.weight, before[2].mlp.down_proj.weight)


def test_missing_data_are_found_without_training(folder):
    options = Lora(**OPTIONS)
    assert options.data_identity(folder)["fingerprint"].startswith("sha256:")
    with pytest.raises(UserError, match="there is no file"):
        options.data_identity(folder / "elsewhere")


def test_tokens_are_checked_without_tokenizing_everything(folder, monkeypatch):
    """One example of each part where the first is good; all where none is."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    seen = []
    tokenize = examples.tokenize_example
    monkeypatch.setattr(examples, "tokenize_example", lambda *a, **k: seen.append(a[1]) or tokenize(*a, **k))
    options = Lora(**OPTIONS)
    options.check_tokens(tokenizer, folder)
    train, validation = options.examples(folder)
    assert seen == [train[0], validation[0]]
    seen.clear()
    with pytest.raises(UserError, match="cutoff_len=100 leaves no output in any of the 20 examples"):
        Lora(**{**OPTIONS, "cutoff_len": 100}).check_tokens(tokenizer, folder)
    assert seen == train
    Lora(**{**OPTIONS, "cutoff_len": 100, "completion_only": False}).check_tokens(tokenizer, folder)


def test_loss_on_prompts_on_request(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    (masked, _), (whole, _) = (
        Lora(**OPTIONS, completion_only=value).tokenized_split(tokenizer, folder) for value in (True, False)
    )
    assert [row["input_ids"] for row in whole] == [row["input_ids"] for row in masked]
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in whole)
    assert all(row["labels"].count(-100) > 100 for row in masked)
