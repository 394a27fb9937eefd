"""The painters study against whole models whose layers are run otherwise by hand."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from slm_pipeline.analysis import painters
from slm_pipeline.engine.blocks import BlockRunner
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.plan import Plan

ONE_BY_ONE = [(layer,) for layer in range(6)]
OPTIONS = {"loops": 2, "orders": 2, "seed": 7}


class SideBySide(torch.nn.Module):
    """Layers on one input, the mean of their outputs: stands in the place of a layer.

    ``windows``: how many tokens each layer sees, where they differ in that; the model hands out one mask for all.
    """

    def __init__(self, layers, windows):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.windows = windows

    def forward(self, hidden, *args, **kwargs):
        back = torch.arange(hidden.shape[1])[:, None] - torch.arange(hidden.shape[1])
        outputs = []
        for layer, window in zip(self.layers, self.windows, strict=True):
            if len(set(self.windows)) > 1:
                seen = (back >= 0) & (back < (window or math.inf))
                kwargs["attention_mask"] = torch.where(seen, 0.0, -math.inf)[None, None]
            outputs.append(layer(hidden, *args, **kwargs))
        plain = [output[0] if isinstance(output, tuple) else output for output in outputs]
        mean = sum(plain) / len(plain)
        return (mean,) if isinstance(outputs[0], tuple) else mean


@torch.no_grad()
def loss_of(model, input_ids, schedule):
    """Mean next-token loss of a copy of the model whose stack is ``schedule``."""
    model = copy.deepcopy(model)
    view = ModelView(model)
    layers, windows = list(view.layers), view.attention_windows()
    steps = [
        layers[step[0]] if len(step) == 1 else SideBySide([layers[i] for i in step], [windows[i] for i in step])
        for step in schedule
    ]
    view.rebuild(steps, [step[0] for step in schedule])
    return float(model(input_ids=input_ids, labels=input_ids, use_cache=False).loss)


def test_ranges_grow_from_the_centre():
    assert painters.middle(6, 1) == [range(2, 4), range(1, 5)]
    assert painters.middle(7, 1) == [range(2, 5), range(1, 6)]
    assert painters.middle(6, 0)[-1] == range(6)
    assert painters.middle(30, 3, 12)[-1] == range(3, 27)
    assert [len(layers) for layers in painters.middle(30, 1)] == [4, 8, 12, 16, 20, 24, 28]
    assert [len(layers) for layers in painters.middle(30, 1, 14)] == list(range(2, 30, 2))
    assert painters.middle(30, 1, 1) == [range(1, 29)]
    with pytest.raises(UserError, match="--keep-ends=3 leaves fewer than 2 of 7 layers"):
        painters.middle(7, 3)


def test_schedules_by_hand():
    def middle_of(variant):
        (schedule,) = painters.schedules(variant, range(1, 5), 6, **OPTIONS)
        assert (schedule[0], schedule[-1]) == ((0,), (5,))
        return schedule[1:-1]

    assert middle_of("skip") == []
    assert middle_of("repeat") == [(3,)] * 4
    assert middle_of("reverse") == [(4,), (3,), (2,), (1,)]
    assert middle_of("parallel") == [(1, 2, 3, 4)]
    assert middle_of("looped") == [(1, 2, 3, 4)] * 2
    assert middle_of("swap") == [(4,), (2,), (3,), (1,)]
    assert painters.schedules("swap", range(2, 4), 6, **OPTIONS) == [[(0,), (1,), (3,), (2,), (4,), (5,)]]


def test_random_orders_are_those_of_the_seed():
    orders = painters.schedules("random", range(1, 9), 10, loops=1, orders=3, seed=1)
    assert orders == painters.schedules("random", range(1, 9), 10, loops=1, orders=3, seed=1)
    assert orders != painters.schedules("random", range(1, 9), 10, loops=1, orders=3, seed=2)
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(order[1:-1]) == [(layer,) for layer in range(1, 9)]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "gpt_neox"])
def test_losses_are_those_of_whole_models(any_model, input_ids, monkeypatch):
    """Gemma 2's layers have two kinds of attention, which a layer keeps wherever it runs."""
    monkeypatch.setattr(painters, "_SAMPLE_TOKENS", 24)  # two samples, then one
    found = painters.measure(ModelView(any_model), input_ids, **OPTIONS)
    json.dumps(found, allow_nan=False)
    assert found["ranges"] == [[2, 3], [1, 4]]
    assert found["dense"]["loss"] == pytest.approx(loss_of(any_model, input_ids, ONE_BY_ONE), abs=2e-5)
    losses = set()
    for number, layers in enumerate(painters.middle(6, 1)):
        for variant, points in found["variants"].items():
            ways = painters.schedules(variant, layers, 6, **OPTIONS)
            expected = [loss_of(any_model, input_ids, schedule) for schedule in ways]
            assert points[number]["loss"] == pytest.approx(sum(expected) / len(expected), abs=2e-5)
            assert points[number]["perplexity"] == pytest.approx(math.exp(points[number]["loss"]))
            losses.add(round(points[number]["loss"], 6))
    assert len(losses) > 8  # the ways differ


def test_a_schedule_that_changes_nothing_is_the_dense_model_exactly_and_runs_nothing(tiny_llama, input_ids):
    runner = BlockRunner(ModelView(tiny_llama[0]), input_ids)
    assert torch.equal(painters.run_schedule(runner, ONE_BY_ONE), runner.states[-1])
    assert runner.num_block_evaluations == 0
    again = painters.run_schedule(runner, [(0,), (1,), (2, 2), (3,), (4,), (5,)])  # the mean of twice the same
    assert torch.equal(again, runner.states[-1])
    assert runner.num_block_evaluations == 5


def test_skipping_is_the_plan_that_drops_those_layers(tiny_llama, input_ids):
    model, _ = tiny_llama
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = painters.measure(ModelView(model), input_ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plan = Plan(
        model={"name": "random", "fingerprint": "", "num_layers": 6},
        method="by_hand",
        options={},
        calibration={},
        ops=[Drop((2, 3))],
    )
    pruned = apply(plan, model)
    with torch.no_grad():
        expected = float(pruned(input_ids=input_ids, labels=input_ids, use_cache=False).loss)
    assert found["variants"]["skip"][0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_loss_that_is_not_finite_is_null(tiny_llama, input_ids, monkeypatch):
    view = ModelView(tiny_llama[0])
    loss, calls = BlockRunner.loss, []

    def spoilt(self, hidden, ids):
        calls.append(0)
        return loss(self, hidden, ids) if len(calls) == 1 else math.nan

    monkeypatch.setattr(BlockRunner, "loss", spoilt)
    found = painters.measure(view, input_ids)
    assert found["variants"]["skip"][0] == {"loss": None, "perplexity": None}
    assert found["variants"]["random"][1] == {"loss": None, "perplexity": None, "losses": [None] * 3}
    assert "-" in painters.report(found).splitlines()[-1].split()


def test_a_dense_model_that_overflows_is_an_error(tiny_llama, input_ids):
    model, _ = tiny_llama
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the dense model's loss is not finite"):
        painters.measure(ModelView(model), input_ids)


def test_report(tiny_llama, input_ids):
    found = painters.measure(ModelView(tiny_llama[0]), input_ids, loops=5)
    lines = painters.report(found).splitlines()
    assert f"the whole model's {found['dense']['perplexity']:.4g}" in lines[0]
    assert "  looped    parallel, 5 times over" in lines
    assert lines[-3].split() == ["layers", "number", *painters.VARIANTS]
    shown = [f"{points[1]['perplexity']:.4g}" for points in found["variants"].values()]
    assert lines[-1].split() == ["1-4", "4", *shown]
