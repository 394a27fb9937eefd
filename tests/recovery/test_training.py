"""Recoveries on the language-model loss (partial_layers, full), and what the training of all of them promises."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from conftest import random_source
from recovery.conftest import BUDGET, make_plan, problem, teacher

from slm_pipeline.data.batches import Collator
from slm_pipeline.errors import UserError
from slm_pipeline.recovery.block_mse import BlockMse
from slm_pipeline.recovery.distill import Distill
from slm_pipeline.recovery.full import Full
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.recovery.partial_layers import PartialLayers
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer

RECOVERIES = {"lora": Lora, "full": Full, "partial_layers": PartialLayers, "distill": Distill, "block_mse": BlockMse}


def options(recovery=PartialLayers, **changes):
    return recovery(**{**BUDGET, "learning_rate": 1e-3, **changes})


def moved(task, result, **model):
    """Names of the parameters that the training changed."""
    before = problem(task.data_dir, task.out, plan=task.plan, **model).model.state_dict()
    return {name for name, weight in result.model.state_dict().items() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize(
    ("changes", "tied", "layers", "others"),
    [
        ({"num_layers": 2}, False, {"2", "3"}, {"model.norm.weight", "lm_head.weight"}),
        ({"num_layers": 1, "head": False}, False, {"3"}, {"model.norm.weight"}),
        ({"num_layers": 0, "final_norm": False, "head": True}, False, set(), {"lm_head.weight"}),
        ({"num_layers": 4}, True, {"0", "1", "2", "3"}, {"model.norm.weight"}),
    ],
)
def test_partial_layers_train_the_top_alone(data, tmp_path, changes, tied, layers, others):
    task = problem(data, tmp_path, tied=tied)
    result = options(**changes).run(task)
    names = moved(task, result, tied=tied)
    assert {name for name in names if ".layers." not in name} == others
    assert {name.split(".")[2] for name in names if ".layers." in name} == layers
    assert sum(".layers." in name for name in names) == 9 * len(layers)
    assert all(weight.requires_grad for weight in result.model.parameters())


def test_nothing_below_the_lowest_trained_block_is_kept_for_a_backward_pass(data, tmp_path):
    task = problem(data, tmp_path)
    seen = []

    def note(layer):
        return lambda module, args, output: seen.append((layer, output.requires_grad))

    hooks = [block.register_forward_hook(note(i)) for i, block in enumerate(task.model.model.layers)]
    options(num_layers=2, max_steps=2).run(task)
    [hook.remove() for hook in hooks]
    assert {layer for layer, graph in seen if graph} == {2, 3}


def test_full_trains_every_weight(data, tmp_path):
    task = problem(data, tmp_path)
    result = options(Full).run(task)
    assert moved(task, result) == set(result.model.state_dict())
    assert result.metrics["trainable_parameters"] == sum(p.numel() for p in result.model.parameters())


def test_full_leaves_a_zeroed_sublayer_alone(data, tmp_path):
    ops = [DropSublayer((2,), "attention", "stock")]
    task = problem(data, tmp_path, plan=make_plan(ops=ops))
    result = options(Full).run(task)
    untouched = set(result.model.state_dict()) - moved(task, result)
    assert untouched == {
        "model.layers.2.input_layernorm.weight",
        *(f"model.layers.2.self_attn.{name}_proj.weight" for name in "qkvo"),
    }


def test_one_step_is_adamws(data, tmp_path):
    """Against torch's own optimizer and clipping on the whole batch at once: accumulation must not show."""
    task = problem(data, tmp_path)
    setup = options(
        Full, max_steps=1, warmup_steps=0, batch_size=20, micro_batch_size=2, max_grad_norm=0.05, weight_decay=0.1
    )
    result = setup.run(task)
    model = problem(data, tmp_path).model
    train, _ = setup.tokenized_split(task.tokenizer, data)
    assert len(train) == 20
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    logits, labels = [], []
    for row in train:
        logits.append(model(torch.tensor([row["input_ids"]])).logits[0, :-1])
        labels += row["labels"][1:]
    torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(labels)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert norm > 0.05
    optimizer.step()
    for name, weight in model.named_parameters():
        difference = (result.model.state_dict()[name] - weight).abs()
        assert difference.max() < 2e-5, name  # of steps of 1e-3; Adam's first step is a sign where gradients are tiny


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [0.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "constant"}, [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # 0.25 + 0.75 (1 + cos(pi k / 5)) / 2
        ({"schedule": "cosine", "final_learning_rate": 0.25}, [0.0, 1.0, 0.928381, 0.740881, 0.509119, 0.321619]),
    ],
)
def test_schedules(data, tmp_path, changes, rates):
    result = options(Full, max_steps=6, **changes).run(problem(data, tmp_path))
    found = [row["learning_rate"] for row in result.curve if "loss" in row]
    assert found == pytest.approx([1e-3 * rate for rate in rates], rel=1e-4, abs=1e-9)


def test_early_stopping_ends_after_so_many_validations_without_a_better_one(data, tmp_path, caplog):
    setup = options(Full, learning_rate=0.3, max_steps=20, eval_steps=1, early_stopping=3, save_steps=100)
    with caplog.at_level(logging.INFO):
        result = setup.run(problem(data, tmp_path))
    losses = [row["eval_loss"] for row in result.curve if "eval_loss" in row]
    best = losses.index(min(losses))
    assert len(losses) - 1 == result.metrics["num_steps"] == best + 3
    assert result.metrics["num_steps"] < 20
    assert "no better validation loss in the last 3" in caplog.text
    again = setup.run(problem(data, tmp_path, log=lambda metrics, step: pytest.fail("trained again")))
    assert again.metrics == result.metrics


def test_the_weights_of_the_best_validation_loss_come_back(data, tmp_path):
    setup = options(Full, learning_rate=0.1, max_steps=8, eval_steps=1)
    task = problem(data, tmp_path)
    result = setup.run(task)
    losses = [row["eval_loss"] for row in result.curve if "eval_loss" in row]
    assert result.metrics["eval_loss"] == min(losses[1:]) < losses[-1]
    _, validation = setup.tokenized_split(task.tokenizer, data)
    inputs = Collator(0)(validation)
    with torch.no_grad():
        loss = result.model(**inputs).loss
    assert float(loss) == pytest.approx(result.metrics["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("recovery", [Full, PartialLayers, BlockMse])
def test_interrupted_and_run_again_ends_as_undisturbed(data, tmp_path, recovery):
    setup = options(recovery, max_steps=7, batch_size=6)

    def interrupt(metrics, step):
        if step == 5 and "loss" in metrics:
            raise KeyboardInterrupt

    expected = setup.run(problem(data, tmp_path / "undisturbed"))
    with pytest.raises(KeyboardInterrupt):
        setup.run(problem(data, tmp_path / "out", log=interrupt))
    result = setup.run(problem(data, tmp_path / "out"))
    assert {**result.metrics, "seconds": 0} == {**expected.metrics, "seconds": 0}
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], weight), name


@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_gradient_checkpointing_changes_nothing_but_memory(data, tmp_path, name):
    setup = options(RECOVERIES[name], max_steps=2)
    plain = setup.run(problem(data, tmp_path / "plain"))
    kept = dataclasses.replace(setup, gradient_checkpointing=True).run(problem(data, tmp_path / "checkpointed"))
    for parameter, weight in plain.model.state_dict().items():
        assert torch.allclose(kept.model.state_dict()[parameter], weight, atol=1e-6), parameter
    assert not any(getattr(module, "gradient_checkpointing", False) for module in kept.model.modules())


def test_more_layers_than_there_are(data, tmp_path):
    with pytest.raises(UserError, match="recovery.num_layers=5 is more than the 4 layers of the pruned model"):
        options(num_layers=5).check(random_source(), 4)
    with pytest.raises(UserError, match="recovery.num_layers=5 is more than the 4 layers of the pruned model"):
        options(num_layers=5).run(problem(data, tmp_path))
    options(num_layers=4).check(random_source(), 4)
    options(num_layers=4).check(random_source(), None)  # how many are left is not known before the merge
    with pytest.raises(UserError, match=f"is more than the {random_source().num_layers} layers of random"):
        options(num_layers=1 + random_source().num_layers).check(random_source(), None)


def test_a_head_that_is_the_embedding_cannot_train_alone(data):
    with pytest.raises(UserError, match="recovery.head=true: the output head of random is its embedding"):
        options(head=True).preflight(random_source("gemma2"), data)
    options(head=True).preflight(random_source("llama"), data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": -1}, "recovery.num_layers=-1 must be at least 0"),
        ({"num_layers": 0, "head": False, "final_norm": False}, "train nothing"),
        ({"schedule": "step"}, "recovery.schedule='step' is not one of linear, cosine, constant"),
        ({"final_learning_rate": 0.1}, "recovery.final_learning_rate=0.1 needs recovery.schedule=cosine, not linear"),
        ({"final_learning_rate": 1.0, "schedule": "cosine"}, r"recovery.final_learning_rate=1.0 must lie in \[0, 1\)"),
        ({"early_stopping": 0}, "recovery.early_stopping=0 must be at least 1"),
        ({"weight_decay": -0.1}, "recovery.weight_decay=-0.1 must be at least 0"),
        ({"max_grad_norm": 0.0}, "recovery.max_grad_norm=0.0 must be above 0"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        options(**changes)


def test_tied_weights_stay_tied(data, tmp_path):
    result = options(Full).run(problem(data, tmp_path, tied=True))
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert not torch.equal(result.model.lm_head.weight, teacher(tied=True).lm_head.weight)


@pytest.mark.parametrize("recovery", [Full, PartialLayers, Distill])
def test_the_trained_model_computes_as_it_did_before_not_under_autocast(data, tmp_path, recovery):
    result = options(recovery, max_steps=2, dtype="bfloat16").run(problem(data, tmp_path))
    plain = problem(data, tmp_path).model
    plain.load_state_dict(result.model.state_dict())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(result.model(ids).logits, plain(ids).logits)
