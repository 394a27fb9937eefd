"""Several methods one after the other: one plan in the dense model's layers, shares, order, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import small_pipeline
import torch
import width_study
from conftest import context_of, random_source
from omegaconf import OmegaConf
from problems import problem_of

from slm_pipeline.config import CONF_DIR, PruningRatioConfig
from slm_pipeline.config.groups import build
from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize
from slm_pipeline.methods.combined import Combined
from slm_pipeline.methods.shortgpt import ShortGPT
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

SIZE = {"num_samples": 8, "seq_len": 16}


def node_of(name, share=None, **options):
    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml"))
    values = values.get("method", values)  # none is written from the top
    values.pop("defaults", None)
    for option in ("protect_first", "protect_last"):
        if values.get(option, 0) > 1:
            values[option] = 1
    return {**values, "published_calibration": SIZE, "share": share, **options}


def combined(first, second, **more):
    values = {"_target_": "slm_pipeline.methods.combined.Combined", "published_calibration": SIZE}
    method = build({**values, "first": first, "second": second, **more}, group="method")
    assert isinstance(method, Combined)
    return method


@pytest.fixture
def made(input_ids):
    """A function of a method, an architecture and what is asked: dense model, problem and plan."""

    def make(method, architecture="llama", num_layers=8, **asked):
        source = random_source(architecture, num_layers=num_layers, intermediate_size=96)
        model, _ = load_dense(source)
        method.check(context_of(source))
        statistics = collect(ModelView(model), input_ids)
        problem = problem_of(model, source, input_ids, statistics=statistics, **asked)
        return model, problem, method.plan(problem)

    return make


def plan_of(num_layers, *ops, **tensors):
    return Plan({"name": "m", "fingerprint": "f", "num_layers": num_layers}, "test", {}, None, [*ops], tensors=tensors)


def test_joint_narrows_what_a_step_before_it_left(made):
    """As with any step, the total is met within a neuron of each layer."""
    step = node_of("joint", depths=2, swaps=0)
    dense, _, plan = made(combined(node_of("angular", 0.5), step), num_layers=6, num_remove=2)
    layer, before = ModelView(dense).block_parameters(0), num_parameters(dense)
    removed = before - num_parameters(apply(plan, dense))
    assert 2 * layer <= removed < 2 * layer + 5 * 3 * 32
    assert [part["method"] for part in plan.scores["parts"]] == ["angular", "joint"]
    assert plan.scores["parts"][1]["target"] == {"of": "parameters", "remove": layer}


def test_a_later_plan_is_said_in_the_layers_of_the_dense_model():
    """Of layers 0-7 layer 1 goes and 3, 4, 5 become one: what is left is 0, 2, {3, 4, 5}, 6, 7."""
    whole = plan_of(8, Drop((1,)), Merge((3, 4, 5), "official"))
    kept, matrix = np.array([0, 2]), np.eye(4, dtype=np.float32)
    later = plan_of(
        5, Resize((2,), "resize.2", neurons=2), Fold((1,), "map"), Merge((2, 3), "official"), Drop((4,)),
        **{"resize.2.neurons": kept, "map": matrix},
    )  # fmt: skip
    whole.then(later, "second.")
    assert whole.ops == [
        Drop((1,)), Merge((3, 4, 5), "official"), Resize((3,), "second.resize.2", neurons=2), Fold((2,), "second.map"),
        Merge((3, 4, 5, 6), "official"), Drop((7,)),
    ]  # fmt: skip
    assert whole.tensors.keys() == {"second.resize.2.neurons", "second.map"}
    whole.check("the plan")
    assert whole.layer_groups == [[0], [2], [3, 4, 5, 6]]


def test_tensors_of_two_plans_do_not_stand_for_one_another():
    whole = plan_of(4, Resize((1,), "resize.1", heads=1), **{"resize.1.heads": np.array([1])})
    whole.then(plan_of(4, Resize((1,), "resize.1", neurons=1), **{"resize.1.neurons": np.array([5])}), "second.")
    whole.check("the plan")
    assert {name: value.tolist() for name, value in whole.tensors.items()} == {
        "resize.1.heads": [1], "second.resize.1.neurons": [5],
    }  # fmt: skip


ORDERS = [
    ("slm", "wanda_sp"), ("come", "flap"), ("angular", "flap"), ("mka", "wanda_sp"), ("slm", "come"),
    ("wanda_sp", "shortgpt"), ("flap", "slm"), ("flap", "finercut"), ("replaceme", "flap"), ("finercut", "flap"),
    ("finercut", "shortgpt"),
]  # fmt: skip


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_the_plan_is_the_second_method_on_the_model_that_the_first_left(names, made, input_ids):
    options = {"export": "custom"} if names[0] == "finercut" else {}
    method = combined(node_of(names[0], 0.5, **options), node_of(names[1]))
    dense, problem, plan = made(method, num_remove=4)
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    first, second = (step.method for step in method.steps.values())
    asked = [part["target"] for part in plan.scores["parts"]]
    targets = [{f"num_{'remove' if t['of'] == 'layers' else 'parameters'}": t["remove"]} for t in asked]
    step = problem_of(dense, problem.source, input_ids, statistics=problem.statistics, **targets[0])
    left = apply(first.plan(step), load_dense(problem.source)[0])
    again = problem_of(left, problem.source, input_ids, statistics=collect(ModelView(left), input_ids), **targets[1])
    expected = apply(second.plan(again), left)(input_ids=input_ids, use_cache=False).logits
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())  # it only read the model
    found = apply(plan, dense)
    torch.testing.assert_close(found(input_ids=input_ids, use_cache=False).logits, expected, rtol=0, atol=0)


def num_parameters(model):
    return ModelView(model).num_parameters()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_total_is_met_whatever_the_split(share, made):
    """With width last within one neuron and what a head costs; with depth alone within one layer."""
    dense, problem, plan = made(
        combined(node_of("angular", share), node_of("flap", bias=False)), num_layers=12, num_remove=4
    )
    before, layer = num_parameters(dense), ModelView(dense).block_parameters(0)
    removed = before - num_parameters(apply(plan, dense))
    gone = round(4 * share)
    assert len(plan.layer_groups) == 12 - gone
    unit = layer if share == 1 else max(problem.view.head_dim * 2 * 32 * 2, 3 * 32)
    assert 4 * layer <= removed < 4 * layer + unit
    parts = plan.scores["parts"]
    assert [part["name"] for part in parts] == [name for name, s in (("first", share), ("second", 1 - share)) if s]
    if 0 < share < 1:
        assert parts[0]["target"] == {"of": "layers", "remove": gone}
        assert parts[1]["target"] == {"of": "parameters", "remove": (4 - gone) * layer}
        assert parts[1]["found"] == {"layers": 12 - gone, "parameters": parts[0]["left"]["parameters"]}


def test_width_first_is_made_up_for_by_whole_layers(made):
    """Width takes at least its half of four layers; the rest, of narrower layers, is as many as reach the total."""
    dense, _, plan = made(combined(node_of("wanda_sp", 0.5), node_of("shortgpt")), num_layers=12, num_remove=4)
    layer, before = ModelView(dense).block_parameters(0), num_parameters(dense)
    pruned = apply(plan, dense)
    narrower = ModelView(pruned).block_parameters(0)
    width = 12 * (layer - narrower)
    assert 2 * layer <= width < 2 * layer + 12 * 3 * 32  # one neuron of every layer
    asked = -(-(4 * layer - width) // narrower)
    assert plan.scores["parts"][1]["target"] == {"of": "parameters", "remove": 4 * layer - width}
    assert before - num_parameters(pruned) == width + asked * narrower
    assert plan.num_layers == 12 - asked


def test_three_steps_share_alike_in_what_is_left(made):
    method = combined(
        node_of("shortgpt", 0.5),
        node_of("wanda_sp", 0.25, sublayers="mlp"),
        third=node_of("flap", sublayers="attention"),
    )
    dense, _, plan = made(method, num_layers=8, num_remove=2)
    layer = ModelView(dense).block_parameters(0)
    parts = plan.scores["parts"]
    assert [part["target"]["of"] for part in parts] == ["layers", "parameters", "parameters"]
    assert parts[1]["target"]["remove"] == -(-layer // 2)  # one of the two layers that were left is shared by two
    taken = parts[0]["left"]["parameters"] - parts[1]["left"]["parameters"]
    assert parts[2]["target"]["remove"] == layer - taken
    assert {type(op) for op in plan.ops} == {Drop, Resize}


def test_a_step_looks_at_no_more_samples_than_its_own_size_says(input_ids, made):
    first = {**node_of("shortgpt", 0.5), "published_calibration": {"num_samples": 1, "seq_len": 16}}
    _, problem, plan = made(combined(first, node_of("wanda_sp")), num_remove=4)
    statistics = collect(problem.view, input_ids[:1])
    alone = ShortGPT(published_calibration=CalibrationSize(1, 16))
    of_one = alone.plan(
        problem_of(problem.view.model, problem.source, input_ids[:1], statistics=statistics, num_remove=2)
    )
    assert plan.scores["parts"][0]["scores"] == of_one.scores
    of_all = alone.plan(
        problem_of(problem.view.model, problem.source, input_ids, statistics=problem.statistics, num_remove=2)
    )
    assert of_one.scores != of_all.scores


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (("slm", 0.5), ("flap", 0.6), "method.first.share=0.5, method.second.share=0.6: shares must sum to 1"),
        (("slm", 0.5), ("flap", 0.4), "shares must sum to 1"),
        (("slm", None), ("flap", None), "method.second.share=null: shares must sum to 1, and one of them may be null"),
        (("slm", 1.5), ("flap", None), r"method.first.share=1.5 must lie in \[0, 1\]"),
        (
            ("flap", 0.5),
            ("wanda_sp", None),
            r"method.second \(wanda_sp\) cannot come after method.first \(flap\): both nar",
        ),
        (("flap", 0.5), ("mka", None), "mka mixes the weights of layers"),
        (("flap", 0.5), ("come", None), "come mixes the weights of layers"),
        (("finercut", 0.5), ("slm", None), "finercut leaves layers without a sublayer; let it come last"),
        (("finercut", 0.5), ("flap", None), "finercut leaves zeros, .* use method.first.export=custom"),
        (("joint", 0.5), ("come", None), "come mixes the weights of layers"),
        (("joint", 0.5), ("flap", None), "both narrow the same sublayers; joint with export=stock leaves attention"),
        (("wanda_sp", 0.5), ("joint", None), "both narrow the same sublayers; joint with export=stock leaves"),
        (("finercut", 0.5), ("joint", None), "finercut leaves layers without a sublayer; let it come last"),
        (("none", 0.5), ("flap", None), "none: it cannot be a step, for it takes no part of a target"),
    ],
)
def test_what_cannot_be_is_refused_beforehand(first, second, message):
    with pytest.raises(UserError, match=message):
        combined(*({**node_of(name), "share": share} for name, share in (first, second)))


def test_a_rule_that_keeps_one_layer_may_follow_a_narrower_width_and_one_that_mixes_may_not():
    combined(node_of("flap", 0.5), node_of("slm", merge_rule="keep_lowest"))
    with pytest.raises(UserError, match="slm mixes the weights of layers, which have lost different heads"):
        combined(node_of("flap", 0.5), node_of("slm", merge_rule="mean"))


def test_joint_leaves_attention_to_others_or_layers_without_a_sublayer():
    combined(node_of("joint", 0.5), node_of("flap", sublayers="attention"))
    combined(node_of("joint", 0.5, export="custom"), node_of("shortgpt"))
    for second in (node_of("flap", sublayers="attention"), node_of("replaceme")):
        with pytest.raises(UserError, match="cannot come after method.first .joint"):
            combined(node_of("joint", 0.5, export="custom"), second)


def test_a_step_that_looks_at_too_few_samples_is_refused_beforehand():
    step = {**node_of("joint"), "published_calibration": {"num_samples": 2, "seq_len": 16}}
    with pytest.raises(UserError, match="step second: calibration.num_samples=2 must be at least 3 for method=joint"):
        combined(node_of("shortgpt", 0.5), step).check(context_of(random_source()))


def test_an_option_of_a_step_is_refused_by_the_steps_name():
    with pytest.raises(UserError, match="step first: method.merge_rule='x' is not one of official"):
        combined(node_of("slm", 0.5, merge_rule="x"), node_of("flap"))
    with pytest.raises(UserError, match="step second: method.depth does not exist for method=flap"):
        combined(node_of("slm", 0.5), node_of("flap", depth=1))
    with pytest.raises(UserError, match="method.third is no step"):
        combined(node_of("slm", 0.5), node_of("flap"), third={"x": 1})


@pytest.mark.parametrize(
    ("num_layers", "keep", "share", "message"),
    [
        (8, 7, 0.5, "method.first.share=0.5 of 1 layers is 1, which leaves nothing for second"),
        (
            8,
            2,
            0.9,
            r"method.first.share=0.9 of 6 layers is 5: of 8 at least 5 must be left \(4 protected and one more\)",
        ),
    ],
)
def test_a_share_of_whole_layers_that_cannot_be_is_refused_beforehand(num_layers, keep, share, message):
    context = context_of(random_source(num_layers=num_layers))
    context.config.pruning_ratio = PruningRatioConfig(num_layers=keep)
    with pytest.raises(UserError, match=message):
        combined(node_of("slm", share, protect_first=2, protect_last=2), node_of("flap")).check(context)


def test_a_step_that_takes_all_leaves_an_error_and_no_silent_plan(made):
    """A seventh of the parameters is less than a layer."""
    method = combined(node_of("shortgpt", 0.1), node_of("flap"))
    with pytest.raises(UserError, match=re.escape("nothing is left for method.second: the steps before it took")):
        made(method, num_parameters=5000)


def test_what_the_plan_depends_on():
    """A step without a share is not made, so that its options change nothing."""
    of = combined(node_of("slm", 0.0), node_of("flap")).identity()
    assert combined(node_of("slm", 0.0, max_window=3), node_of("flap")).identity() == of
    assert combined(node_of("slm", 0.1), node_of("flap")).identity() != of
    half = combined(node_of("slm", 0.5), node_of("flap")).identity()
    assert combined(node_of("slm"), node_of("flap", 0.5)).identity() == half
    assert combined(node_of("slm", 0.5, max_window=3), node_of("flap")).identity() != half
    assert combined(node_of("come", 0.5), node_of("flap")).identity() != half
    assert [step["method"] for step in half["options"]["steps"]] == ["slm", "flap"]


@pytest.mark.parametrize("row", [("opt", "obs", "slm"), ("phi3", "fisher_mask", "angular")], ids="-".join)
def test_a_row_of_the_width_study(row, tmp_path):
    """Planned, saved, trained, scored; loaded again as the same function. All rows: python tests/width_study.py"""
    cells = width_study.run(row, small_pipeline.write_data(tmp_path / "data"), tmp_path)
    found = dict(zip(width_study.HEAD, cells, strict=True))
    assert found["class"] == ("OPTForCausalLM" if row[0] == "opt" else "PrunedPhi3ForCausalLM")
    assert found["asked"] == "20% of layers"
    assert 14 < float(found["got"].partition("%")[0]) < 20  # of all parameters, the embeddings' among them
    assert 0 < float(found["KL pruned"]) < 1


def test_a_joint_step_takes_the_memory_that_it_takes_alone():
    """After shortgpt, which takes nothing but the statistics between."""
    sizes = Sizes(
        layers=4, hidden=32, neurons=4000, vocabulary=512, queries=32, keys=16, inputs=2, is_tied=False, item_bytes=4,
        num_samples=8, seq_len=16,
    )  # fmt: skip
    both = combined(node_of("shortgpt", 0.5), node_of("joint"))
    without = combined(node_of("shortgpt", 1.0), node_of("joint", 0.0))
    gram = 8 * sizes.neurons**2
    assert both.memory(sizes) == both.steps["second"].method.memory(sizes) > 3 * gram > without.memory(sizes)


def test_a_step_takes_the_memory_of_the_samples_that_it_looks_at():
    """Of 64 samples sleb looks at 8, wherever it stands, and statistics of 8 are collected for it."""
    few = Sizes(
        layers=4, hidden=32, neurons=48, vocabulary=512, queries=32, keys=16, inputs=2, is_tied=False, item_bytes=4,
        num_samples=8, seq_len=16,
    )  # fmt: skip
    many = replace(few, num_samples=64)
    for first, second in (("sleb", "shortgpt"), ("shortgpt", "sleb"), ("shortgpt", "joint")):
        method = combined(node_of(first, 0.5), node_of(second))
        assert method.memory(many) == method.memory(few) > 0
        assert method.steps["second"].method.memory(many) > method.memory(few) or second == "shortgpt"
    alone = combined(node_of("shortgpt", 1.0), node_of("sleb", 0.0))
    assert alone.memory(few) == 0 < alone.memory(many)  # statistics of all samples are there
