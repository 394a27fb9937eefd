"""OBS and Nyström against plain loops, on the inputs that each layer really gets."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import random_source
from problems import problem_of

from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.nystrom import Nystrom
from slm_pipeline.methods.obs import OptimalBrainSurgeon
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply

SHAPES = [("llama", 8), ("llama", 4), ("phi3", 4), ("opt", 8)]  # architecture, key-value groups of 8 query heads
RIDGE = 0.05


@pytest.fixture
def make_problem():
    """A function: the problem of a 3-layer model whose weights differ more than random ones do."""

    def make(architecture="llama", num_kv_heads=4, num_samples=12, **asked):
        source = random_source(architecture, num_layers=3, num_heads=8, num_kv_heads=num_kv_heads)
        model, _ = load_dense(source)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        input_ids = torch.randint(0, 256, (num_samples, 16), generator=torch.Generator().manual_seed(1))
        asked = asked or {"num_remove": 1}
        return problem_of(model, source, input_ids, statistics=collect(ModelView(model), input_ids), **asked)

    return make


@torch.no_grad()
def inputs_of(model, layer, part, input_ids):
    """[tokens, n] float64 of a sublayer's last projection, in the model as it is."""
    view, seen = ModelView(model), []
    output = view.attention_output(layer) if part == "attention" else view.mlp_output(layer)
    hook = output.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    model(input_ids=input_ids, use_cache=False)
    hook.remove()
    return seen[0]


def removed_by_obs(weight, hessian, size, number):
    """The blocks of ``size`` columns that go, one by one, each time with everything computed anew."""
    gone = []
    for _ in range(number):
        costs = {}
        for block in set(range(len(hessian) // size)) - set(gone):
            columns = torch.tensor([c for c in range(len(hessian)) if c // size not in (*gone, block)])
            cross = weight @ hessian[:, columns]
            costs[block] = -float((cross @ torch.linalg.inv(hessian[columns][:, columns]) * cross).sum())
        gone.append(min(costs, key=costs.get))
    return gone


@torch.no_grad()
def naive(problem, parts, numbers, choose, corrected=True):
    """Prune a copy of the model in place, by zeros, and say what stays: (layer, part) -> indices."""
    model, dense = copy.deepcopy(problem.view.model), problem.view.model
    view, stay = ModelView(model), {}
    for layer in range(view.num_layers):
        for part in parts:
            number = numbers[part]
            output = view.attention_output(layer) if part == "attention" else view.mlp_output(layer)
            weight = output.weight.double()
            inputs = inputs_of(model if corrected else dense, layer, part, problem.input_ids)
            gram = inputs.T @ inputs
            hessian = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
            size = len(gram) // (view.num_kv_heads if part == "attention" else 48)
            gone = choose(weight, gram, hessian, size, number)
            kept = torch.tensor([column for column in range(len(gram)) if column // size not in gone])
            new = weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
            output.weight.zero_()
            output.weight[:, kept] = new.float()
            stay[layer, part] = sorted(set(range(len(gram) // size)) - set(gone))
    return model, stay


def kept_of(plan):
    return {
        (op.layers[0], part): plan.tensors[f"{op.tensors}.{unit}"].tolist()
        for op in plan.ops
        if op.name == "resize"
        for part, unit in (("attention", "heads"), ("mlp", "neurons"))
        if getattr(op, unit) is not None
    }


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(("architecture", "num_kv_heads"), SHAPES)
def test_obs_is_the_plain_loop(architecture, num_kv_heads, corrected, make_problem):
    problem = make_problem(architecture, num_kv_heads)
    method = OptimalBrainSurgeon(ridge=RIDGE, at_a_time=1, export="custom", massive=None, corrected_inputs=corrected)
    plan = method.plan(problem)
    heads, neurons = plan.scores["widths"][0]
    assert heads < num_kv_heads
    numbers = {"attention": num_kv_heads - heads, "mlp": 48 - neurons}
    expected, stay = naive(
        problem,
        ("attention", "mlp"),
        numbers,
        lambda weight, gram, hessian, size, number: removed_by_obs(weight, hessian, size, number),
        corrected,
    )
    assert kept_of(plan) == stay
    found = apply(plan, copy.deepcopy(problem.view.model))
    logits = [model(input_ids=problem.input_ids, use_cache=False).logits for model in (found, expected)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("architecture", "num_kv_heads"), SHAPES)
def test_nystrom_is_the_plain_loop(architecture, num_kv_heads, make_problem):
    problem = make_problem(architecture, num_kv_heads)
    plan = Nystrom(ridge=RIDGE, massive=None).plan(problem)
    heads, neurons = plan.scores["widths"][0]
    assert heads == num_kv_heads

    def by_leverage(weight, gram, hessian, size, number):
        scores = (gram @ torch.linalg.inv(hessian)).diagonal().tolist()
        return sorted(range(48), key=scores.__getitem__)[:number]

    expected, stay = naive(problem, ("mlp",), {"mlp": 48 - neurons}, by_leverage)
    assert kept_of(plan) == stay
    found = apply(plan, copy.deepcopy(problem.view.model))
    assert type(found) is type(expected)
    logits = [model(input_ids=problem.input_ids, use_cache=False).logits for model in (found, expected)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_new_weights_beat_the_same_units_without(make_problem):
    problem = make_problem(num_samples=24)
    plan = OptimalBrainSurgeon(export="custom").plan(problem)
    kept_only = dataclasses.replace(
        plan,
        ops=[op for op in plan.ops if op.name == "resize"],
        tensors={name: value for name, value in plan.tensors.items() if name.startswith("resize")},
    )
    dense = problem.view.model(input_ids=problem.input_ids, use_cache=False).logits
    errors = []
    for candidate in (plan, kept_only):
        pruned = apply(candidate, copy.deepcopy(problem.view.model))
        errors.append(float((pruned(input_ids=problem.input_ids, use_cache=False).logits - dense).square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_layers_that_lose_nothing_get_no_weights(make_problem):
    plan = OptimalBrainSurgeon(export="custom", protect_first=1, protect_last=1).plan(make_problem(num_parameters=500))
    assert [(op.name, op.layers) for op in plan.ops] == [("resize", (1,)), ("replace", (1,))]


def test_neurons_that_make_massive_activations_stay(make_problem):
    problem = make_problem()
    problem.statistics.mlp_variance[1][7] = 1e9
    with torch.no_grad():  # it writes nothing of what the calibration text shows: both would remove it
        problem.view.layers[1].mlp.gate_proj.weight[7] = 0
    for make in (OptimalBrainSurgeon, Nystrom):
        for massive, stays in ((40.0, True), (None, False)):
            plan = make(massive=massive).plan(problem)
            assert plan.scores["massive"] == ([[1, 7]] if stays else [])
            assert (7 in kept_of(plan)[1, "mlp"]) == stays


def test_nystrom_has_no_attention():
    with pytest.raises(UserError, match="method.sublayers=both: nystrom narrows feed-forward networks alone"):
        Nystrom(sublayers="both")
    with pytest.raises(UserError, match="method.allocation='global' is not one of uniform, sensitivity"):
        OptimalBrainSurgeon(allocation="global")
