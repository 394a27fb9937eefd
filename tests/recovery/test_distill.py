"""Hierarchical distillation: what the layers learn from, that they are independent, and what comes back."""

from __future__ import annotations

import dataclasses
import logging
import math
import re

import pytest
import torch
from recovery.conftest import BUDGET, MERGED, make_plan, problem, teacher
from torch.nn.functional import cosine_similarity

from slm_pipeline.data.batches import Collator, pack
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.recovery.block_mse import BlockMse
from slm_pipeline.recovery.distill import Distill
from slm_pipeline.recovery.freezing import freeze_all_but
from slm_pipeline.recovery.spans import Span, changed_spans, spans
from slm_pipeline.recovery.teacher_losses import LOSSES, LogitLoss, StateLoss
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.ops.merge import Merge

SPANS = [Span(1, 1, 2), Span(3, 4, 5)]
BODIES = [0, 2, 3, 5]


def distill(**changes):
    return Distill(**{**BUDGET, "learning_rate": 3e-3, **changes})


def test_dropped_layers_belong_to_the_next_kept_one():
    plan = make_plan(8, ops=[Merge((2, 3), "mean"), Drop((0, 4, 5, 7))])
    assert spans(plan) == [Span(0, 0, 1), Span(1, 2, 3), Span(2, 4, 7)]
    assert spans(plan, gap="below") == [Span(0, 0, 1), Span(1, 2, 5), Span(2, 6, 7)]
    assert changed_spans(MERGED) == SPANS
    assert changed_spans(MERGED, gap="below") == [Span(1, 1, 2), Span(2, 3, 4)]
    assert changed_spans(make_plan()) == []


def test_a_folded_layer_stands_for_the_gap_above_it():
    plan = make_plan(ops=[Drop((2, 3)), Fold((1,), "fold.0")])
    assert changed_spans(plan) == [Span(1, 1, 3)]


def test_a_layer_short_of_a_sublayer_stands_for_itself():
    for export in ("stock", "custom"):
        assert changed_spans(make_plan(ops=[DropSublayer((2,), "mlp", export)])) == [Span(2, 2, 2)]


def batch(architecture_vocabulary=256):
    """Two rows of 9 and 6 tokens; the first three tokens of each bear no loss."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (9, 6):
        ids = torch.randint(0, architecture_vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "attention_mask": [1] * length})
    return rows, Collator(0)(rows)


def naive_losses(dense, pruned, rows, kind):
    """Each span's mean loss over the states that predict a labelled token, one row at a time, without padding."""
    losses = []
    for span in SPANS:
        values = []
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            states = dense(ids, output_hidden_states=True).hidden_states  # the last one is normed
            before_norm = []
            hook = dense.model.norm.register_forward_pre_hook(lambda _, args, kept=before_norm: kept.append(args[0]))
            dense(ids)
            hook.remove()
            target = (before_norm[0] if span.last == 5 else states[span.last + 1])[0].double()
            positions = torch.arange(ids.shape[1])[None]
            rope = dense.model.rotary_emb(states[0], positions)
            layer = pruned.model.layers[span.position]
            output = layer(states[span.first], position_embeddings=rope, attention_mask=None)[0].double()
            for position in range(ids.shape[1] - 1):
                if row["labels"][position + 1] == -100:
                    continue
                s, t = output[position], target[position]
                mse = ((s - t) ** 2).sum() / len(s)
                cosine = 1 - cosine_similarity(s, t, dim=0)
                p, q = t.softmax(0), s.softmax(0)
                values.append(
                    {"mse": mse, "cosine": cosine, "kl": (p * (p / q).log()).sum(), "mse_cosine": mse + cosine}[kind]
                )
        losses.append(torch.stack(values).mean())
    return losses


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_the_loss_is_that_of_each_layer_alone_on_the_teachers_states(kind):
    dense, pruned = teacher(), apply(MERGED, teacher())
    rows, inputs = batch()
    expected = naive_losses(dense, pruned, rows, kind)
    joint = StateLoss(dense, pruned, SPANS, BODIES, kind)(**inputs)["loss"]
    assert float(joint) == pytest.approx(float(sum(expected)), rel=1e-5)
    for span, loss in zip(SPANS, expected, strict=True):
        alone = StateLoss(dense, pruned, [span], BODIES, kind)(**inputs)["loss"]
        assert float(alone) == pytest.approx(float(loss), rel=1e-5)
    assert float(expected[0]) > 1e-4  # it is not all zero


def test_batches_of_a_step_add_up_to_its_mean():
    dense, pruned = teacher(), apply(MERGED, teacher())
    rows, together = batch()
    objective = StateLoss(dense, pruned, SPANS, BODIES, "mse")
    parts = [objective(**Collator(0)([row]), num_items_in_batch=torch.tensor(6 + 3))["loss"] for row in rows]
    assert float(sum(parts)) == pytest.approx(float(objective(**together)["loss"]), rel=1e-5)


@pytest.mark.parametrize("objective", ["states", "logits"])
def test_packed_rows_have_the_loss_of_single_ones(objective):
    dense, pruned = teacher(), apply(MERGED, teacher())
    rows, together = batch()
    packed = Collator(0)([*pack(rows, 16), *pack(rows[:1], 16)])
    module = StateLoss(dense, pruned, SPANS, BODIES, "kl") if objective == "states" else LogitLoss(dense, pruned)
    alone = [float(module(**Collator(0)([row]), num_items_in_batch=1)["loss"]) for row in [*rows, rows[0]]]
    assert float(module(**packed, num_items_in_batch=1)["loss"]) == pytest.approx(sum(alone), rel=1e-5)


def test_the_logit_loss_is_the_divergence_from_the_teacher():
    dense, pruned = teacher(), apply(MERGED, teacher())
    rows, inputs = batch()
    values = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        p, q = (model(ids).logits[0].double().softmax(-1) for model in (dense, pruned))
        values += [(p[i] * (p[i] / q[i]).log()).sum() for i in range(ids.shape[1] - 1) if row["labels"][i + 1] != -100]
    loss = LogitLoss(dense, pruned)(**inputs)["loss"]
    assert float(loss) == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)
    assert float(LogitLoss(dense, teacher())(**inputs)["loss"]) == pytest.approx(0, abs=1e-6)


def test_the_dense_layers_themselves_have_no_loss(architecture):
    """Of every architecture: the arguments that a layer is given are the right ones, sliding windows and all."""
    dense, same = teacher(architecture), teacher(architecture)
    whole = [Span(layer, layer, layer) for layer in range(6)]
    _, inputs = batch()
    loss = StateLoss(dense, same, whole, list(range(6)), "mse")(**inputs)["loss"]
    assert float(loss) == pytest.approx(0, abs=1e-9)


def test_only_the_spans_layers_get_gradients_each_its_own():
    dense, pruned = teacher().requires_grad_(False), apply(MERGED, teacher())
    _, inputs = batch()

    def gradients(spans):
        pruned.zero_grad()
        pruned.requires_grad_(False)
        for span in spans:
            pruned.model.layers[span.position].requires_grad_(True)
        StateLoss(dense, pruned, spans, BODIES, "kl")(**inputs)["loss"].backward()
        return {name: p.grad.clone() for name, p in pruned.named_parameters() if p.grad is not None}

    joint = gradients(SPANS)
    assert {name.split(".")[2] for name in joint} == {"1", "3"}
    assert len(joint) == 2 * 9  # seven projections and two norms each
    alone = gradients(SPANS[:1]) | gradients(SPANS[1:])
    assert all(torch.equal(joint[name], alone[name]) for name in joint)
    assert all(p.grad is None for p in dense.parameters())


@pytest.mark.parametrize("logit_share", [0.0, 0.5])
def test_joint_and_block_by_block_agree(data, tmp_path, logit_share):
    options = {"logit_share": logit_share, "learning_rate": 3e-2, "max_grad_norm": 0.01}  # clipping counts
    joint = distill(**options).run(problem(data, tmp_path / "joint"))
    blocks = distill(**options, order="blocks").run(problem(data, tmp_path / "blocks"))
    for name, weight in joint.model.state_dict().items():
        assert torch.equal(blocks.model.state_dict()[name], weight), name
    assert blocks.metrics["eval_loss"] == pytest.approx(joint.metrics["eval_loss"], rel=1e-6)
    assert blocks.metrics["initial_eval_loss"] == pytest.approx(joint.metrics["initial_eval_loss"], rel=1e-6)
    assert blocks.metrics["trainable_parameters"] == joint.metrics["trainable_parameters"]
    assert blocks.metrics["num_tokens"] == joint.metrics["num_tokens"]
    assert joint.metrics["num_steps"] == 6
    assert joint.metrics["loss"] == blocks.metrics["loss"] == "kl of states, 2 layers"


def test_the_curve_tells_layers_and_logits_apart(data, tmp_path):
    """Validations of each layer at its start, in its middle and at its end; then those of the whole model."""
    logged = []
    options = {"logit_share": 0.5, "max_steps": 8, "eval_steps": 2, "order": "blocks"}
    result = distill(**options).run(
        problem(data, tmp_path, log=lambda metrics, step: logged.append({"step": step, **metrics}))
    )
    assert [row["step"] for row in result.curve if "eval_loss" in row] == [0, 2, 4, 4, 6, 8]
    whole = [(row["step"], row["logit_eval_loss"]) for row in result.curve if "logit_eval_loss" in row]
    assert [step for step, _ in whole] == [8, 10, 12]
    assert whole[0][1] == result.metrics["initial_logit_eval_loss"]
    assert min(loss for _, loss in whole[1:]) == result.metrics["logit_eval_loss"]
    assert [row["step"] for row in result.curve if "logit_loss" in row] == [9, 10, 11, 12]
    assert logged == result.curve


def test_a_loss_gone_bad_is_told_with_the_step_of_the_whole_recovery(data, tmp_path, monkeypatch):
    def diverges(student, teacher):
        calls.append(None)
        return (student - teacher).square().mean(dim=-1) * (math.nan if len(calls) > 25 else 1)

    calls = []
    monkeypatch.setitem(LOSSES, "mse", diverges)
    logged = []
    task = problem(data, tmp_path, log=lambda metrics, step: logged.append(step))
    with pytest.raises(UserError, match="the (training|validation) loss is nan at step") as error:
        distill(loss="mse", order="blocks").run(task)
    assert int(re.search(r"at step (\d+)", str(error.value))[1]) == max(logged) + 1 > 6


def test_it_learns_and_leaves_the_other_layers_alone(data, tmp_path):
    logged = []
    task = problem(data, tmp_path, log=lambda metrics, step: logged.append(step))
    before = {name: weight.clone() for name, weight in task.model.state_dict().items()}
    result = distill(loss="mse", max_steps=30, num_epochs=30.0).run(task)
    assert result.metrics["eval_loss"] < 0.7 * result.metrics["initial_eval_loss"]
    changed = {
        name.split(".")[2]
        for name, weight in result.model.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert changed == {"1", "3"}
    assert all(weight.requires_grad for weight in result.model.parameters())
    assert [row["step"] for row in result.curve] == sorted(row["step"] for row in result.curve)
    assert sorted(set(logged)) == sorted({row["step"] for row in result.curve})


def test_the_last_weights_are_kept_and_their_loss_is_told(data, tmp_path):
    task = problem(data, tmp_path)
    result = distill(loss="mse").run(task)
    train, validation = distill().tokenized_split(task.tokenizer, data)
    objective = StateLoss(teacher(), result.model, SPANS, BODIES, "mse")
    with torch.no_grad():
        loss = float(objective(**Collator(0)(validation))["loss"])
    assert result.metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_an_unpruned_plan_leaves_the_model_unchanged(data, tmp_path, caplog):
    task = problem(data, tmp_path, plan=make_plan())
    result = distill().run(task)
    assert all(torch.equal(weight, teacher().state_dict()[name]) for name, weight in result.model.state_dict().items())
    assert result.metrics == {"num_steps": 0, "num_tokens": 0, "seconds": 0.0}
    assert "leaves every layer as it was" in caplog.text


@pytest.mark.parametrize("order", ["joint", "blocks"])
def test_interrupted_and_run_again_ends_as_undisturbed(data, tmp_path, caplog, order):
    options = {"order": order, "logit_share": 0.5, "max_steps": 8}
    expected = distill(**options).run(problem(data, tmp_path / "undisturbed"))
    last = 12 if order == "blocks" else 8

    def interrupt(metrics, step):
        if step == last and "logit_loss" in metrics:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(**options).run(problem(data, tmp_path / "out", log=interrupt))
    with caplog.at_level(logging.INFO):
        result = distill(**options).run(problem(data, tmp_path / "out"))
    assert "checkpoints/logits/checkpoint-3" in caplog.text
    assert {**result.metrics, "seconds": 0} == {**expected.metrics, "seconds": 0}
    assert result.curve == expected.curve
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], weight), name


def test_small_updates_of_bfloat16_weights_are_not_rounded_away(data, tmp_path):
    """The weights train in float32 and are rounded once: steps each too small for bfloat16 still move them."""
    task = problem(data, tmp_path)
    task = dataclasses.replace(task, model=task.model.bfloat16(), teacher=lambda: teacher().bfloat16())
    before = task.model.model.layers[1].mlp.up_proj.weight.detach().clone()
    result = distill(learning_rate=2e-4, max_steps=12, dtype="bfloat16").run(task)
    after = result.model.model.layers[1].mlp.up_proj.weight
    assert after.dtype == torch.bfloat16
    large = before.abs() > 0.15  # half of bfloat16's step there is 4.9e-4, more than any one update
    assert (after[large] != before[large]).float().mean() > 0.3


def test_a_zeroed_sublayer_stays_zero(data, tmp_path):
    ops = [DropSublayer((2,), "mlp", "stock")]
    result = distill().run(problem(data, tmp_path, plan=make_plan(ops=ops)))
    layer, before = result.model.model.layers[2], teacher().model.layers[2]
    assert layer.mlp.down_proj.weight.count_nonzero() == 0
    assert torch.equal(layer.mlp.up_proj.weight, before.mlp.up_proj.weight)
    assert not torch.equal(layer.self_attn.o_proj.weight, before.self_attn.o_proj.weight)


def test_block_mse_trains_the_layer_below_the_gap(data, tmp_path):
    plan = make_plan(ops=[Drop((3, 4))])
    options = BlockMse(**{**BUDGET, "warmup_steps": 0})
    task = problem(data, tmp_path / "states", plan=plan)
    train, validation = options.tokenized_split(task.tokenizer, data)
    inputs = Collator(0)(validation)
    dense = teacher()
    with torch.no_grad():
        states = dense(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        ).hidden_states
    counted = inputs["labels"][:, 1:] != -100
    expected = ((states[3] - states[5])[:, :-1][counted] ** 2).mean()  # layer 2 as it was against layers 2 .. 4
    result = options.run(task)
    assert result.metrics["initial_eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert result.metrics["eval_loss"] < result.metrics["initial_eval_loss"]
    moved = [not torch.equal(a.mlp.up_proj.weight, dense.model.layers[b].mlp.up_proj.weight)
             for a, b in zip(result.model.model.layers, (0, 1, 2, 5), strict=True)]  # fmt: skip
    assert moved == [False, False, True, False]
    other = dataclasses.replace(options, objective="language_model").run(problem(data, tmp_path / "lm", plan=plan))
    assert other.metrics["initial_eval_loss"] != result.metrics["initial_eval_loss"]
    moved = [not torch.equal(a.mlp.up_proj.weight, dense.model.layers[b].mlp.up_proj.weight)
             for a, b in zip(other.model.model.layers, (0, 1, 2, 5), strict=True)]  # fmt: skip
    assert moved == [False, False, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distill(loss="l1"), "recovery.loss='l1' is not one of mse, cosine, kl, mse_cosine"),
        (lambda: distill(order="random"), "recovery.order='random' is not one of joint, blocks"),
        (lambda: distill(logit_share=1.0), r"recovery.logit_share=1.0 must lie in \[0, 1\)"),
        (lambda: BlockMse(objective="x"), "recovery.objective='x' is not one of states, language_model"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_gradients_of_each_layer_are_clipped_apart(data, tmp_path):
    task = problem(data, tmp_path)
    freeze_all_but(task, [ModelView(task.model).layers[span.position] for span in SPANS])
    groups = StateLoss(teacher(), task.model, SPANS, BODIES, "kl").clipping_groups()
    assert [len(group) for group in groups] == [9, 9]
