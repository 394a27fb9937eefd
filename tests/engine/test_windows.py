"""Similarities of merged stacks against whole pruned models, for every architecture."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import random_source

from slm_pipeline.engine import windows
from slm_pipeline.engine.window_memo import WindowMemo
from slm_pipeline.engine.windows import SIMILARITIES, StackSimilarity, originals
from slm_pipeline.errors import UserError
from slm_pipeline.methods.slm import SlidingWindow
from slm_pipeline.methods.threshold import Search
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

# Upper ends of a stack of six layers, and the merges that lead to them, lowest first in each.
STACKS = [
    (((1, 2), 3, 4, 5), [(1, 2)]),
    (((2, 3, 4), 5), [(2, 4)]),
    ((0, (1, (2, 3)), (4, 5)), [(4, 5), (2, 3), (1, 3)]),
]


def cosine(a, b):
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def naive(kind, dense, pruned):
    """Mean over samples of one whole model's likeness to another, from their outputs."""
    values = []
    for a, b, logits, others in zip(
        dense.hidden_states[-1], pruned.hidden_states[-1], dense.logits, pruned.logits, strict=True
    ):
        if kind == "final_hidden":
            values.append(cosine(a.flatten(), b.flatten()))
        elif kind == "last_token":
            values.append(cosine(a[-1], b[-1]))
        elif kind == "per_token":
            values.append(sum(cosine(x, y) for x, y in zip(a, b, strict=True)) / len(a))
        else:
            p, q = logits.double().softmax(-1), others.double().softmax(-1)
            values.append(float((p * (p / q).log()).sum(-1).mean()))
    mean = sum(values) / len(values)
    return math.exp(-mean) if kind == "logits_kl" else mean


@torch.no_grad()
@pytest.mark.parametrize("kind", SIMILARITIES)
def test_a_stack_is_as_similar_as_the_whole_model_that_it_stands_for(kind, any_model, input_ids, monkeypatch):
    monkeypatch.setattr(windows, "MAX_BATCH_TOKENS", 24)  # two samples, then one
    similarity = StackSimilarity(ModelView(any_model), input_ids, "mean", kind)
    dense = any_model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    found = []
    for stack, merges in STACKS:
        ops = [Merge(tuple(range(low, high + 1)), "mean") for low, high in merges]
        plan = Plan({"name": "x", "num_layers": 6}, "x", {}, {}, ops)
        pruned = apply(plan, copy.deepcopy(any_model))
        output = pruned(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        found.append(similarity(stack))
        assert found[-1] == pytest.approx(naive(kind, dense, output), abs=1e-5)
        assert found[-1] < 0.9999
    assert len({round(value, 4) for value in found}) == 3
    assert similarity(tuple(range(6))) == pytest.approx(1, abs=1e-6)
    assert similarity.num_block_evaluations == 2 * (4 + 2 + 3 + 6)  # of either batch


def test_a_group_in_words():
    assert originals(3) == [3]
    assert originals((1, (2, 3), 4)) == [1, 2, 3, 4]


def test_no_window_is_evaluated_twice(input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    similarity = StackSimilarity(ModelView(model), input_ids, "official", "final_hidden")
    SlidingWindow(similarity, 8)(Search(0.9), None)
    once = similarity.num_block_evaluations
    SlidingWindow(similarity, 8)(Search(0.9), None)
    assert similarity.num_block_evaluations == once == sum(len(stack) for stack in similarity.asked)
    assert all(sum(map(originals, stack), []) == list(range(originals(stack[0])[0], 8)) for stack in similarity.asked)


def test_what_a_memo_knows_is_not_run(tiny_llama, input_ids):
    memo = WindowMemo({((1, 2), 3, 4, 5): 0.25})
    similarity = StackSimilarity(ModelView(tiny_llama[0]), input_ids, "official", "final_hidden", memo)
    assert similarity(((1, 2), 3, 4, 5)) == 0.25
    assert (similarity.num_evaluated, similarity.num_block_evaluations) == (0, 0)
    value = similarity(((2, 3), 4, 5))
    assert memo[(2, 3), 4, 5] == value != 0.25
    assert (similarity.num_evaluated, similarity.num_block_evaluations) == (1, 3)
    assert similarity.asked == {((1, 2), 3, 4, 5): 0.25, ((2, 3), 4, 5): value}


def test_a_similarity_that_is_not_finite_names_the_merges(tiny_llama, input_ids):
    model, _ = tiny_llama
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.weight.fill_(math.nan)
    similarity = StackSimilarity(ModelView(model), input_ids, "mean", "per_token")
    with pytest.raises(UserError, match=r"after merging layers 0..1, 3..4 is nan: .* try model.dtype=bfloat16"):
        similarity(((0, 1), 2, (3, 4), 5))
