"""Every option of every method does something, or is refused where it would do nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import context_of, random_source
from omegaconf import OmegaConf
from problems import problem_of

from slm_pipeline.config import CONF_DIR
from slm_pipeline.config.groups import build
from slm_pipeline.engine import compiled
from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.target import Floor
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView

# method -> option -> a value that leads to another plan on the model below, or to other measurements in it; in a pair
# with options that both sides have.
CHANGES: dict[str, dict[str, object]] = {
    "slm": {
        "merge_rule": "mean", "similarity": "logits_kl", "protect_first": 5, "protect_last": 3, "max_window": 2,
        "compile": True,
    },
    "laco": {
        "merge_rule": "keep_lowest", "similarity": "per_token", "num_merged": 2, "lowest": 6, "highest": 4,
        "interval": (3, {"num_merged": 2}), "compile": True,
    },
    "come": {
        "protect_first": 6, "protect_last": 6, "run_length": 3, "repeat": "allow", "power": 4.0,
        "min_largest_share": 0.9, "tokens": "last", "official_gqa": True, "fold_norm": True,
    },
    "come_posterior": {
        "protect_first": 6, "protect_last": 6, "repeat": "allow", "tokens": "last", "official_gqa": True,
        "fold_norm": True, "granularity": 1,
    },
    "mka": {
        "pairs": "last", "official": True, "sharpness": 3.0, "num_points": 20, "num_neighbors": 9, "protect_first": 6,
        "protect_last": 6,
    },
    "shortgpt": {"protect_first": 6, "protect_last": 6},
    "angular": {"protect_first": 6, "protect_last": 6},
    "streamline": {"protect_first": 6, "protect_last": 6, "replacement": True},
    "reverse": {"protect_first": (6, {"protect_last": 0}), "protect_last": 1},
    "finercut": {
        "objective": "euclidean", "protect_first": 6, "protect_last": 6, "export": "custom",
        "counts": "sublayers",
    },
    "replaceme": {
        "protect_first": 6, "protect_last": 6, "held_out": 0.5, "solver": "cosine", "ridge": 1.0,
        "ridge_target": ("identity", {"ridge": 1.0}), "accurate": (True, {"solver": "cosine"}),
        "learning_rate": (1e-2, {"solver": "cosine"}), "num_epochs": (2, {"solver": "cosine"}),
        "batch_tokens": (7, {"solver": "cosine"}),
    },
    "sleb": {"protect_first": 6, "protect_last": 6, "shortlist": 1, "strict": True, "compile": True},
    "shortened_ppl": {"protect_first": 6, "protect_last": 6},
    "shortened_taylor": {"protect_first": 6, "protect_last": 6},
    "wanda_sp": {
        "illegal_heads": "refuse",
        **dict.fromkeys(("protect_first", "protect_last"), (3, {"export": "custom"})), "massive": 1.5,
        "allocation": ("global", {"export": "custom"}), "export": "custom", "sublayers": "attention", "multiple_of": 5,
        "sensitivity_tokens": (16, {"allocation": "sensitivity", "export": "custom"}),
    },
    "flap": {
        "illegal_heads": ("refuse", {"allocation": "uniform", "bias": False, "export": "stock"}),
        "protect_first": 3, "protect_last": 3, "massive": 1.5, "allocation": "uniform", "sublayers": "attention",
        "export": ("stock", {"allocation": "uniform", "bias": False}), "bias": False, "multiple_of": 5,
        "sensitivity_tokens": (16, {"allocation": "sensitivity"}),
    },
    "obs": {
        "illegal_heads": "refuse",
        **dict.fromkeys(("protect_first", "protect_last"), (3, {"export": "custom"})), "massive": 1.5,
        "allocation": ("sensitivity", {"export": "custom"}), "export": "custom", "sublayers": "attention",
        "sensitivity_tokens": (16, {"allocation": "sensitivity", "export": "custom"}), "ridge": 1.0, "at_a_time": 1,
        "corrected_inputs": False, "multiple_of": 5,
    },
    "nystrom": {
        **dict.fromkeys(("protect_first", "protect_last"), (3, {"export": "custom"})), "massive": 1.5,
        "allocation": ("sensitivity", {"export": "custom"}), "export": "custom", "multiple_of": 5,
        "sensitivity_tokens": (16, {"allocation": "sensitivity", "export": "custom"}), "ridge": 1.0,
        "corrected_inputs": False,
    },
    "llm_pruner": {
        "illegal_heads": ("refuse", {"protect_first": 0, "protect_last": 0, "export": "stock"}),
        "protect_first": 3, "protect_last": 3, "massive": 1.5, "allocation": "global", "sublayers": "attention",
        "export": ("stock", {"protect_first": 0, "protect_last": 0}), "taylor": "vectorize",
        "multiple_of": 5, "sensitivity_tokens": (16, {"allocation": "sensitivity"}),
    },
    "head_importance": {
        "illegal_heads": ("refuse", {"allocation": "uniform", "export": "stock"}),
        "protect_first": 2, "protect_last": 2, "massive": (1.5, {"sublayers": "both"}), "allocation": "uniform",
        "sublayers": "both", "export": ("stock", {"allocation": "uniform"}), "normalize": False,
        "multiple_of": (5, {"sublayers": "both"}), "sensitivity_tokens": (16, {"allocation": "sensitivity"}),
    },
    "fisher_mask": {
        "illegal_heads": ("refuse", {"allocation": "uniform", "export": "stock"}),
        "protect_first": 3, "protect_last": 3, "massive": 1.5, "allocation": "uniform", "sublayers": "attention",
        "export": ("stock", {"allocation": "uniform"}), "search": False, "rearrangement": False, "tuning": False,
        "damping": 1.0,
        "multiple_of": 5, "sensitivity_tokens": (16, {"allocation": "sensitivity"}),
    },
    "kcm": {
        "illegal_heads": ("refuse", {"allocation": "uniform", "export": "stock", "sublayers": "both"}),
        "protect_first": 3, "protect_last": 3, "massive": 1.5, "allocation": "uniform", "sublayers": "attention",
        "export": ("stock", {"allocation": "uniform"}), "ranking": "data_driven", "sigma": 1.0, "tolerance": 0.3,
        "tuning": False, "damping": 1.0,
        "multiple_of": 5, "sensitivity_tokens": (16, {"allocation": "sensitivity"}),
    },
    "shortened_magnitude": {"protect_first": 6, "protect_last": 6, "power": 2},
}  # fmt: skip
ONLY_FASTER = {
    ("sleb", "strict"),
    *((name, "compile") for name in ("slm", "laco", "sleb")),
}  # or slower, with the same numbers in float32
ONLY_LIMITS = {("reverse", "protect_first")}  # how much can be asked for: what goes first is at the other end
NARROWER = ("wanda_sp", "flap", "obs", "nystrom", "llm_pruner", "head_importance", "fisher_mask", "kcm")
ONLY_WITH_WEAK_ATTENTION = {("finercut", "counts")}  # test_finercut
ONLY_OF_OTHER_HEADS = {
    (name, option) for name in NARROWER for option in ("export", "illegal_heads")
}  # whose number must divide: test_width_removal
REFUSED = {("come_posterior", name) for name in ("power", "min_largest_share", "run_length")} | {
    ("nystrom", option) for option in ("sublayers", "illegal_heads")
}
WITHOUT_OPTIONS = {"none", "from_plan", "combined", "joint"}  # combined has those of its steps; joint: test_joint


@pytest.fixture(scope="module")
def make_problem():
    """A function of what is asked: the problem of a Llama whose layers 2 and 3 do least."""
    source = random_source(num_layers=8, hidden_size=32)
    model, _ = load_dense(source)
    view = ModelView(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, layer in enumerate(view.layers):
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else (0.03 if index in (2, 3) else 0.15) * noise)
    input_ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))
    statistics = collect(view, input_ids)
    return lambda **asked: problem_of(model, source, input_ids, statistics=statistics, **asked)


def method_of(name, **changes):
    values = OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")
    for option in ("protect_first", "protect_last"):
        if values.get(option, 0) > 1:
            values[option] = 1
    return build(OmegaConf.merge(values, changes), group="method")


@pytest.mark.parametrize("name", CHANGES)
def test_the_table_has_every_option(name):
    options = {field.name for field in dataclasses.fields(method_of(name))} - {"published_calibration"}
    assert options == CHANGES[name].keys() | {option for method, option in REFUSED if method == name}
    assert {file.stem for file in (CONF_DIR / "method").glob("*.yaml")} - WITHOUT_OPTIONS == CHANGES.keys()


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in CHANGES.items() for option in options]
)
def test_every_option_changes_the_plan(name, option, make_problem, monkeypatch):
    monkeypatch.setattr(compiled, "_BACKEND", "eager")
    change = CHANGES[name][option]
    value, common = change if isinstance(change, tuple) else (change, {})
    before, after = method_of(name, **common), method_of(name, **{**common, option: value})
    assert before.options() != after.options()
    everything = Floor in before.targets and option not in ("merge_rule", "similarity")  # passes at a threshold of 0
    layers = {"run_length": 2, "repeat": 2, "search": 4}.get(option, 1)
    problem = make_problem(threshold=0.0) if everything else make_problem(num_remove=layers)
    plans = [method.plan(problem) for method in (before, after)]
    if option.startswith("protect") and (name, option) not in ONLY_LIMITS:
        assert plans[0].content() != plans[1].content()
    elif (name, option) not in ONLY_FASTER | ONLY_LIMITS | ONLY_OF_OTHER_HEADS | ONLY_WITH_WEAK_ATTENTION:
        assert decision(plans[0]) != decision(plans[1])


def decision(plan):
    """The edits, and the measurements that led to them; not how many were needed."""
    return plan.content(), {key: value for key, value in plan.scores.items() if not key.startswith("num_")}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "come_posterior",
            {"power": 2.0},
            "method.power=2.0 does nothing in come_posterior, which searches the shares",
        ),
        ("come_posterior", {"min_largest_share": 0.5}, "method.min_largest_share=0.5 does nothing in come_posterior"),
        ("come_posterior", {"run_length": 3}, "method.run_length=3: come_posterior merges pairs"),
        ("mka", {"official": True, "pairs": "last"}, "method.pairs=last does nothing with method.official=true"),
        ("mka", {"official": True, "sharpness": 2.0}, "method.sharpness=2.0 does nothing with method.official=true"),
        ("mka", {"official": True, "num_points": 99}, "method.num_points=99 does nothing with method.official=true"),
        ("mka", {"pairs": "last", "sharpness": 0.0, "num_neighbors": 3}, "method.num_neighbors=3 does nothing with"),
    ],
)
def test_what_would_do_nothing_is_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        method_of(name, **changes)


@pytest.mark.parametrize("architecture", ["phi3", "gpt_neox"])
@pytest.mark.parametrize("name", ["come", "come_posterior"])
def test_no_query_heads_are_picked_as_published_where_projections_are_fused(name, architecture):
    method_of(name, official_gqa=True).check(context_of(random_source("qwen3")))
    with pytest.raises(UserError, match=f"official_gqa=true: the published code cannot .* {architecture} model"):
        method_of(name, official_gqa=True).check(context_of(random_source(architecture)))
