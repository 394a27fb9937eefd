"""FinerCut against the plain greedy loop over whole models."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import random_source, run_slm
from problems import problem_of

from slm_pipeline.engine import walk
from slm_pipeline.errors import UserError
from slm_pipeline.methods.finercut import OBJECTIVES, FinerCut
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply


def problem_for(architecture, input_ids, num_layers=5, **asked):
    source = random_source(architecture, num_layers=num_layers)
    model, _ = load_dense(source)
    with torch.no_grad():  # differences that float32 tells apart
        for index, layer in enumerate(ModelView(model).layers):
            for parameter in layer.parameters():
                parameter.mul_(1 + 0.3 * index)
    return problem_of(model, source, input_ids, **(asked or {"num_remove": 2}))


def silenced(model, removed):
    """A copy whose removed sublayers' last projections are zero."""
    view = ModelView(copy.deepcopy(model))
    for layer, part in removed:
        output = view.attention_output(layer) if part == "attention" else view.mlp_output(layer)
        for parameter in output.parameters():
            parameter.data.zero_()
    return view.model


@torch.no_grad()
def distance(dense, pruned, input_ids, objective):
    """Mean over tokens, sample by sample, from two whole forward passes."""
    values = []
    for row in input_ids:
        if objective == "jensen_shannon":
            p, q = (model(input_ids=row[None]).logits[0].double().softmax(-1) for model in (dense, pruned))
            middle = (p + q) / 2
            value = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
        else:
            a, b = (ModelView(m).decoder(input_ids=row[None]).last_hidden_state[0] for m in (dense, pruned))
            if objective == "euclidean":
                value = (a - b).square().sum(-1).sqrt()
            else:
                value = ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).clamp(-1, 1).arccos() / math.pi
        values.append(value.mean())
    return float(torch.stack(values).mean())


def naive(model, input_ids, objective, num_rounds):
    candidates = [(layer, part) for layer in range(ModelView(model).num_layers) for part in ("attention", "mlp")]
    removed, found = [], []
    for _ in range(num_rounds):
        values = {c: distance(model, silenced(model, [*removed, c]), input_ids, objective) for c in candidates}
        best = min(values, key=values.get)
        removed.append(best)
        candidates.remove(best)
        found.append(values)
    return removed, found


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma3_text"])
def test_it_equals_the_plain_loop(architecture, objective, input_ids, monkeypatch):
    monkeypatch.setattr(walk, "_TEXT_TOKENS", 12)  # one sample after the other
    problem = problem_for(architecture, input_ids)
    removed, values = naive(problem.view.model, input_ids, objective, 4)
    plan = FinerCut(objective=objective, counts="sublayers").plan(problem)
    assert [row["removed"] for row in plan.scores["rounds"]] == [f"{layer}.{part}" for layer, part in removed]
    for row, expected in zip(plan.scores["rounds"], values, strict=True):
        measured = {name: value for name, value in row["distances"].items() if value is not None}
        named = {f"{layer}.{part}": value for (layer, part), value in expected.items()}
        assert measured == pytest.approx({name: named[name] for name in measured}, rel=1e-3, abs=2e-5)
        assert all(named[name] >= row["distance"] * 0.999 for name in named.keys() - measured.keys())
    expected = silenced(problem.view.model, removed)(input_ids=input_ids, use_cache=False).logits
    logits = apply(plan, problem.view.model)(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_loses_both_goes(input_ids):
    problem = problem_for("llama", input_ids, num_remove=1)
    with torch.no_grad():
        problem.view.layers[3].self_attn.o_proj.weight.zero_()
        problem.view.layers[3].mlp.down_proj.weight.zero_()
    plan = FinerCut().plan(problem)
    assert plan.dropped == [3]
    assert [op.to_json() for op in plan.ops] == [{"op": "drop", "layers": [3]}]


def test_the_number_of_parameters_decides(input_ids):
    problem = problem_for("llama", input_ids)
    view = problem.view
    attention, mlp = view.sublayer_parameters(0, "attention"), view.sublayer_parameters(0, "mlp")
    asked = {wanted: {"num_parameters": wanted} for wanted in (1, attention + mlp, 3 * attention + 2 * mlp)}
    asked[2 * view.block_parameters(0)] = {"num_remove": 2}  # of layers: as many parameters as they have
    for wanted, target in asked.items():
        plan = FinerCut().plan(problem_for("llama", input_ids, **target))
        sizes = [attention if row["removed"].endswith("attention") else mlp for row in plan.scores["rounds"]]
        assert sum(sizes) >= wanted > sum(sizes[:-1])


def test_a_number_of_layers_is_their_parameters_or_twice_as_many_sublayers(input_ids):
    """Where attention, the smaller sublayer, matters least: of 3,104 and 4,640 parameters, 15,488 in two layers."""
    problem = problem_for("llama", input_ids)
    with torch.no_grad():
        for layer in problem.view.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
    removed = {
        counts: [row["removed"].partition(".")[2] for row in FinerCut(counts=counts).plan(problem).scores["rounds"]]
        for counts in ("parameters", "sublayers")
    }
    assert removed == {"parameters": ["attention"] * 5, "sublayers": ["attention"] * 4}


def test_protected_layers_keep_both(input_ids):
    plan = FinerCut(protect_first=2, protect_last=1).plan(problem_for("llama", input_ids, num_remove=2))
    assert {int(row["removed"].split(".")[0]) for row in plan.scores["rounds"]} <= {2, 3}
    assert plan.dropped == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "cosine"}, "'cosine' is not one of angular"),
        ({"export": "onnx"}, "'onnx' is not one of stock"),
        ({"counts": "layers"}, "'layers' is not one of parameters"),
        ({"protect_first": -1}, "-1 must be at least 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        FinerCut(**options)


@pytest.mark.parametrize("export", ["stock", "custom"])
def test_a_ratio_of_parameters_counts_those_at_work(export, tmp_path):
    """...whatever the checkpoint holds beside them, and the summary tells both."""
    outcome = run_slm(
        "model=random", "method=finercut", f"method.export={export}", "calibration.num_samples=2",
        "calibration.seq_len=16", "calibration.source=text_file", f"calibration.path={__file__}", "pruning_ratio=r10",
        "pruning_ratio.of=parameters", "recovery=none", "evaluation=none", "pictures=false", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (file,) = tmp_path.glob("runs/slm/*/summary.json")
    summary = json.loads(file.read_text())
    assert 0.1 <= summary["pruning_ratio"]["got_parameters"] < 0.25
    dense, pruned = summary["parameters"].values()
    at_work = pruned - (summary["sublayers"]["parameters"] if export == "stock" else 0)
    assert summary["pruning_ratio"]["got_parameters"] == round(1 - at_work / dense, 4)
    assert (pruned > 0.9 * dense) == (export == "stock") == ("of them at work" in outcome.out)


@pytest.mark.parametrize("export", ["stock", "custom"])
def test_the_summary_says_what_was_written(export, tmp_path):
    outcome = run_slm(
        "model=random",
        "model.num_layers=4",
        "method=finercut",
        f"method.export={export}",
        "method.protect_first=1",
        "calibration.num_samples=2",
        "calibration.seq_len=16",
        "calibration.source=text_file",
        f"calibration.path={__file__}",
        "pruning_ratio=r25",
        "recovery=none",
        "evaluation=none",
        "tracker=jsonl",
        f"output_dir={tmp_path}",
    )
    assert outcome.status == 0, outcome.err
    said = {"stock": "method.export=custom leaves them out", "custom": "trust_remote_code=True"}
    assert said[export] in " ".join(outcome.out.split())
