"""The study of dynamic layer selection against whole models that keep some layers."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from slm_pipeline.analysis import dynamic_skip
from slm_pipeline.engine import blocks, keep_sets
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

INFINITY = math.inf


def plan_for(num_layers: int = 6) -> Plan:
    """One layer dropped, two merged."""
    return Plan(
        model={"name": "random", "fingerprint": "", "num_layers": num_layers},
        method="by_hand",
        options={},
        calibration={},
        ops=[Merge((1, 2), "mean"), Drop((4,))],
    )


@torch.no_grad()
def losses_of(model, input_ids):
    return [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in input_ids]


def with_layers(model, kept):
    model = copy.deepcopy(model)
    view = ModelView(model)
    view.rebuild([view.layers[layer] for layer in kept], kept)
    return model


def test_keep_sets_of_six_layers():
    assert dynamic_skip.evenly_spaced(6) == [
        [0],
        [0, 5],
        [0, 3, 5],
        [0, 2, 3, 5],
        [0, 1, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    assert dynamic_skip.evenly_spaced(1) == [[0]]


@pytest.mark.parametrize("num_layers", [*range(2, 50), 80, 126])
def test_keep_sets_have_k_layers_first_and_last_among_them(num_layers):
    for k, kept in enumerate(dynamic_skip.evenly_spaced(num_layers), start=1):
        assert len(set(kept)) == k
        assert kept == sorted(kept)
        assert (kept[0], kept[-1]) == (0, num_layers - 1 if k > 1 else 0)


@pytest.mark.parametrize(("batch_tokens", "sample_tokens"), [(1, 1), (40, 24), (10**6, 10**6)])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "opt", "gpt_neox"])
def test_losses_are_those_of_whole_models(any_model, input_ids, batch_tokens, sample_tokens, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_TOKENS", batch_tokens)
    monkeypatch.setattr(dynamic_skip, "_SAMPLE_TOKENS", sample_tokens)
    losses, _ = dynamic_skip.measure(ModelView(any_model), input_ids)
    expected = [losses_of(with_layers(any_model, kept), input_ids) for kept in dynamic_skip.evenly_spaced(6)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)
    assert losses[-1].tolist() == pytest.approx(losses_of(any_model, input_ids), abs=1e-5)


def test_a_block_runs_once_for_keep_sets_that_agree_so_far(tiny_llama, input_ids):
    runner = keep_sets.BlockRunner(ModelView(tiny_llama[0]), input_ids)
    one_by_one = [keep_sets.keep_set_losses(runner, [kept], input_ids) for kept in dynamic_skip.evenly_spaced(6)]
    runner.num_block_evaluations = 0
    together = keep_sets.keep_set_losses(runner, dynamic_skip.evenly_spaced(6), input_ids)
    torch.testing.assert_close(together, torch.cat(one_by_one))
    assert runner.num_block_evaluations == 4  # layers 2 to 5; nobody skips anything before
    assert keep_sets.keep_set_losses(runner, [range(6)], input_ids).sum() == runner.loss(runner.states[-1], input_ids)


def test_a_plans_loss_is_that_of_the_model_it_makes(tiny_llama, input_ids, monkeypatch):
    monkeypatch.setattr(dynamic_skip, "_SAMPLE_TOKENS", 24)  # two samples, then one
    model, _ = tiny_llama
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nothing = Plan(**{**vars(plan_for()), "ops": []})
    losses, plan_losses = dynamic_skip.measure(ModelView(model), input_ids, [plan_for(), nothing])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(plan_losses[1], losses[-1])
    pruned = losses_of(apply(plan_for(), model), input_ids)
    assert plan_losses[0].tolist() == pytest.approx(pruned, abs=1e-5)


def test_a_plan_for_another_depth_is_refused(tiny_llama, input_ids):
    with pytest.raises(UserError, match="the plan is for random with 8 layers; this model has 6"):
        dynamic_skip.measure(ModelView(tiny_llama[0]), input_ids, [plan_for(8)])


def test_a_loss_that_is_not_finite_never_wins(tiny_llama, input_ids, monkeypatch):
    sums = torch.full((6, 3), 11.0, dtype=torch.float64)
    sums[2] = torch.tensor([11.0, math.nan, INFINITY])
    monkeypatch.setattr(dynamic_skip, "keep_set_losses", lambda *_: sums)
    losses, _ = dynamic_skip.measure(ModelView(tiny_llama[0]), input_ids)
    assert losses[2].tolist() == [1.0, INFINITY, INFINITY]


def test_a_dense_model_that_overflows_is_an_error(tiny_llama, input_ids):
    model, _ = tiny_llama
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the dense model's loss is not finite"):
        dynamic_skip.measure(ModelView(model), input_ids)


#                            sequence 0   1    2
LOSSES = torch.tensor(
    [
        [INFINITY, 2.0, 9.0],
        [2.2, 4.0, 1.0],
        [3.0, 1.0, 5.0],
        [2.0, 2.0, 4.0],
    ],
    dtype=torch.float64,
)


def test_fewest_layers_as_good_as_all():
    assert dynamic_skip.fewest_layers(LOSSES, 0.0) == [4, 1, 2]
    assert dynamic_skip.fewest_layers(LOSSES, 0.11) == [2, 1, 2]


def test_best_of_fewer():
    assert dynamic_skip.best_of_fewer(LOSSES).tolist() == [
        [INFINITY, 2.0, 9.0],
        [2.2, 2.0, 1.0],
        [2.2, 1.0, 1.0],
        [2.0, 1.0, 1.0],
    ]


def test_summary_of_a_table_made_by_hand():
    plan = plan_for()
    found = dynamic_skip.summarize(LOSSES, torch.tensor([[3.0, 3.0, INFINITY]]), {"a/plan.json": plan}, 0.0)
    json.dumps(found, allow_nan=False)
    assert found["losses"] == [[None, 2.0, 9.0], *LOSSES[1:].tolist()]
    assert found["static"][0] == {"loss": None, "perplexity": None}
    assert [point["loss"] for point in found["static"][1:]] == pytest.approx([2.4, 3.0, 8 / 3])
    assert [point["loss"] for point in found["at_most"][1:]] == pytest.approx([5.2 / 3, 4.2 / 3, 4 / 3])
    oracle = found["oracle"]
    assert (oracle["num_layers"], oracle["counts"], oracle["median_num_layers"]) == ([4, 1, 2], [1, 1, 0, 1], 2)
    assert oracle["mean_num_layers"] == pytest.approx(7 / 3)
    assert oracle["mean_fraction"] == pytest.approx(7 / 12)
    assert oracle["loss"] == pytest.approx((2.0 + 2.0 + 1.0) / 3)
    assert oracle["perplexity"] == pytest.approx(math.exp(5 / 3))
    (found_plan,) = found["plans"]
    assert found_plan["losses"] == [3.0, 3.0, None]
    assert (found_plan["path"], found_plan["method"], found_plan["num_layers"]) == ("a/plan.json", "by_hand", 4)

    lines = dynamic_skip.report(found).splitlines()
    assert lines[2] == "  layers   loss  perplexity  oracle loss  oracle perplexity  enough for"
    assert lines[3].split() == ["1", "-", "-", "-", "-", "1"]
    assert lines[4].split() == ["2", "2.4", "11.02", "1.733", "5.659", "1"]
    assert "2.3 of 4 on average (58.3%)" in lines[8]
    assert lines[-1].split() == ["by_hand", "4", "-", "-", "14.39", "3.794", "a/plan.json"]
