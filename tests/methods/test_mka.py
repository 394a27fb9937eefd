"""MKA against a plain version with loops over points, and its merges worked out by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import random_source
from problems import problem_of
from transformers import AutoModelForCausalLM

from slm_pipeline.errors import UserError
from slm_pipeline.methods.mka import Mka
from slm_pipeline.methods.reverse import ReverseOrder
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.plan import Plan


def dense(architecture="llama", num_layers=8):
    """A random model whose layers do change the residual stream."""
    source = random_source(architecture, num_layers=num_layers)
    model, tokenizer = load_dense(source)
    with torch.no_grad():
        for layer in ModelView(model).layers:
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
    return source, model, tokenizer


def digamma(number):
    return -0.5772156649015329 + sum(1 / i for i in range(1, number))


def naive_embedding(states):
    """Rank coordinates of [n, d] points by the eigenvectors of the random walk itself."""
    distance = np.array([[np.linalg.norm(a - b) for b in states] for a in states])
    kernel = np.exp(-np.sqrt(distance / np.median(distance[~np.eye(len(states), dtype=bool)])))
    density = kernel.sum(axis=1)
    kernel = kernel / np.sqrt(density[:, None] * density[None])
    values, vectors = np.linalg.eig(kernel / kernel.sum(axis=1, keepdims=True))
    leading = np.argsort(-values.real)[1:3]
    return np.stack([np.argsort(np.argsort(vectors.real[:, index])) + 1 for index in leading], axis=1)


def naive_similarity(first, second, neighbors):
    """I / sqrt(H H) of two [n, 2] embeddings, point by point."""
    n = len(first)

    def reach(points, i):
        return sorted(max(abs(points[i] - points[j])) for j in range(n) if j != i)

    both = np.concatenate([first, second], axis=1)
    information = digamma(n) + digamma(neighbors)
    entropies = []
    for points in (first, second):
        for i in range(n):
            radius = reach(both, i)[neighbors - 1]
            information -= digamma(sum(distance < radius for distance in reach(points, i)) + 1) / n
        k = min(50, n - 1)
        radii = [reach(points, i)[k - 1] for i in range(n)]
        entropies.append(digamma(n) - digamma(k) + 2 * sum(math.log(2 * radius) for radius in radii) / n)
    return max(information, 0) / math.sqrt(entropies[0] * entropies[1])


def naive_mka(similarity, num_remove, last=False):
    """Groups and shares when every step looks at all adjacent pairs of the current stack."""
    groups, steps = [[layer] for layer in range(len(similarity))], []
    for _ in range(num_remove):
        pairs = range(len(groups) - 1)
        position = max(pairs) if last else max(pairs, key=lambda i: similarity[groups[i][-1], groups[i + 1][0]])
        low, high = ([similarity[layer].mean() for layer in group] for group in groups[position : position + 2])
        low, high = sum(low) / len(low), sum(high) / len(high)
        steps.append((groups[position] + groups[position + 1], 1 / (1 + math.exp(-low / (low + high)))))
        groups[position : position + 2] = [groups[position] + groups[position + 1]]
    return groups, steps


@pytest.mark.parametrize("pairs", ["similar", "last"])
def test_equals_the_plain_version(pairs, input_ids):
    source, model, _ = dense()
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: states.append(output.detach()))
    model(input_ids=input_ids)
    points = [(2 * i + 1) * 36 // 60 for i in range(30)]
    embeddings = [naive_embedding(state.flatten(0, 1)[points].double().numpy()) for state in states]
    similarity = np.array([[naive_similarity(a, b, 4) for b in embeddings] for a in embeddings])
    groups, steps = naive_mka(similarity, 4, last=pairs == "last")

    problem = problem_of(model, source, input_ids, num_remove=4)
    plan = Mka(pairs=pairs, num_points=30, num_neighbors=4).plan(problem)
    assert plan.scores["similarity"] == pytest.approx([similarity[i, i + 1] for i in range(7)], rel=1e-9)
    assert plan.scores["mean_similarity"] == pytest.approx(similarity.mean(axis=1).tolist(), rel=1e-9)
    assert plan.layer_groups == groups
    assert [merge["layers"] for merge in plan.scores["merges"]] == [layers for layers, _ in steps]
    assert [merge["shares"][0] for merge in plan.scores["merges"]] == pytest.approx([share for _, share in steps])
    for op, merge in zip(plan.ops, plan.scores["merges"], strict=True):
        assert ([*op.layers], [*op.shares], op.rule) == (merge["layers"], merge["shares"], "weighted")
        assert sum(op.shares) == pytest.approx(1)


def test_last_takes_the_pairs_from_the_top(input_ids):
    source, model, _ = dense()
    plan = Mka(pairs="last").plan(problem_of(model, source, input_ids, num_remove=3))
    assert [op.layers for op in plan.ops] == [(6, 7), (5, 6, 7), (4, 5, 6, 7)]
    assert plan.layer_groups == [[0], [1], [2], [3], [4, 5, 6, 7]]


def test_a_layer_that_does_nothing_is_merged_first_with_the_one_below(input_ids):
    source, model, _ = dense()
    view = ModelView(model)
    for sublayer in ("attention", "mlp"):
        view.silence(3, sublayer)
    plan = Mka().plan(problem_of(model, source, input_ids, num_remove=1))
    assert plan.layer_groups == [[0], [1], [2, 3], [4], [5], [6], [7]]
    others = [value for layer, value in enumerate(plan.scores["similarity"]) if layer != 2]
    assert plan.scores["similarity"][2] > max(others)


def test_official_is_reverse_order(input_ids):
    source, model, _ = dense()
    problem = problem_of(model, source, input_ids[:, :1], num_remove=3)  # too little text to look at
    for options in ({}, {"protect_last": 2}):
        plan = Mka(official=True, **options).plan(problem)
        assert plan.content() == ReverseOrder(**options).plan(problem).content()
        assert [op.name for op in plan.ops] == ["drop"]


@pytest.mark.parametrize("pairs", ["similar", "last"])
def test_protected_layers_stay_and_the_rest_may_become_one(pairs, input_ids):
    source, model, _ = dense()
    method = Mka(pairs=pairs, protect_first=1, protect_last=2)
    assert method.num_protected == 3
    plan = method.plan(problem_of(model, source, input_ids, num_remove=4))
    assert plan.layer_groups == [[0], [1, 2, 3, 4, 5], [6], [7]]


def test_sharpness(input_ids):
    source, model, _ = dense()
    problem = problem_of(model, source, input_ids, num_remove=2)
    plans = {beta: Mka(sharpness=beta).plan(problem) for beta in (0.0, 1.0, 6.0)}
    assert [op.shares for op in plans[0.0].ops] == [(0.5, 0.5), (0.5, 0.5)]
    for mild, sharp in zip(plans[1.0].ops, plans[6.0].ops, strict=True):
        assert 0.5 < mild.shares[0] < 0.74 < sharp.shares[0]


def test_merged_parameters_are_the_weighted_sums(any_model, input_ids):
    """Layers 2 and 3, then 1 with both: every parameter, norms and biases too."""
    source = random_source(any_model.config.model_type)
    problem = problem_of(any_model, source, input_ids, num_remove=2)
    plan = Mka(pairs="last", protect_last=2, protect_first=1).plan(problem)
    assert [op.layers for op in plan.ops] == [(2, 3), (1, 2, 3)]
    before = [dict(layer.named_parameters()) for layer in copy.deepcopy(problem.view.layers)]
    pruned = ModelView(apply(plan, any_model))
    inner, outer = (op.shares for op in plan.ops)
    for name, found in pruned.layers[1].named_parameters():
        upper = inner[0] * before[2][name] + inner[1] * before[3][name]
        torch.testing.assert_close(found, outer[0] * before[1][name] + outer[1] * upper)
    for position, layer in ((0, 0), (2, 4), (3, 5)):
        for name, found in pruned.layers[position].named_parameters():
            assert torch.equal(found, before[layer][name])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "opt"])
def test_plan_and_checkpoint_are_kept_and_give_the_same_model(architecture, input_ids, tmp_path):
    source, model, tokenizer = dense(architecture, num_layers=6)
    plan = Mka().plan(problem_of(model, source, input_ids, num_remove=3))
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan
    assert plan.num_layers == 3
    assert sum(plan.layer_groups, []) == list(range(6))

    expected = apply(plan, copy.deepcopy(model))(input_ids=input_ids).logits
    pruned = apply(again, model)
    checkpoint.save(pruned, tokenizer, tmp_path / "model", card="# card", config=source.config)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert reloaded.config.num_hidden_layers == 3
    torch.testing.assert_close(reloaded(input_ids=input_ids).logits, expected, rtol=0, atol=1e-5)


def test_states_that_are_not_finite(input_ids):
    source, model, _ = dense()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(UserError, match="the states after layer 4 are not finite; try model.dtype=float32"):
        Mka().plan(problem_of(model, source, input_ids, num_remove=2))


def test_too_little_text(input_ids):
    source, model, _ = dense()
    with pytest.raises(UserError, match="method.num_neighbors=5 needs at least 7 calibration tokens; there are 6"):
        Mka().plan(problem_of(model, source, input_ids[:1, :6], num_remove=2))


@pytest.mark.parametrize(
    "options",
    [{"pairs": "first"}, {"sharpness": -1}, {"num_points": 6}, {"num_neighbors": 0}, {"protect_last": -1}],
)
def test_bad_options(options):
    (option,) = options
    with pytest.raises(UserError, match=f"method.{option}="):
        Mka(**options)
