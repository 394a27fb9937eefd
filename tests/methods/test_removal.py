"""The methods that remove layers, each against the plain loop that its paper describes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import random_source
from problems import problem_of

from slm_pipeline.engine import blocks, walk
from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.angular import AngularDistance
from slm_pipeline.methods.reverse import ReverseOrder
from slm_pipeline.methods.shortened import ShortenedMagnitude, ShortenedPerplexity, ShortenedTaylor
from slm_pipeline.methods.shortgpt import ShortGPT
from slm_pipeline.methods.sleb import Sleb
from slm_pipeline.methods.streamline import Streamline
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply


@pytest.fixture
def problem(input_ids):
    return problem_for("llama", input_ids)


def problem_for(architecture, input_ids, num_remove=3, num_layers=8):
    source = random_source(architecture, num_layers=num_layers)
    model, _ = load_dense(source)
    statistics = collect(ModelView(model), input_ids)
    return problem_of(model, source, input_ids, num_remove=num_remove, statistics=statistics)


def without(model, layers):
    """A copy of a model that lacks some layers, made with nothing of the engine."""
    view = ModelView(copy.deepcopy(model))
    kept = [layer for layer in range(view.num_layers) if layer not in layers]
    view.rebuild([view.layers[layer] for layer in kept], kept)
    return view.model


@torch.no_grad()
def naive_loss(model, input_ids):
    return sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in input_ids) / len(input_ids)


def naive_sleb(model, input_ids, num_remove, protect_first=1, protect_last=1):
    removed, losses = [], []
    for _ in range(num_remove):
        candidates = [i for i in range(protect_first, len(model.model.layers) - protect_last) if i not in removed]
        found = {candidate: naive_loss(without(model, [*removed, candidate]), input_ids) for candidate in candidates}
        removed.append(min(found, key=found.get))
        losses.append(found)
    return removed, losses


@pytest.mark.parametrize("batch_tokens", [8192, 24, 1])
@pytest.mark.parametrize("strict", [False, True])
def test_sleb_equals_the_plain_loop(problem, input_ids, strict, batch_tokens, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_TOKENS", batch_tokens)
    monkeypatch.setattr(walk, "_TEXT_TOKENS", batch_tokens)
    removed, losses = naive_sleb(problem.view.model, input_ids, 3)
    plan = Sleb(strict=strict).plan(problem)
    assert plan.scores["order"] == removed
    assert plan.dropped == sorted(removed)
    for found, expected in zip(plan.scores["rounds"], losses, strict=True):
        complete = {int(layer): loss for layer, loss in found["losses"].items() if loss is not None}
        assert complete[found["removed"]] == pytest.approx(min(expected.values()), abs=1e-5)
        assert complete == pytest.approx({layer: expected[layer] for layer in complete}, abs=1e-5)
        given_up = expected.keys() - complete.keys()
        assert all(expected[layer] > min(expected.values()) for layer in given_up)


def test_sleb_runs_fewer_blocks_than_the_plain_loop(problem):
    plan = Sleb().plan(problem)
    plain = sum(len(range(1, 7 - number)) * (8 - number - 1) for number in range(3))
    assert plan.scores["num_block_evaluations"] < 0.7 * plain


def test_a_loss_that_is_not_finite_never_wins(problem, input_ids):
    problem = problem_of(problem.view.model, problem.source, input_ids, num_remove=1)
    with torch.no_grad():
        problem.view.layers[2].mlp.down_proj.weight.fill_(math.nan)
    plan = Sleb().plan(problem)
    assert plan.dropped == [2]  # only without layer 2 is there a loss at all
    with torch.no_grad():
        problem.view.layers[5].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(UserError, match="loss is not finite whatever is removed"):
        Sleb().plan(problem)


def test_perplexity_ranks_single_removals(problem, input_ids):
    plan = ShortenedPerplexity(protect_first=2, protect_last=1).plan(problem)
    expected = {layer: naive_loss(without(problem.view.model, [layer]), input_ids) for layer in range(2, 7)}
    assert plan.scores["order"] == sorted(expected, key=expected.get)[:3]
    assert plan.scores["losses"][:2] == [None, None] == [plan.scores["losses"][0], plan.scores["losses"][7]]
    assert plan.scores["losses"][2:7] == pytest.approx(list(expected.values()), abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_taylor_is_the_sum_of_weight_times_gradient(architecture, input_ids):
    problem = problem_for(architecture, input_ids)
    plan = ShortenedTaylor(protect_first=0, protect_last=0).plan(problem)
    model = problem.view.model
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    expected = [
        sum(float((p * p.grad).abs().sum()) for name, p in layer.named_parameters() if not name.endswith("bias"))
        for layer in problem.view.layers
    ]
    assert plan.scores["salience"] == pytest.approx(expected, rel=1e-4)
    assert plan.scores["order"] == sorted(range(8), key=expected.__getitem__)[:3]


def test_magnitude(problem):
    with torch.no_grad():
        for index, layer in enumerate(problem.view.layers):
            for parameter in layer.parameters():
                parameter.fill_(-(index + 1.0))
        problem.view.layers[6].mlp.up_proj.weight.zero_()
    per_layer = problem.view.block_parameters(0)
    plan = ShortenedMagnitude(protect_first=1, protect_last=0).plan(problem)
    assert plan.scores["magnitude"][:3] == [per_layer, 2 * per_layer, 3 * per_layer]
    assert plan.scores["order"] == [1, 2, 3]
    squared = ShortenedMagnitude(power=2).plan(problem)
    assert squared.scores["magnitude"][2] == 9 * per_layer


def test_block_influence_is_taken_before_the_final_norm(problem, input_ids):
    states = []
    for layer in problem.view.layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        layer.register_forward_hook(lambda _, __, output: states.append(output))
    problem.view.model(input_ids=input_ids)
    expected = [float((1 - torch.cosine_similarity(states[2 * i], states[2 * i + 1], dim=-1)).mean()) for i in range(8)]
    plan = ShortGPT().plan(problem)
    assert plan.scores["block_influence"] == pytest.approx(expected, abs=1e-5)
    assert plan.scores["order"] == sorted(range(8), key=expected.__getitem__)[:3]
    assert plan.scores["order"] != ShortGPT(protect_first=plan.scores["order"][0] + 1).plan(problem).scores["order"]


@torch.no_grad()
def test_contiguous_blocks(problem, input_ids):
    hidden = problem.view.model(input_ids=input_ids, output_hidden_states=True).hidden_states  # the last one is normed
    last = [state[:, -1] for state in hidden]
    angles = {
        s: float((torch.cosine_similarity(last[s], last[s + 3], dim=-1).arccos() / math.pi).mean()) for s in range(1, 5)
    }
    plan = AngularDistance(protect_last=1).plan(problem)
    assert {s: d for s, d in enumerate(plan.scores["distances"]) if d is not None} == pytest.approx(angles, abs=1e-3)
    start = min(angles, key=angles.get)
    assert plan.dropped == [start, start + 1, start + 2]

    cosines = {s: float(torch.cosine_similarity(hidden[s], hidden[s + 3], dim=-1).mean()) for s in range(5)}
    plan = Streamline(protect_last=1).plan(problem)
    start = max(cosines, key=cosines.get)
    assert plan.dropped == [start, start + 1, start + 2]
    assert 1 - plan.scores["distances"][start] == pytest.approx(cosines[start], abs=1e-5)

    cosines = {s: float(torch.cosine_similarity(hidden[s], hidden[s + 4], dim=-1).mean()) for s in range(4)}
    plan = Streamline(protect_last=1, replacement=True).plan(problem)
    start = max(cosines, key=cosines.get)
    assert plan.dropped == [start + 1, start + 2, start + 3]  # the block's first layer is what the trained one replaces
    assert 1 - plan.scores["distances"][start] == pytest.approx(cosines[start], abs=1e-5)


def test_reverse(problem):
    assert ReverseOrder().plan(problem).scores["order"] == [7, 6, 5]
    assert ReverseOrder(protect_last=1).plan(problem).scores["order"] == [6, 5, 4]


@torch.no_grad()
@pytest.mark.parametrize("method", [ReverseOrder(protect_last=1), Sleb(), AngularDistance()])
def test_plans_are_applied(method, input_ids):
    problem = problem_for("gemma3_text", input_ids)
    plan = method.plan(problem)
    expected = without(problem.view.model, plan.dropped)(input_ids=input_ids).logits
    found = apply(plan, problem.view.model)(input_ids=input_ids).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", [ReverseOrder, ShortGPT, AngularDistance, Streamline, Sleb, ShortenedMagnitude])
def test_protected_layers_must_not_be_negative(method):
    with pytest.raises(UserError, match="method.protect_first=-1 must be at least 0"):
        method(protect_first=-1)


@pytest.mark.parametrize("num_likely", [20, 5000])
def test_a_bound_on_the_loss_changes_no_decision(num_likely, monkeypatch):
    """Where the head is costly most candidates are given up by a part of the vocabulary."""
    monkeypatch.setattr(blocks, "_NUM_LIKELY", num_likely)
    source = random_source("llama", num_layers=8, vocab_size=3000)
    model, _ = load_dense(source)
    with torch.no_grad():  # sharp distributions and layers of different weight
        model.lm_head.weight.mul_(30)
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(1 + 2 * index)
    input_ids = torch.randint(0, 3000, (9, 12), generator=torch.Generator().manual_seed(5))
    problem = problem_of(model, source, input_ids, num_remove=3)
    removed, losses = naive_sleb(model, input_ids, 3)
    bounded = []
    least_loss = blocks.BlockRunner.least_loss
    monkeypatch.setattr(blocks.BlockRunner, "least_loss", lambda *a: bounded.append(1) or least_loss(*a))
    plan = Sleb().plan(problem)
    assert plan.scores["order"] == removed
    num_given_up = 0
    for found, expected in zip(plan.scores["rounds"], losses, strict=True):
        assert found["loss"] == pytest.approx(min(expected.values()), rel=1e-5)
        num_given_up += sum(loss is None for loss in found["losses"].values())
        complete = {int(layer): loss for layer, loss in found["losses"].items() if loss is not None}
        assert complete == pytest.approx({layer: expected[layer] for layer in complete}, rel=1e-5)
    assert num_given_up > 0 or num_likely < 3000  # with all of the vocabulary the bound is the loss itself
    assert sum(bounded) > 0  # the bound was asked


def test_a_shortlist_measures_no_more_than_it_says(problem, input_ids, monkeypatch):
    monkeypatch.setattr(walk, "_TEXT_TOKENS", 12)  # one sample after the other
    plan = Sleb(shortlist=2).plan(problem)
    assert all(sum(loss is not None for loss in found["losses"].values()) <= 2 for found in plan.scores["rounds"])
    first = {layer: naive_loss(without(problem.view.model, [layer]), input_ids[:1]) for layer in range(1, 7)}
    best_two = sorted(first, key=first.get)[:2]
    everywhere = {layer: naive_loss(without(problem.view.model, [layer]), input_ids) for layer in best_two}
    assert plan.scores["rounds"][0]["removed"] == min(everywhere, key=everywhere.get)
    assert Sleb(shortlist=100).plan(problem).scores["order"] == Sleb().plan(problem).scores["order"]
    with pytest.raises(UserError, match="shortlist=0 must be at least 1"):
        Sleb(shortlist=0)
