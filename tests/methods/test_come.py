"""CoMe against a plain loop that copies models and runs all of them again at each step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import HEAD_DIM, context_of, peculiar_model, random_source
from problems import problem_of

from slm_pipeline.errors import UserError
from slm_pipeline.methods.come import Come, ComePosterior, raise_largest, shares, split
from slm_pipeline.models.loading import load_dense
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.plan import Plan


@torch.no_grad()
def look(model, input_ids):
    """States around each layer of a Llama, and inputs of o_proj and down_proj, of all tokens."""
    depth = len(model.model.layers)
    states, attention, mlp = [], [[] for _ in range(depth)], [[] for _ in range(depth)]
    hooks = []
    for index, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, 1))))
        hooks.append(
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=index: attention[i].append(args[0]))
        )
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=index: mlp[i].append(args[0])))
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, 1))))
    model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states, [x[0].flatten(0, 1) for x in attention], [x[0].flatten(0, 1) for x in mlp]


@torch.no_grad()
def naive_merge_pair(model, lower, shares_, attention, mlp, *, official_gqa=False, fold_norm=False):
    """Merge layers lower, lower + 1 of a Llama with 8 query heads on 4 groups, row by row."""
    merged = copy.deepcopy(model)
    pair = copy.deepcopy([model.model.layers[lower], model.model.layers[lower + 1]])
    if fold_norm:
        for layer in pair:
            projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
            fold_gain(layer.input_layernorm, projections)
            fold_gain(layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj])
    block = merged.model.layers[lower]
    chosen = {}
    for unit, total in (("head", 4), ("neuron", 48)):
        counts = [math.floor(total * share) for share in shares_]
        counts[shares_.index(max(shares_))] += total - sum(counts)
        chosen[unit] = []
        for offset, layer in enumerate(pair):
            if unit == "head":
                score = attention[lower + offset].abs().mean(0) * layer.self_attn.o_proj.weight.abs().sum(0)
                score = [float(quarter.mean()) for quarter in score.chunk(4)]
            else:
                score = (mlp[lower + offset].abs().mean(0) * layer.mlp.down_proj.weight.abs().sum(0)).tolist()
            best = sorted(range(total), key=lambda i: -score[i])[: counts[offset]]
            chosen[unit].append(sorted(best))
    heads_of = [[g, g + 4] if official_gqa else [2 * g, 2 * g + 1] for g in range(4)]
    chosen["query"] = [sorted(head for group in groups for head in heads_of[group]) for groups in chosen["head"]]

    def rows(weights, size, unit):
        return torch.cat(
            [w[u * size : (u + 1) * size] for w, units in zip(weights, chosen[unit], strict=True) for u in units]
        )

    def columns(weights, size, unit):
        return rows([w.T for w in weights], size, unit).T

    attn, mlps = [layer.self_attn for layer in pair], [layer.mlp for layer in pair]
    block.self_attn.q_proj.weight.data = rows([a.q_proj.weight for a in attn], HEAD_DIM, "query")
    block.self_attn.k_proj.weight.data = rows([a.k_proj.weight for a in attn], HEAD_DIM, "head")
    block.self_attn.v_proj.weight.data = rows([a.v_proj.weight for a in attn], HEAD_DIM, "head")
    block.self_attn.o_proj.weight.data = columns([a.o_proj.weight for a in attn], HEAD_DIM, "query").contiguous()
    block.mlp.gate_proj.weight.data = rows([m.gate_proj.weight for m in mlps], 1, "neuron")
    block.mlp.up_proj.weight.data = rows([m.up_proj.weight for m in mlps], 1, "neuron")
    block.mlp.down_proj.weight.data = columns([m.down_proj.weight for m in mlps], 1, "neuron").contiguous()
    for norm in ("input_layernorm", "post_attention_layernorm"):
        getattr(block, norm).weight.data = sum(getattr(layer, norm).weight for layer in pair) / 2
    layers = list(merged.model.layers)
    merged.model.layers = torch.nn.ModuleList([*layers[: lower + 1], *layers[lower + 2 :]])
    merged.config.num_hidden_layers = len(merged.model.layers)
    return merged


def fold_gain(norm, projections):
    for projection in projections:
        projection.weight.mul_(norm.weight)
    norm.weight.fill_(1)


@torch.no_grad()
def naive_come(
    model, input_ids, num_remove, *, tokens="all", repeat="forbid", power=1.0, min_largest_share=0.0, **merging
):
    """The merged model, the groups, distance and shares of each step, and the least cosine on the way."""
    groups, steps, least = [[i] for i in range(len(model.model.layers))], [], 1.0
    for _ in range(num_remove):
        states, attention, mlp = look(model, input_ids)
        influence = [mean_turn(states[i], states[i + 1]) for i in range(len(groups))]
        distance = {}
        for i in range(len(groups) - 1):
            cosines = torch.cosine_similarity(states[i], states[i + 2], dim=-1)
            least = min(least, float(cosines.min()))
            angle = cosines.clamp(0, 1).arccos() / math.pi
            angle = angle.view(input_ids.shape)[:, -1] if tokens == "last" else angle
            if repeat == "allow" or len(groups[i]) == len(groups[i + 1]) == 1:
                distance[i] = float(angle.mean())
        lower = min(distance, key=distance.get)
        both = [influence[lower] ** power, influence[lower + 1] ** power]
        largest = max(both) / sum(both)
        largest = max(largest, min_largest_share ** (1 / (len(groups[lower] + groups[lower + 1]) - 1)))
        shares_ = [largest, 1 - largest] if both[0] >= both[1] else [1 - largest, largest]
        steps.append((distance[lower], shares_))
        model = naive_merge_pair(model, lower, shares_, attention, mlp, **merging)
        groups[lower : lower + 2] = [groups[lower] + groups[lower + 1]]
    return model, groups, steps, least


def mean_turn(before, after):
    """1 - cosine, where a cosine below 0 counts as 0."""
    return sum(
        1 - max(0.0, float(torch.cosine_similarity(a, b, dim=0))) for a, b in zip(before, after, strict=True)
    ) / len(before)


def dense(num_layers=8):
    """A Llama with wide heads whose norms differ, so that their mean shows."""
    model = peculiar_model("llama", num_layers, num_heads=8, num_kv_heads=4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight.mul_(1 + 0.1 * index)
            layer.post_attention_layernorm.weight.mul_(1.5 - 0.1 * index)
    return random_source(num_layers=num_layers), model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens": "last"},
        {"power": 3.0},
        {"min_largest_share": 0.8},
        {"min_largest_share": 0.6, "repeat": "allow"},
        {"official_gqa": True},
        {"fold_norm": True},
        {"fold_norm": True, "official_gqa": True, "power": 0.5, "repeat": "allow"},
    ],
)
def test_equals_the_plain_loop(options, input_ids):
    source, model = dense()
    expected, groups, steps, least = naive_come(model, input_ids, 3, **options)
    assert least < -0.1  # some states are turned by more than 90 degrees: the clip matters
    plan = Come(**options).plan(problem_of(model, source, input_ids, num_remove=3))
    assert plan.layer_groups == groups
    for step, (distance, shares_) in zip(plan.scores["steps_taken"], steps, strict=True):
        assert step["distance"] == pytest.approx(distance, abs=1e-5)
        assert step["shares"] == pytest.approx(shares_, abs=1e-5)
    pruned = apply(plan, copy.deepcopy(model))
    found = pruned(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(found, expected(input_ids=input_ids, use_cache=False).logits, rtol=0, atol=1e-5)


def test_only_what_lies_above_a_merge_is_run_again(input_ids):
    source, model = dense()
    plan = Come().plan(problem_of(model, source, input_ids, num_remove=2))
    position = plan.scores["steps_taken"][0]["layers"][0]
    assert plan.scores["num_block_evaluations"] == 7 - position


def test_plan_is_kept_with_its_tensors_and_replayed(input_ids, tmp_path):
    source, model = dense()
    plan = Come(repeat="allow").plan(problem_of(model, source, input_ids, num_remove=5))
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again.content() == plan.content()
    first = apply(plan, copy.deepcopy(model))(input_ids=input_ids).logits
    torch.testing.assert_close(apply(again, copy.deepcopy(model))(input_ids=input_ids).logits, first, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "opt", "phi3", "gpt_neox"])
def test_other_architectures_reach_their_depth(architecture, input_ids):
    source = random_source(architecture, num_layers=6)
    model, _ = load_dense(source)
    plan = Come(repeat="when_needed").plan(problem_of(model, source, input_ids, num_remove=4))
    assert plan.num_layers == 2
    assert sorted(sum(plan.layer_groups, [])) == list(range(6))
    for step in plan.scores["steps_taken"]:
        assert sum(step["neurons"]) == 48
        assert sum(step["shares"]) == pytest.approx(1)
    assert torch.isfinite(apply(plan, model)(input_ids=input_ids).logits).all()


def test_longer_runs_and_a_shorter_last_one(input_ids):
    source, model = dense()
    plan = Come(run_length=4).plan(problem_of(model, source, input_ids, num_remove=5))
    assert [len(step["layers"]) for step in plan.scores["steps_taken"]] == [4, 3]


def test_running_out_of_unmerged_pairs(input_ids):
    source, model = dense(num_layers=6)
    problem = problem_of(model, source, input_ids, num_remove=4)
    with pytest.raises(UserError, match="no run of 2 unmerged layers is left .* method.repeat=when_needed"):
        Come().plan(problem)
    assert Come(repeat="when_needed").plan(problem).num_layers == 2


def test_posterior_takes_the_split_with_the_least_loss(input_ids):
    source, model = dense(num_layers=5)
    prior = Come().plan(problem_of(model, source, input_ids, num_remove=1))
    lower = prior.layer_groups.index(next(group for group in prior.layer_groups if len(group) == 2))
    _, attention, mlp = look(model, input_ids)
    losses = []
    for step in range(5):
        candidate = naive_merge_pair(model, lower, [step / 4, 1 - step / 4], attention, mlp)
        with torch.no_grad():
            losses.append(float(candidate(input_ids=input_ids, labels=input_ids, use_cache=False).loss))
    plan = ComePosterior(granularity=4).plan(problem_of(model, source, input_ids, num_remove=1))
    best = losses.index(min(losses)) / 4
    assert plan.scores["steps_taken"][0]["shares"] == [best, 1 - best]


def test_shares_by_hand():
    assert shares([1, 3], 1) == [0.25, 0.75]
    assert shares([1, 3], 2) == [0.1, 0.9]
    assert shares([0, 0], 1) == [0.5, 0.5]
    assert raise_largest([0.25, 0.75], 0.9, 2) == pytest.approx([0.1, 0.9])
    assert raise_largest([0.25, 0.75], 0.64, 3) == pytest.approx([0.2, 0.8])  # 0.64 ** (1 / 2)
    assert raise_largest([0.25, 0.75], 0.0, 2) == [0.25, 0.75]
    assert split(10, [0.25, 0.75]) == [2, 8]
    assert split(3, [0.5, 0.5]) == [2, 1]
    assert split(7, [0.2, 0.5, 0.3]) == [1, 4, 2]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Come, {"run_length": 1}),
        (Come, {"repeat": "never"}),
        (Come, {"tokens": "first"}),
        (Come, {"min_largest_share": 1.5}),
        (ComePosterior, {"run_length": 3}),
        (ComePosterior, {"granularity": 0}),
    ],
)
def test_bad_options(method, options):
    (option,) = options
    with pytest.raises(UserError, match=f"method.{option}="):
        method(**options)


def test_folding_norms_needs_rms_norms():
    with pytest.raises(UserError, match="is a opt model, which has none"):
        Come(fold_norm=True).check(context_of(random_source("opt")))
    Come(fold_norm=True).check(context_of(random_source("gemma3_text")))


def test_protected_layers_are_never_merged(input_ids):
    source = random_source(num_layers=8)
    plan = Come(protect_first=2, protect_last=3).plan(
        problem_of(load_dense(source)[0], source, input_ids, num_remove=1)
    )
    assert [group for group in plan.layer_groups if len(group) > 1] in ([[2, 3]], [[3, 4]])
    assert Come(protect_first=2, protect_last=3).num_protected == 5
