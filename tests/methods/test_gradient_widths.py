"""LLM-Pruner, head importance, Fisher masks and KCM against plain loops, and what the tuning of masks does."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import peculiar_model, random_source
from problems import problem_of

from slm_pipeline.engine.convex_masking import representativeness
from slm_pipeline.engine.mask_tuning import tune
from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.fisher_mask import FisherMask
from slm_pipeline.methods.head_importance import HeadImportance
from slm_pipeline.methods.kcm import KCM
from slm_pipeline.methods.llm_pruner import LLMPruner, coupled_salience
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.base import SUBLAYERS

ARCHITECTURES = ["llama", "phi3", "opt", "gpt_neox", "gemma3_text"]


@pytest.fixture
def make_problem(input_ids):
    def make(architecture="llama", num_remove=1, **sizes):
        model, source = peculiar_model(architecture, 6, **sizes), random_source(architecture, 6, **sizes)
        statistics = collect(ModelView(model), input_ids)
        return problem_of(model, source, input_ids, num_remove=num_remove, statistics=statistics)

    return make


def coupled_weights(view, layer, architecture):
    """sublayer -> unit -> the matrices' parts, each as (parameter, rows | columns, index list), said by hand."""
    heads, groups, width = 4, 2, view.head_dim
    group = heads // groups * width
    block = view.layers[layer]
    queries = [list(range(unit * group, (unit + 1) * group)) for unit in range(groups)]
    keys = [list(range(unit * width, (unit + 1) * width)) for unit in range(groups)]
    if architecture == "llama":
        attention = [
            [
                (block.self_attn.q_proj.weight, 0, queries[unit]),
                (block.self_attn.k_proj.weight, 0, keys[unit]),
                (block.self_attn.v_proj.weight, 0, keys[unit]),
                (block.self_attn.o_proj.weight, 1, queries[unit]),
            ]
            for unit in range(groups)
        ]
        mlp = [
            [
                (block.mlp.gate_proj.weight, 0, [unit]),
                (block.mlp.up_proj.weight, 0, [unit]),
                (block.mlp.down_proj.weight, 1, [unit]),
            ]
            for unit in range(48)
        ]
        return {"attention": attention, "mlp": mlp}
    fused, first_key, first_value = block.self_attn.qkv_proj.weight, heads * width, (heads + groups) * width
    attention = [
        [
            (fused, 0, [*queries[unit], *(first_key + row for row in keys[unit])]),
            (fused, 0, [first_value + row for row in keys[unit]]),
            (block.self_attn.o_proj.weight, 1, queries[unit]),
        ]
        for unit in range(groups)
    ]
    both = block.mlp.gate_up_proj.weight
    mlp = [[(both, 0, [unit, 48 + unit]), (block.mlp.down_proj.weight, 1, [unit])] for unit in range(48)]
    return {"attention": attention, "mlp": mlp}


@pytest.mark.parametrize("taylor", ["param_first", "param_second", "vectorize"])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_llm_pruner_sums_over_coupled_weights(architecture, taylor, make_problem, input_ids):
    view = make_problem(architecture).view
    model, layers = view.model, [1, 4]
    found = coupled_salience(view, input_ids, [(layer, part) for layer in layers for part in SUBLAYERS], taylor)
    gradients = []
    for samples in input_ids.split(1 if taylor == "param_second" else 3):
        model.zero_grad()
        model(input_ids=samples, labels=samples).loss.backward()
        gradients.append({parameter: parameter.grad.clone() for parameter in model.parameters()})
    model.zero_grad()
    for layer in layers:
        for part, units in coupled_weights(view, layer, architecture).items():
            expected = []
            for pieces in units:
                score = 0.0
                for parameter, dim, chosen in pieces:
                    weight = parameter.detach().index_select(dim, torch.tensor(chosen))
                    parts = [of[parameter].index_select(dim, torch.tensor(chosen)) for of in gradients]
                    if taylor == "param_first":
                        score += float((weight * parts[0]).abs().sum())
                    elif taylor == "param_second":
                        score += sum(float((weight**2 * of**2).sum()) for of in parts) / 3
                    else:
                        score += float((weight * parts[0]).sum(dim=1 - dim).abs().sum())
                expected.append(score)
            torch.testing.assert_close(found[layer, part], torch.tensor(expected), rtol=1e-3, atol=1e-9)


def test_llm_pruner_takes_as_many_of_the_lowest_from_every_layer_between_the_ends(make_problem, input_ids):
    problem = make_problem()
    plan = LLMPruner(protect_first=2, protect_last=1).plan(problem)
    assert [op.layers for op in plan.ops] == [(2,), (3,), (4,)]
    assert len({tuple(widths) for widths in plan.scores["widths"][2:5]}) == 1
    salience = coupled_salience(problem.view, input_ids, [(layer, "mlp") for layer in (2, 3, 4)], "param_first")
    for op, scores in zip(plan.ops, salience.values(), strict=True):
        best = sorted(scores.argsort(descending=True)[: op.neurons].tolist())
        assert plan.tensors[f"{op.tensors}.neurons"].tolist() == best


def test_head_importance_is_the_mean_of_absolute_gradients_divided_by_the_layers_norm(make_problem, input_ids):
    problem = make_problem(num_heads=8, num_kv_heads=4)
    view = problem.view
    width = view.attention_output(0).in_features // 4
    expected = torch.zeros(6, 4)
    for sample in input_ids:
        kept = {}

        def keep(module, args, kept=kept):
            kept[module] = args[0]
            args[0].retain_grad()

        hooks = [view.attention_output(layer).register_forward_pre_hook(keep) for layer in range(6)]
        view.model(input_ids=sample[None], labels=sample[None]).loss.backward()
        for layer, hook in enumerate(hooks):
            hook.remove()
            inputs = kept[view.attention_output(layer)]
            for group in range(4):
                columns = slice(group * width, (group + 1) * width)
                product = (inputs[..., columns] * inputs.grad[..., columns]).sum()
                expected[layer, group] += product.abs().detach() / len(input_ids)
    view.model.zero_grad()
    places = [(layer, "attention") for layer in range(6)]
    raw = HeadImportance(normalize=False).unit_scores(problem, places).values()
    torch.testing.assert_close(torch.stack([*raw]), expected, rtol=1e-3, atol=1e-7)
    normal = HeadImportance().unit_scores(problem, places).values()
    torch.testing.assert_close(
        torch.stack([*normal]), expected / expected.norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-6
    )
    assert all(op.neurons is None for op in HeadImportance().plan(problem).ops)


def test_convex_masking_is_its_loop_over_pairs():
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    distances = [[float((a - b).square().sum()) for b in rows] for a in rows]
    mean = sum(map(sum, distances)) / 49
    kernel = torch.tensor([[2.718281828459045 ** (-d / (0.5**2 * mean)) for d in line] for line in distances])
    shares = torch.full((7, 7), 1 / 7)
    while True:
        after = torch.empty(7, 7)
        for i in range(7):
            for j in range(7):
                mixed = sum(float(kernel[i, k] * shares[k, j]) for k in range(7))
                after[i, j] = shares[i, j] * (float(kernel[i, j]) / mixed) ** 0.5
        change = abs(float(after.sum() - shares.sum())) / float(shares.sum())
        shares = after
        if change < 0.02:
            break
    torch.testing.assert_close(representativeness(rows, 0.5, 0.02), shares.diagonal(), rtol=1e-4, atol=1e-5)


def test_a_row_that_others_repeat_is_less_its_own():
    rows = torch.eye(6)
    rows[5] = rows[4] = rows[3]
    found = representativeness(rows, 0.5, 0.01)
    assert found[:3].min() > 1.5 * found[3:].max()


def test_kcm_multiplies_two_rankings(make_problem):
    problem = make_problem()
    scores = {
        ranking: KCM(ranking=ranking).unit_scores(problem, [(2, "mlp")])[2, "mlp"]
        for ranking in ("both", "representative", "data_driven")
    }
    torch.testing.assert_close(scores["both"], scores["representative"] * scores["data_driven"])
    statistics = problem.statistics
    norms = (statistics.mlp_variance[2] + statistics.mlp_mean[2] ** 2).sqrt()
    assert scores["data_driven"].argsort().tolist() == norms.argsort().tolist()
    assert (float(scores["representative"].min()), float(scores["representative"].max())) == (0.0, 1.0)


@torch.no_grad()
def states_of(view, input_ids, layer):
    """What a layer's last projections get and put out, and what enters it, in a whole pass of the model."""
    seen = {}
    hooks = [view.layers[layer].register_forward_pre_hook(lambda _, args: seen.update(state=args[0].flatten(0, 1)))]
    for part in SUBLAYERS:

        def keep(module, args, output, part=part):
            seen[part] = args[0].flatten(0, -2), output.flatten(0, -2)

        hooks.append(view.output(layer, part).register_forward_hook(keep))
    view.model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_scales_are_the_least_squares_of_every_units_share(architecture, make_problem, input_ids, monkeypatch):
    monkeypatch.setattr("slm_pipeline.engine.mask_tuning.LARGEST", 1e6)
    view = make_problem(architecture).view
    num_heads = view.num_kv_heads
    kept = {(3, "attention"): torch.arange(num_heads - 1), (3, "mlp"): torch.arange(0, 48, 4)}
    damping = 0.02
    scales, refused = tune(view, input_ids, kept, damping)
    assert not refused
    dense = states_of(view, input_ids, 3)
    narrow = ModelView(copy.deepcopy(view.model))
    for part in SUBLAYERS:
        output, stay, number = narrow.output(3, part), kept[3, part], view.num_units(3, part)
        size = output.in_features // number
        gone = torch.ones(number, dtype=torch.bool)
        gone[stay] = False
        output.weight[:, gone.repeat_interleave(size)] = 0
        seen = states_of(narrow, input_ids, 3)
        inputs = seen[part][0].view(-1, number, size)
        shares = torch.stack(
            [(inputs[:, u] @ output.weight[:, u * size : (u + 1) * size].T).flatten() for u in stay.tolist()], dim=1
        )
        missing = dense["state"] - seen["state"] + dense["attention"][1]
        if part == "mlp":
            missing = missing + dense["mlp"][1] - seen["attention"][1]
        missing = (missing - (0 if output.bias is None else output.bias)).flatten()
        ridge = (damping * shares.square().sum(dim=0).mean()).sqrt()
        rows = torch.cat([shares, ridge * torch.eye(len(stay))]).double()
        expected = torch.linalg.lstsq(rows, torch.cat([missing, ridge * torch.ones(len(stay))]).double()).solution
        torch.testing.assert_close(scales[3, part].double(), expected, rtol=2e-3, atol=2e-3)
        for unit, scale in zip(stay.tolist(), scales[3, part].tolist(), strict=True):
            output.weight[:, unit * size : (unit + 1) * size] *= scale


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folded_scales_are_masks_on_the_dense_model(architecture, make_problem, input_ids):
    problem = make_problem(architecture, num_remove=2)
    view = problem.view
    plan = FisherMask().plan(problem)
    untuned = FisherMask(tuning=False).plan(problem)
    assert [op for op in plan.ops if op.name == "resize"] == untuned.ops
    masked = ModelView(copy.deepcopy(view.model))
    for op in plan.ops:
        layer = op.layers[0]
        if op.name == "resize":
            for part, unit in (("attention", "heads"), ("mlp", "neurons")):
                if getattr(op, unit) is not None:
                    mask = torch.zeros(view.num_units(layer, part))
                    mask[torch.from_numpy(plan.tensors[f"{op.tensors}.{unit}"])] = 1
                    weight = masked.output(layer, part).weight
                    weight *= mask.repeat_interleave(weight.shape[1] // len(mask))
        else:
            for part in op.sublayers:
                weight = masked.output(layer, part).weight
                columns = weight.abs().sum(dim=0) > 0
                new = torch.from_numpy(plan.tensors[f"{op.tensors}.{part}"])
                factors = new.norm(dim=0) / weight[:, columns].norm(dim=0)
                torch.testing.assert_close(new.abs(), weight[:, columns].abs() * factors, rtol=1e-3, atol=1e-5)
                weight[:, columns] = new
    expected = masked.model(input_ids=input_ids, use_cache=False).logits
    pruned = apply(plan, copy.deepcopy(view.model)).eval()
    torch.testing.assert_close(pruned(input_ids=input_ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_tuning_brings_the_last_states_closer(make_problem, input_ids):
    problem = make_problem(num_remove=2)
    dense = ModelView(problem.view.model).decoder(input_ids=input_ids).last_hidden_state
    errors = {}
    for tuning in (True, False):
        pruned = apply(KCM(tuning=tuning).plan(problem), copy.deepcopy(problem.view.model)).eval()
        errors[tuning] = float((ModelView(pruned).decoder(input_ids=input_ids).last_hidden_state - dense).norm())
    assert errors[True] < errors[False]


@torch.no_grad()
def test_scales_that_are_not_believed_are_left_out(make_problem, monkeypatch):
    monkeypatch.setattr("slm_pipeline.engine.mask_tuning.LARGEST", 0.0)
    plan = FisherMask().plan(make_problem())
    assert {op.name for op in plan.ops} == {"resize"}
    assert plan.scores["untuned"] == [[layer, part] for layer in range(6) for part in SUBLAYERS]


@pytest.mark.parametrize("search", [True, False])
def test_fisher_masks_leave_multiples_of_neurons(search, make_problem):
    problem = make_problem()
    plan = FisherMask(multiple_of=9, search=search, massive=None).plan(problem)
    neurons = [neurons for _, neurons in plan.scores["widths"]]
    assert set(neurons) <= {9, 18, 27, 36, 45, 48}
    assert min(neurons) < 48
    for op in plan.ops:
        if op.name == "resize" and op.neurons:
            kept = plan.tensors[f"{op.tensors}.neurons"].tolist()
            assert len(set(kept)) == op.neurons == neurons[op.layers[0]]


@pytest.mark.parametrize("method", [HeadImportance(), FisherMask(sublayers="attention")])
def test_more_than_heads_have_is_refused_before_anything_is_measured(method, make_problem, monkeypatch):
    monkeypatch.setattr("slm_pipeline.engine.gradients.of_gates", None)
    with pytest.raises(UserError, match="18560 parameters cannot go: .* have 13824"):
        method.plan(make_problem(num_remove=2))


def test_what_multiples_of_neurons_leave_no_room_for_is_refused_before_anything_is_measured(make_problem, monkeypatch):
    monkeypatch.setattr("slm_pipeline.engine.gradients.of_gates", None)
    with pytest.raises(
        UserError, match="9280 parameters cannot go: .* have 0, as every sublayer keeps one, or method.m"
    ):
        FisherMask(sublayers="mlp", multiple_of=48).plan(make_problem())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (LLMPruner, {"taylor": "param_mix"}, "method.taylor='param_mix' is not one of param_first, param_second"),
        (KCM, {"ranking": "r2"}, "method.ranking='r2' is not one of both, representative, data_driven"),
        (KCM, {"ranking": "data_driven", "sigma": 2.0}, "method.sigma=2.0 does nothing with method.ranking=data_driv"),
        (KCM, {"tuning": False, "damping": 1.0}, "method.damping=1.0 does nothing with method.tuning=false"),
        (FisherMask, {"allocation": "uniform", "search": False}, "method.search=False does nothing with method.alloc"),
    ],
)
def test_values_that_no_option_has_or_that_do_nothing(method, options, message):
    with pytest.raises(UserError, match=message):
        method(**options)
