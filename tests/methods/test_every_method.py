"""What every method has in common: with default options it leaves a checkpoint that reloads as the same function."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import context_of, random_source
from omegaconf import OmegaConf
from problems import problem_of

from slm_pipeline.config import CONF_DIR, PruningRatioConfig
from slm_pipeline.config.groups import build
from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize
from slm_pipeline.methods.combined import Combined
from slm_pipeline.methods.target import ParameterCounts, PruningRatio
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply, layer_sizes
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.plan import Plan

NOT_A_SEARCH = ("from_plan", "none", "combined")  # the last has tests/methods/test_combined.py
METHODS = sorted(file.stem for file in (CONF_DIR / "method").glob("*.yaml") if file.stem not in NOT_A_SEARCH)
UNEQUAL = ("fisher_mask", "flap", "head_importance", "kcm", "llm_pruner")  # layers of different widths
NARROWER = (*UNEQUAL, "nystrom", "obs", "wanda_sp")  # all layers stay
REFUSED = {("replaceme", "gemma3_text")}  # a norm follows the last projection


def method_of(name):
    values = OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")
    values = values.get("method", values)
    values.pop("defaults", None)
    method = build(values, group="method")
    for option in ("protect_first", "protect_last"):  # eight layers leave little room for the published protection
        if getattr(method, option, 0) > 1:
            setattr(method, option, 1)
    return method


def angular_and_wanda_sp(name, share):
    return {**OmegaConf.to_container(OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")), "share": share}


@pytest.fixture(scope="module")
def eight_layers():
    """(source, model, what it shows on `input_ids`)"""
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    return source, model, collect(ModelView(model), ids)


def num_remove(name):
    return 1 if name == "head_importance" else 2  # heads alone do not have as many parameters as two layers


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "opt"])
@pytest.mark.parametrize("name", METHODS)
def test_its_checkpoint_reloads(name, architecture, input_ids, tmp_path):
    source = random_source(architecture, num_layers=8)
    method = method_of(name)
    if (name, architecture) in REFUSED:
        with pytest.raises(UserError):
            method.check(context_of(source))
        return
    method.check(context_of(source))
    model, tokenizer = load_dense(source)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    looked_at = {"fingerprint": "f", "num_tokens": input_ids.numel()}
    statistics = collect(ModelView(model), input_ids)
    asked = {"num_remove": num_remove(name), "statistics": statistics, "calibration": looked_at}
    problem = problem_of(model, source, input_ids, **asked)
    plan = method.plan(problem)
    assert plan.calibration == (None if name in ("shortened_magnitude", "reverse") else looked_at)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())  # it only reads the model
    assert all(module.training is False for module in model.modules())
    plan.write(tmp_path / "plan.json")
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.num_layers == (8 if name in NARROWER else 6) or name in ("finercut", "joint")
    pruned = apply(plan, model).eval()
    expected = pruned(input_ids=input_ids, use_cache=False).logits
    reloaded = checkpoint.save(pruned, tokenizer, tmp_path / "model", card="", config=source.config)
    assert (type(reloaded) is type(load_dense(source)[0])) == (name not in UNEQUAL)
    assert type(reloaded) is type(pruned)
    torch.testing.assert_close(reloaded(input_ids=input_ids, use_cache=False).logits, expected, rtol=0, atol=0)


# The smallest thing that a method can leave or take, of which each meets a target within one; those not named: a layer.
UNITS = {
    **dict.fromkeys(("wanda_sp", "llm_pruner", "obs", "nystrom", "joint", "combined"), "a neuron of every layer"),
    **dict.fromkeys(("flap", "fisher_mask", "head_importance"), "a head"),
    "kcm": "a neuron",
    "finercut": "a sublayer",
}


@pytest.mark.parametrize("name", [*METHODS, "combined"])
def test_a_share_of_all_parameters_is_met_within_one_unit(name, input_ids, eight_layers):
    """At three ratios: what was asked, what went, and the unit that may go besides."""
    source, model, statistics = eight_layers
    view = ModelView(model)
    sizes, (size, *_) = ParameterCounts.of(view), layer_sizes(view)
    bias = size.attention_bias + size.mlp_bias  # of flap, fisher_mask and kcm, whose constants count
    unit = {
        "a layer": size.whole,
        "a sublayer": max(size.attention, size.mlp),
        "a head": size.per_head + bias,
        "a neuron": size.per_neuron + bias,
        "a neuron of every layer": 8 * size.per_neuron,
    }[UNITS.get(name, "a layer")]
    steps = {"first": angular_and_wanda_sp("angular", 0.5), "second": angular_and_wanda_sp("wanda_sp", None)}
    method = (
        method_of(name) if name != "combined" else Combined(steps=steps, published_calibration=CalibrationSize(8, 16))
    )
    for ratio in (0.03, 0.07, 0.14) if name == "head_importance" else (0.1, 0.2, 0.3):
        asked = PruningRatio(PruningRatioConfig(of="parameters", ratio=ratio), method).target(sizes)
        problem = problem_of(model, source, input_ids, statistics=statistics, num_remove=1)
        plan = method.plan(replace(problem, target=asked))
        left, changes = measure_changes(plan, layer_sizes(view))
        pruned = ModelView(apply(plan, copy.deepcopy(model))).num_parameters() - changes.idle_parameters
        assert sizes.total - pruned == sum(sizes.blocks) - sum(of.at_work for of in left)
        assert 0 <= sizes.total - pruned - ratio * sizes.total < unit, f"{ratio} of {sizes.total}, {pruned} are left"


def test_samples_of_one_token_are_refused_where_the_next_is_predicted():
    context = context_of(random_source())
    context.config.calibration.seq_len = 1
    predicting = {"come_posterior", "shortened_ppl", "shortened_taylor", "sleb"}
    predicting |= {"fisher_mask", "head_importance", "llm_pruner"}
    for name in predicting:
        with pytest.raises(UserError, match=f"calibration.seq_len=1 must be at least 2 for method={name}, which predi"):
            method_of(name).check(context)
    for name in set(METHODS) - predicting:
        method_of(name).check(context)


READ_STATES = sorted(set(METHODS) - {"shortened_magnitude", "reverse", "shortened_taylor"})


@pytest.mark.parametrize("name", READ_STATES)
def test_a_damaged_model_is_an_error(name, input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    view = ModelView(model)
    statistics = collect(view, input_ids)
    for tensor in (statistics.cosine, statistics.angle, statistics.angle_last):
        tensor.fill_(float("nan"))
    with torch.no_grad():
        for layer in view.layers:  # whatever goes, something damaged is left
            layer.mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite|is nan|overflows"):
        method_of(name).plan(problem_of(model, source, input_ids, num_remove=num_remove(name), statistics=statistics))


def test_the_calibration_pass_names_the_first_damaged_layer(input_ids):
    view = ModelView(load_dense(random_source(num_layers=4))[0])
    with torch.no_grad():
        view.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="the states after layer 2 are not finite"):
        collect(view, input_ids)
