"""SLM: the search, against a naive loop over whole model copies, and against cases worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import random_source

from slm_pipeline.engine.windows import WindowSimilarity
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.slm import SlidingLayerMerging, _Slide, find_threshold
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.merge_rules import RULES

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def naive_merge(model, low, high, rule):
    """A copy of ``model`` (Llama) whose layers low..high are one layer."""
    merged = copy.deepcopy(model)
    layers = model.model.layers
    block = copy.deepcopy(layers[low])
    for name in PROJECTIONS:
        part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        weights = [getattr(getattr(layers[k], part), name).weight.data for k in range(low, high + 1)]
        if rule in ("official", "keep_highest"):
            value = weights[-1]
        elif rule == "base_difference":
            value = weights[0] + sum(weight - weights[0] for weight in weights[1:])
        elif rule == "mean":
            value = sum(weights) / len(weights)
        else:
            value = weights[0]
        getattr(getattr(block, part), name).weight.data = value.clone()
    if rule == "keep_highest":
        block = copy.deepcopy(layers[high])
    merged.model.layers = torch.nn.ModuleList([*merged.model.layers[:low], block, *merged.model.layers[high + 1 :]])
    merged.config.num_hidden_layers = len(merged.model.layers)
    return merged


@torch.no_grad()
def naive_states(model, input_ids):
    return [model.model(input_ids=row[None], use_cache=False).last_hidden_state.flatten() for row in input_ids]


def naive_search(model, input_ids, threshold, rule, protect_first=1, protect_last=1, max_window=None):
    """The published loop: a whole copy and a whole forward pass for each candidate. Returns windows and similarities."""
    reference = naive_states(model, input_ids)
    current, windows, similarities = model, [], {}
    high = len(model.model.layers) - 1 - protect_last
    low = high - 1
    while low >= protect_first:
        candidate = naive_merge(current, low, high, rule)
        states = naive_states(candidate, input_ids)
        similarity = sum(
            float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in zip(reference, states, strict=True)
        ) / len(states)
        fits = max_window is None or high - low + 1 <= max_window
        if low < high and fits:
            similarities[low, high] = similarity
        if fits and similarity >= threshold:
            low -= 1
        elif low + 1 != high:
            current = naive_merge(current, low + 1, high, rule)
            windows.append((low + 1, high))
            high = low
        else:
            high -= 1
            low -= 1
    if high > low + 1:
        windows.append((low + 1, high))
    return windows, similarities


def problem_for(model, source, input_ids, threshold=None, num_remove=None, refine=5, exhaustive=False):
    view = ModelView(model)
    statistics = None  # SLM does not look at it
    return PruningProblem(
        source, view, input_ids, statistics, num_remove, threshold, refine, exhaustive, {"num_tokens": 36}
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [{}, {"protect_first": 0}, {"protect_first": 3, "protect_last": 2}, {"max_window": 2}, {"protect_last": 0}],
)
def test_search_equals_the_naive_loop(rule, options, input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    outcomes = set()
    for threshold in (0.0, 0.6, 0.9, 0.97, 0.995, 1.0):
        windows, similarities = naive_search(model, input_ids, threshold, rule, **options)
        plan = SlidingLayerMerging(merge_rule=rule, **options).plan(problem_for(model, source, input_ids, threshold))
        assert [op["layers"] for op in plan.ops] == [list(range(low, high + 1)) for low, high in sorted(windows)]
        found = {(step["low"], step["high"]): step["similarity"] for step in plan.scores["steps"]}
        assert found.keys() == similarities.keys()
        assert found == pytest.approx(similarities, abs=1e-5)
        outcomes.add(str(plan.layer_groups))
    assert len(outcomes) > 2  # the thresholds chosen do lead to different plans


def test_model_is_left_alone_and_the_plan_gives_the_measured_similarity(input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = SlidingLayerMerging(merge_rule="mean").plan(problem_for(model, source, input_ids, 0.9))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    reference = naive_states(model, input_ids)
    pruned = naive_states(apply(plan, copy.deepcopy(model)), input_ids)
    measured = sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(reference, pruned, strict=True)) / 3
    last_accepted = [step for step in plan.scores["steps"] if step["accepted"]][-1]
    assert measured == pytest.approx(last_accepted["similarity"], abs=1e-5)


def stub(committed, window):
    """1 - 0.02 for each layer removed."""
    return 1 - 0.02 * (sum(high - low for low, high in committed) + window[1] - window[0])


@pytest.mark.parametrize(
    ("threshold", "window", "layers_left"), [(0.895, (25, 30), 27), (0.795, (20, 30), 22), (0.595, (10, 30), 12)]
)
def test_hand_worked_windows(threshold, window, layers_left):
    search = _Slide(stub, 32, 1, 1, None)(threshold)
    assert search.windows == [window]
    assert 32 - search.num_removed == layers_left


def test_a_window_still_open_at_the_end_is_merged():
    """The published loop returns the dense model here."""
    assert _Slide(stub, 32, 1, 1, None)(0.3).windows == [(1, 30)]


def test_auto_lands_on_the_target_with_the_highest_threshold_tried():
    slide = _Slide(stub, 32, 1, 1, None)
    for target in (1, 5, 12, 20):
        searches, exact = find_threshold(slide, target, refine=5, exhaustive=False)
        assert not exact
        reached = {search.threshold: search.num_removed for search in searches}
        # 1 - 0.02 n is on the grid: T = 1 - 0.02 n still admits n removed layers, T + 0.01 does not.
        assert max(t for t, removed in reached.items() if removed == target) == pytest.approx(
            1 - 0.02 * target, abs=0.0101
        )


def test_exhaustive_finds_the_highest_threshold():
    slide = _Slide(stub, 32, 1, 1, None)
    searches, exact = find_threshold(slide, 7, refine=0, exhaustive=True)
    assert exact
    assert [search.num_removed == 7 for search in searches] == [False] * (len(searches) - 1) + [True]
    best = searches[-1].threshold
    assert slide(best).num_removed >= 7 > slide(best + 0.01).num_removed


def test_auto_says_what_can_be_reached():
    def never(committed, window):
        return -0.5 if window[1] - window[0] > 2 or committed else 0.5

    with pytest.raises(UserError, match=r"no threshold removes 5 of 12 layers: the nearest removes 2 .*num_layers=10"):
        find_threshold(_Slide(never, 12, 1, 1, None), 5, refine=5, exhaustive=False)


def test_no_window_is_evaluated_twice(input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    similarity = WindowSimilarity(ModelView(model), input_ids, "official", "final_hidden")
    slide = _Slide(similarity, 8, 1, 1, None)
    slide(0.9)
    once = similarity.num_block_evaluations
    slide(0.9)
    assert similarity.num_block_evaluations == once > 0
    assert once == sum(1 + 7 - high - sum(h - l for l, h in committed) for committed, (low, high) in similarity.known)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["last_token", "per_token", "logits_kl"])
def test_other_similarities(kind, any_model, input_ids):
    from slm_pipeline.surgery.plan import Plan, groups_of_windows

    view = ModelView(any_model)
    found = WindowSimilarity(view, input_ids, "official", kind)((), (2, 4))
    dense = any_model(input_ids=input_ids, output_hidden_states=True)
    plan = Plan(
        {"name": "x", "num_layers": 6},
        "x",
        {},
        {},
        groups_of_windows([(2, 4)], 6),
        [{"op": "merge", "layers": [2, 3, 4], "rule": "official"}],
    )
    pruned = apply(plan, copy.deepcopy(any_model))(input_ids=input_ids, output_hidden_states=True)
    a, b = dense.hidden_states[-1], pruned.hidden_states[-1]
    if kind == "last_token":
        expected = torch.stack(
            [torch.dot(x, y) / (x.norm() * y.norm()) for x, y in zip(a[:, -1], b[:, -1], strict=True)]
        ).mean()
    elif kind == "per_token":
        expected = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    else:
        p, q = dense.logits.softmax(-1), pruned.logits.softmax(-1)
        expected = torch.exp(-(p * (p / q).log()).sum(-1).mean())
    assert found == pytest.approx(float(expected), abs=1e-5)


def test_infinite_states_are_an_error(input_ids):
    source = random_source()
    model, _ = load_dense(source)
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="similarity after merging layers 3..4 is nan"):
        SlidingLayerMerging().plan(problem_for(model, source, input_ids, 0.5))


@pytest.mark.parametrize(
    "options", [{"merge_rule": "average"}, {"similarity": "cka"}, {"max_window": 1}, {"protect_last": -1}]
)
def test_bad_options_name_themselves(options):
    (option,) = options
    with pytest.raises(UserError, match=f"method.{option}="):
        SlidingLayerMerging(**options)
