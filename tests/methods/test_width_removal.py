"""Wanda-sp and FLAP against plain loops over every activation, and what both do with a target."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import context_of, random_source, run_slm

from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.fisher_mask import FisherMask
from slm_pipeline.methods.flap import Flap
from slm_pipeline.methods.head_importance import HeadImportance
from slm_pipeline.methods.kcm import KCM
from slm_pipeline.methods.llm_pruner import LLMPruner
from slm_pipeline.methods.nystrom import Nystrom
from slm_pipeline.methods.obs import OptimalBrainSurgeon
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.methods.wanda_sp import WandaSP
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import byte_tokenizer, load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.models.widths import cut_out, settle
from slm_pipeline.surgery.apply import apply, layer_sizes

ARCHITECTURES = ["llama", "phi3", "opt", "gemma3_text"]


@pytest.fixture
def make_problem(input_ids):
    """A function: the problem of a model whose weights differ more than random ones do, and whose biases are not 0."""

    def make(target, architecture="llama", **sizes):
        source = random_source(architecture, **{"num_layers": 4, **sizes})
        model, _ = load_dense(source)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        view = ModelView(model)
        statistics = collect(view, input_ids)
        return PruningProblem(
            source=source, view=view, input_ids=input_ids, statistics=statistics, target=target, calibration={}
        )

    return make


@torch.no_grad()
def inputs_of(problem):
    """sublayer -> for each layer (weight, [tokens, n] inputs) of its last projection."""
    view, seen, hooks = problem.view, {}, []
    for layer in range(view.num_layers):
        for part, output in (("attention", view.attention_output(layer)), ("mlp", view.mlp_output(layer))):

            def keep(module, args, key=(part, layer)):
                seen[key] = module.weight.clone(), args[0].flatten(0, -2)

            hooks.append(output.register_forward_pre_hook(keep))
    view.model(input_ids=problem.input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {part: [seen[part, layer] for layer in range(view.num_layers)] for part in ("attention", "mlp")}


def kept_of(plan):
    """(layer, heads | neurons) -> indices that stay."""
    return {
        (op.layers[0], unit): plan.tensors[f"{op.tensors}.{unit}"].tolist()
        for op in plan.ops
        for unit in ("heads", "neurons")
        if getattr(op, unit) is not None
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wanda_sp_is_the_plain_loop(architecture, make_problem):
    problem = make_problem(Layers(2), architecture, num_heads=8, num_kv_heads=4)
    plan = WandaSP(export="custom").plan(problem)
    view, kept = problem.view, kept_of(plan)
    groups = view.num_kv_heads
    widths = plan.scores["widths"]
    assert len(set(map(tuple, widths))) == 1
    left_heads, left_neurons = widths[0]
    assert left_heads in (groups // 2, groups // 2 + 1)  # about half of all layers' parameters go
    for layer in range(4):
        for part, unit, left, number in (
            ("attention", "heads", left_heads, groups),
            ("mlp", "neurons", left_neurons, 48),
        ):
            weight, inputs = inputs_of(problem)[part][layer]
            scores = []
            for j in range(weight.shape[1]):
                norm = sum(float(value) ** 2 for value in inputs[:, j]) ** 0.5
                scores.append(sum(abs(float(w)) for w in weight[:, j]) * norm)
            size = len(scores) // number
            of_units = [sum(scores[unit * size : (unit + 1) * size]) for unit in range(number)]
            best = sorted(sorted(range(number), key=lambda unit: of_units[unit])[number - left :])
            assert kept[layer, unit] == best
    assert not any(name.endswith("_bias") for name in plan.tensors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flap_is_the_plain_loop(architecture, make_problem):
    problem = make_problem(Layers(1), architecture, num_heads=8, num_kv_heads=4)
    plan = Flap().plan(problem)
    view, kept = problem.view, kept_of(plan)
    groups, seen = view.num_kv_heads, inputs_of(problem)
    candidates = []
    for layer in range(4):
        for part, unit, number in (("attention", "heads", groups), ("mlp", "neurons", 48)):
            weight, inputs = seen[part][layer]
            scores = inputs.var(dim=0, unbiased=False) * weight.square().sum(dim=0)
            scores = scores**2 if part == "attention" else scores
            scores = ((scores - scores.mean()) / scores.std()).view(number, -1).mean(dim=1).tolist()
            order = sorted(range(number), key=lambda index: scores[index])
            candidates += [(scores[index], layer, unit, index) for index in order[:-1]]
    removed = {key: set() for key in ((layer, unit) for layer in range(4) for unit in ("heads", "neurons"))}
    wanted = sum(view.block_parameters(layer) for layer in range(4)) // 4
    for _, layer, unit, index in sorted(candidates):
        removed[layer, unit].add(index)
        if view.num_parameters() - parameters_without(problem, removed) >= wanted:
            break
    numbers = {"heads": groups, "neurons": 48}
    for (layer, unit), gone in removed.items():
        assert kept.get((layer, unit), list(range(numbers[unit]))) == sorted(set(range(numbers[unit])) - gone)
    for op in plan.ops:
        assert set(op.biases) == op.sublayers
        for part, unit, number in (("attention", "heads", groups), ("mlp", "neurons", 48)):
            if part in op.sublayers:
                weight, inputs = seen[part][op.layers[0]]
                mask = torch.tensor([float(index in removed[op.layers[0], unit]) for index in range(number)])
                expected = weight @ (inputs.mean(dim=0) * mask.repeat_interleave(weight.shape[1] // number))
                found = torch.from_numpy(plan.tensors[f"{op.tensors}.{part}_bias"])
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def parameters_without(problem, removed):
    """Parameters of the model without these units, with the biases that it gets for them."""
    view = problem.view
    number = view.num_parameters()
    for (layer, unit), gone in removed.items():
        is_heads = unit == "heads"
        output = view.attention_output(layer) if is_heads else view.mlp_output(layer)
        for piece in view.attention_slices(layer) if is_heads else view.mlp_slices(layer):
            parameter = view.layers[layer].get_parameter(piece.parameter)
            number -= parameter.numel() * len(gone) // (view.num_kv_heads if is_heads else 48)
        number += 32 if gone and output.bias is None else 0
    return number


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [WandaSP(), WandaSP(allocation="global", export="custom"), Flap()])
def test_a_target_of_parameters_is_met_within_one_unit(method, architecture, make_problem):
    problem = make_problem(Parameters(1), architecture)
    view, dense = problem.view, problem.view.num_parameters()
    of_group = view.sublayer_parameters(0, "attention") // view.num_kv_heads
    of_neuron = 4 * view.sublayer_parameters(0, "mlp") // 48 + 4
    for wanted in (1, 1000, 4567, 12_000):
        problem.target = Parameters(wanted)
        plan = method.plan(problem)
        pruned, _ = load_dense(problem.source)
        removed = dense - ModelView(apply(plan, pruned)).num_parameters()
        assert wanted <= removed < wanted + (of_neuron if method.allocation == "uniform" else of_group)


@pytest.mark.parametrize("num_kv_heads", [8, 4, 1])  # multi-head, grouped-query, multi-query
def test_groups_of_any_size_go_with_all_their_heads(num_kv_heads, make_problem):
    problem = make_problem(Layers(1), num_heads=8, num_kv_heads=num_kv_heads, hidden_size=64)
    widths = Flap(bias=False).plan(problem).scores["widths"]
    assert all(1 <= heads <= num_kv_heads for heads, _ in widths)
    assert (min(heads for heads, _ in widths) < num_kv_heads) == (num_kv_heads > 1)
    (left,) = {heads for heads, _ in WandaSP(export="custom").plan(problem).scores["widths"]}
    assert left == {8: 6, 4: 3, 1: 1}[num_kv_heads]


def test_too_many_parameters_are_an_error(make_problem):
    problem = make_problem(Parameters(10**6))
    for method in (WandaSP(), Flap(), Flap(allocation="uniform"), WandaSP(sublayers="attention")):
        with pytest.raises(UserError, match=r"1.0M parameters cannot go: .* have \d+, as every sublayer keeps one"):
            method.plan(problem)


@pytest.mark.parametrize(("export", "left"), [("stock", 6), ("custom", 5)])
def test_the_stock_class_decides_how_many_heads_may_stay(export, left, make_problem):
    sizes = {"hidden_size": 48, "num_heads": 6, "num_kv_heads": 6}
    problem = make_problem(Parameters(1), **sizes)
    problem.target = Parameters(sum(problem.view.block_parameters(layer) for layer in range(4)) // 4)
    plan = WandaSP(export=export).plan(problem)
    assert {heads for heads, _ in plan.scores["widths"]} == {left}
    pruned = apply(plan, load_dense(problem.source)[0])
    assert (type(pruned).__name__ == "LlamaForCausalLM") == (export == "stock")
    only_heads = WandaSP(export=export, sublayers="attention")
    problem.target = Parameters(1)
    assert {heads for heads, _ in only_heads.plan(problem).scores["widths"]} == {4 if export == "stock" else 5}


def test_a_number_of_heads_that_the_class_cannot_have_is_refused_before_anything_is_measured(make_problem, monkeypatch):
    problem = make_problem(Parameters(1), hidden_size=48, num_heads=6, num_kv_heads=6)
    quarter = sum(problem.view.block_parameters(layer) for layer in range(4)) // 4
    problem.target = Parameters(quarter)
    refusing, rounding = WandaSP(illegal_heads="refuse"), WandaSP()
    with monkeypatch.context() as patched:
        patched.setattr(WandaSP, "unit_scores", None)
        with pytest.raises(
            UserError, match=r"refuse: 5 of 6 key-value groups would stay .* llama .*, only 1, 2, 3, 4, 6;"
        ):
            refusing.plan(problem)
    assert rounding.plan(problem).scores["widths"][0][0] == 6
    problem.target = Parameters(quarter * 3 // 2)  # four of six heads stay
    assert kept_of(refusing.plan(problem)) == kept_of(rounding.plan(problem))
    assert refusing.plan(problem).scores["widths"][0][0] == 4


def test_opt_keeps_its_heads_in_the_stock_class(make_problem):
    problem = make_problem(Layers(1), "opt")
    plan = Flap(allocation="uniform", export="stock").plan(problem)  # its projections have biases
    assert {heads for heads, _ in plan.scores["widths"]} == {4}
    assert type(apply(plan, load_dense(problem.source)[0])).__name__ == "OPTForCausalLM"


def test_neurons_that_make_massive_activations_stay(make_problem):
    problem = make_problem(Layers(2))
    with torch.no_grad():
        problem.statistics.mlp_mean[1][7] = 300.0  # always the same: FLAP would remove it
        problem.statistics.mlp_variance[1][7] = 1e-9
    for massive, stays in ((40.0, True), (None, False)):
        plan = Flap(massive=massive).plan(problem)
        assert plan.scores["massive"] == ([[1, 7]] if stays else [])
        assert (7 in kept_of(plan)[1, "neurons"]) == stays


def test_protected_layers_keep_their_widths(make_problem):
    plan = WandaSP(export="custom", protect_first=1, protect_last=2).plan(make_problem(Parameters(1000)))
    assert [op.layers for op in plan.ops] == [(1,)]


@pytest.mark.parametrize(
    "method",
    [
        WandaSP(multiple_of=16),
        Flap(multiple_of=16),
        Flap(multiple_of=16, allocation="sensitivity"),
        OptimalBrainSurgeon(multiple_of=16),
        Nystrom(multiple_of=16),
    ],
)
def test_a_multiple_of_neurons_stays(method, make_problem):
    problem = make_problem(Parameters(1))
    step = 16 * (4 if method.allocation == "uniform" else 1) * 3 * 32
    for wanted in (1, 5000, 9000):
        problem.target = Parameters(wanted)
        plan = method.plan(problem)
        neurons = [width[1] for width in plan.scores["widths"]]
        assert set(neurons) <= {16, 32, 48}
        assert min(neurons) < 48
        pruned = apply(plan, load_dense(problem.source)[0])
        removed = problem.view.num_parameters() - ModelView(pruned).num_parameters()
        assert wanted <= removed < wanted + max(step, 3000)
    problem.target = Parameters(10**5)
    with pytest.raises(UserError, match="parameters cannot go"):
        method.plan(problem)


@pytest.mark.parametrize("make", [WandaSP, Flap, OptimalBrainSurgeon])
def test_sensitivity_is_the_divergence_with_one_sublayer_narrower(make, make_problem):
    problem = make_problem(Parameters(6000), num_heads=8, num_kv_heads=4)
    method = make(allocation="sensitivity", export="custom", sensitivity_tokens=12)
    plan = method.plan(problem)
    measured = plan.scores["sensitivity"]
    assert set(measured) == {f"{layer}.{part}" for layer in range(4) for part in ("attention", "mlp")}
    fitted, text = problem.input_ids[:2], problem.input_ids[2:]
    dense = problem.view.model(input_ids=text, use_cache=False).logits.log_softmax(dim=-1)
    for layer, part, index in ((2, "mlp", 0), (1, "attention", 0), (3, "mlp", 2)):
        left, found = measured[f"{layer}.{part}"][index]
        alone = make(export="custom", sublayers=part, protect_first=layer, protect_last=3 - layer, allocation="uniform")
        if make is OptimalBrainSurgeon:
            problem.input_ids = fitted
        of_one = next(of for of in layer_sizes(problem.view))
        gone = (4 - left) * of_one.per_head if part == "attention" else (48 - left) * of_one.per_neuron
        bias = 32 if make is Flap else 0
        problem.target = Parameters(gone - bias)
        pruned = apply(alone.plan(problem), copy.deepcopy(problem.view.model))
        logits = pruned(input_ids=text, use_cache=False).logits.log_softmax(dim=-1)
        expected = float((dense.exp() * (dense - logits)).sum(dim=-1).mean().detach())
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-7)


def test_sensitivity_spares_the_layer_that_matters(make_problem):
    problem = make_problem(Parameters(4000))
    with torch.no_grad():
        problem.view.mlp_output(1).weight.mul_(8)
        problem.view.mlp_output(2).weight.mul_(0.01)
    problem.statistics = collect(problem.view, problem.input_ids)
    everywhere = {"protect_first": 0, "protect_last": 0, "sublayers": "both"}
    for make, options in (
        *((make, {}) for make in (WandaSP, Flap, OptimalBrainSurgeon, Nystrom)),
        *((make, everywhere) for make in (LLMPruner, FisherMask, HeadImportance, KCM)),
    ):
        plan = make(allocation="sensitivity", export="custom", **options).plan(problem)
        widths = plan.scores["widths"]
        assert widths[2][1] == min(neurons for _, neurons in widths) < 16
        assert widths[1][1] == 48


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize(
    "make", [WandaSP, Flap, OptimalBrainSurgeon, Nystrom, LLMPruner, FisherMask, HeadImportance, KCM]
)
def test_what_is_missing_stays_so_and_the_others_lose_what_is_asked(make, architecture, make_problem, tmp_path):
    """Layer 0 has no attention and layer 2 no feed-forward network, which every method knows to leave alone."""
    problem = make_problem(Parameters(1500), architecture, num_heads=8, num_kv_heads=4)
    cut_out(problem.view, {"attention": [0], "mlp": [2]})
    settle(problem.view)
    problem.statistics = collect(problem.view, problem.input_ids)
    before, sizes = problem.view.num_parameters(), layer_sizes(problem.view)
    options = {"protect_first": 0, "protect_last": 0, "export": "custom", "multiple_of": 2}
    if make in (HeadImportance, KCM):
        options["sublayers"] = "both"
    for allocation in ("uniform", "sensitivity") if make is WandaSP else (make.allocation,):
        plan = make(allocation=allocation, **options).plan(problem)
        widths = plan.scores["widths"]
        assert [heads == 0 for heads, _ in widths] == [True, False, False, False]
        assert [neurons == 0 for _, neurons in widths] == [False, False, True, False]
        pruned = apply(plan, copy.deepcopy(problem.view.model))
        step = max(sizes[1].per_head, (1 if allocation == "global" else 3) * 2 * sizes[1].per_neuron)
        assert 1500 <= before - ModelView(pruned).num_parameters() < 1500 + step
        config = problem.source.config
        reloaded = checkpoint.save(pruned, byte_tokenizer(), tmp_path / allocation, card="", config=config)
        assert [(s["key_value_heads"], s["neurons"]) for s in reloaded.config.layer_sizes] == [*map(tuple, widths)]


def test_one_sublayer_alone(make_problem):
    problem = make_problem(Parameters(2000))
    for part in ("attention", "mlp"):
        for method in (Flap(sublayers=part), WandaSP(sublayers=part)):
            assert {op.sublayers for op in method.plan(problem).ops} == {frozenset({part})}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "fair"}, "method.allocation='fair' is not one of uniform, global"),
        ({"export": "onnx"}, "method.export='onnx' is not one of stock, custom"),
        ({"illegal_heads": "pad"}, "method.illegal_heads='pad' is not one of round, refuse"),
        (
            {"illegal_heads": "refuse", "export": "custom"},
            "illegal_heads=refuse does nothing with method.export=custom",
        ),
        (
            {"illegal_heads": "refuse", "sublayers": "mlp"},
            "illegal_heads=refuse does nothing with method.sublayers=mlp",
        ),
        ({"sublayers": "norms"}, "method.sublayers='norms' is not one of both, attention, mlp"),
        ({"massive": 0.0}, r"method.massive=0.0 must lie in \(0, "),
        ({"multiple_of": 0}, "method.multiple_of=0 must be at least 1"),
        (
            {"multiple_of": 8, "sublayers": "attention"},
            "method.multiple_of=8 does nothing with method.sublayers=attention",
        ),
        ({"sensitivity_tokens": 9}, "method.sensitivity_tokens=9 does nothing with method.allocation=uniform"),
    ],
)
def test_values_that_no_option_has(options, message):
    with pytest.raises(UserError, match=message):
        WandaSP(**options)


def test_what_the_stock_class_cannot_have(make_problem):
    context = context_of(random_source())
    with pytest.raises(UserError, match="method.allocation=global leaves layers of different widths"):
        WandaSP(allocation="global").check(context)
    with pytest.raises(UserError, match="method.allocation=sensitivity leaves layers of different widths"):
        OptimalBrainSurgeon(allocation="sensitivity").check(context)
    with pytest.raises(UserError, match=r"method.protect_\* leaves layers of different widths"):
        WandaSP(protect_last=1).check(context)
    Flap().check(context)
    with pytest.raises(UserError, match="method.bias=true adds a bias to projections that have none in a llama model"):
        Flap(allocation="uniform", export="stock").plan(make_problem(Layers(1)))


def test_a_whole_run_says_what_it_asked_for_and_got(tmp_path):
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("The pond froze over in the night, and nobody said a word about the boats. " * 200)
    rows.write_text(
        "".join(json.dumps({"text": f"Boat number {number} lay in the ice."}) + "\n" for number in range(40))
    )
    outcome = run_slm(
        "model=random", "model.num_layers=6", "model.hidden_size=64", "model.num_heads=4", "method=flap",
        "calibration=text_file", f"calibration.path={text}", "calibration.num_samples=4", "calibration.seq_len=32",
        "pruning_ratio.of=parameters", "recovery=distill", "recovery.source=file", f"recovery.path={rows}",
        "recovery.validation_size=4", "recovery.cutoff_len=32", "recovery.max_steps=2", "recovery.warmup_steps=1",
        "evaluation=none", "tracker=jsonl", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (file,) = tmp_path.glob("runs/*/*/summary.json")
    summary = json.loads(file.read_text())
    assert summary["num_layers"] == {"dense": 6, "pruned": 6}
    got = summary["pruning_ratio"]["got_parameters"]
    assert 0.2 <= got < 0.25
    assert f"; asked 20% of the parameters, got {100 * got:.4g}%" in " ".join(outcome.out.split())
    (stage,) = tmp_path.glob("store/recover/*/stage.json")
    assert json.loads(stage.read_text())["result"]["num_steps"] == 2
    assert summary["parameters"]["pruned"] < 0.8 * summary["parameters"]["dense"]
