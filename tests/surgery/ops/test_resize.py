"""Layers that keep some heads and neurons: which, once, among the other operations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import random_source
from hypothesis import given
from hypothesis import strategies as st
from plans import read_with

from slm_pipeline.errors import UserError
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import planned_blocks
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.ops import LayerSize, Widths
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

HEADS = {"op": "resize", "layers": [1], "tensors": "a", "heads": 2}
NEURONS = {"op": "resize", "layers": [1], "tensors": "b", "neurons": 3}
TENSORS = {"a.heads": [0, 2], "b.neurons": [1, 3, 4]}
BIASED = {**NEURONS, "biases": ["mlp"]}
UNTOUCHED = [[layer] for layer in range(6)]
SIZE = LayerSize(100, 1000, 1, heads=4, neurons=10, per_head=20, per_neuron=90, attention_bias=7, mlp_bias=0)


def read_resized(tmp_path, *ops, tensors=TENSORS, groups=None):
    groups = UNTOUCHED if groups is None else groups
    dropped = sorted(set(range(6)) - {layer for group in groups for layer in group})
    return read_with(tmp_path, tensors, ops=list(ops), layer_groups=groups, dropped=dropped)


def test_a_plan_of_both_is_written_read_and_counted(tmp_path):
    tensors = {**TENSORS, "a.attention_bias": np.zeros(4, np.float32)}
    plan = read_resized(tmp_path, {**HEADS, "biases": ["attention"]}, NEURONS, tensors=tensors)
    plan.write(tmp_path / "again.json")
    again = Plan.read(tmp_path / "again.json")
    assert again.fingerprint() == plan.fingerprint()
    assert again.ops == [Resize((1,), "a", heads=2, biases=("attention",)), Resize((1,), "b", neurons=3)]
    sizes, changes = measure_changes(plan, [SIZE] * 6)
    assert (sizes[0], sizes[1].attention, sizes[1].mlp, sizes[1].other) == (SIZE, 100 - 2 * 20 + 7, 1000 - 7 * 90, 1)
    assert changes.lines == [
        "narrower: 2 key-value groups left in layers 1; 3 neurons left in layers 1, with a constant for what is gone:"
        " 663 parameters less"
    ]
    assert [(mark.label, mark.layers, mark.part) for mark in changes.marks] == [("narrower", [1], "whole")]


def test_the_words_name_runs_of_layers(tmp_path):
    ops = [{**NEURONS, "layers": [layer], "tensors": f"t{layer}"} for layer in (0, 1, 2, 5)]
    tensors = {f"t{layer}.neurons": [0, 1, 2] for layer in (0, 1, 2)} | {"t5.neurons": [0]}
    plan = read_resized(tmp_path, *ops[:3], {**ops[3], "neurons": 1}, tensors=tensors)
    line = measure_changes(plan, [SIZE] * 6)[1].lines[0]
    assert line == "narrower: 1 to 3 neurons left in layers 0-2, 5: 2700 parameters less"


@torch.no_grad()
def test_what_stays_by_hand():
    view = ModelView(load_dense(random_source("phi3"))[0])  # 4 heads of width 8 on 2 groups, all in one projection
    tensors = {"a.heads": np.array([1]), "a.neurons": np.array([3, 40])}
    plan = Plan({"name": "m", "fingerprint": "f", "num_layers": 6}, "test", {}, None, [], tensors=tensors)
    plan.ops = [Resize((4,), "a", heads=1, neurons=2)]
    block, layer = planned_blocks(plan, view)[4], view.layers[4]
    qkv = layer.self_attn.qkv_proj.weight
    rows = [*range(16, 32), *range(32 + 8, 32 + 16), *range(48 + 8, 48 + 16)]  # queries of heads 2 and 3, key, value
    assert torch.equal(block.replaced.pop("self_attn.qkv_proj.weight"), qkv[rows])
    assert torch.equal(block.replaced.pop("self_attn.o_proj.weight"), layer.self_attn.o_proj.weight[:, 16:])
    gate_up = layer.mlp.gate_up_proj.weight
    assert torch.equal(block.replaced.pop("mlp.gate_up_proj.weight"), gate_up[[3, 40, 48 + 3, 48 + 40]])
    assert torch.equal(block.replaced.pop("mlp.down_proj.weight"), layer.mlp.down_proj.weight[:, [3, 40]])
    assert not block.replaced


@pytest.mark.parametrize(
    ("op", "tensors", "message"),
    [
        ({**HEADS, "layers": [1, 2]}, TENSORS, "is not one layer"),
        ({**HEADS, "heads": 0}, TENSORS, "heads=0 must be a whole number, at least 1"),
        ({**HEADS, "heads": True}, TENSORS, "heads=True must be a whole number"),
        ({**HEADS, "heads": None}, TENSORS, "neither how many heads nor how many neurons"),
        ({**HEADS, "heads": 3}, TENSORS, "int64 indices of the 3 heads that stay"),
        ({**HEADS, "tensors": "c"}, TENSORS, "needs the tensor 'c.heads', which plan.safetensors does not hold"),
        ({**HEADS, "sublayer": "mlp"}, TENSORS, "resize has no 'sublayer'"),
        (HEADS, {"a.heads": [2, 0]}, "ascending"),
        (HEADS, {"a.heads": [1, 1]}, "ascending"),
        (HEADS, {"a.heads": [-1, 0]}, "from 0"),
        (HEADS, {"a.heads": [0.0, 1.0]}, r"\(float64, \[2\]\) must be the int64 indices"),
        (HEADS, {"a.heads": [[0, 2]]}, r"\(int64, \[1, 2\]\) must be the int64 indices"),
        ({**HEADS, "biases": ["mlp"]}, TENSORS, r"biases=\['mlp'\] must be one or all of attention"),
        ({**HEADS, "biases": []}, TENSORS, r"biases=\[\] must be one or all of attention"),
        (BIASED, TENSORS, "needs the tensor 'b.mlp_bias'"),
        (BIASED, {**TENSORS, "b.mlp_bias": [0, 1]}, r"b.mlp_bias \(int64, \[2\]\) must be a row of finite floats"),
        (BIASED, {**TENSORS, "b.mlp_bias": [0.0, np.nan]}, "must be a row of finite floats"),
        (HEADS, {**TENSORS, "a.neurons": [0]}, "holds 'a.neurons', which no op names"),
    ],
)
def test_what_is_no_resize(op, tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_resized(tmp_path, op, tensors=tensors)


def merge(rule):
    return {"op": "merge", "layers": [1, 2], "rule": rule}


LOST = {"op": "drop_sublayer", "layers": [1], "sublayer": "mlp", "export": "stock"}
MERGED = [[0], [1, 2], [3], [4], [5]]


@pytest.mark.parametrize(
    ("ops", "groups"),
    [
        ([HEADS, NEURONS, {"op": "drop", "layers": [1]}], [[0], [2], [3], [4], [5]]),
        ([merge("mean"), HEADS, NEURONS], MERGED),
        ([HEADS, NEURONS, merge("official")], MERGED),
        ([HEADS, LOST, NEURONS], None),
        ([NEURONS, HEADS, LOST], UNTOUCHED),
        ([HEADS, NEURONS, merge("keep_highest"), {**HEADS, "tensors": "c"}], MERGED),
    ],
)
def test_it_stands_before_and_after_the_others(ops, groups, tmp_path):
    tensors = {**TENSORS, "c.heads": [0, 1]} if any(op.get("tensors") == "c" for op in ops) else TENSORS
    if groups is None:
        with pytest.raises(UserError, match=r"op 2: layers=\[1\] has lost its mlp: nothing is left to cut"):
            read_resized(tmp_path, *ops, tensors=tensors)
        return
    assert read_resized(tmp_path, *ops, tensors=tensors, groups=groups).layer_groups == groups


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([HEADS, NEURONS, merge("mean")], "have lost heads or neurons, so rule=mean cannot mix them"),
        ([NEURONS, HEADS, HEADS], r"op 2: layers=\[1\]: its attention is resized a second time"),
        ([{"op": "drop", "layers": [1]}, HEADS, NEURONS], r"op 1: layers=\[1\] is not one layer"),
    ],
)
def test_where_it_cannot_stand(ops, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_resized(tmp_path, *ops)


def test_its_tensors_fit_the_model(tmp_path):
    tensors = {**TENSORS, "b.mlp_bias": np.zeros(4)}
    plan = read_resized(tmp_path, HEADS, BIASED, tensors=tensors)
    plan.check_sizes(Widths(heads=3, neurons=5, states=4))
    with pytest.raises(UserError, match="op 0 .* keeps number 2 of a layer's key-value groups; the model's have 2"):
        plan.check_sizes(Widths(heads=2, neurons=5, states=4))
    with pytest.raises(UserError, match="op 1 .* keeps number 4 of a layer's neurons; the model's have 4"):
        plan.check_sizes(Widths(heads=3, neurons=4, states=4))
    with pytest.raises(UserError, match="the bias of its mlp is 4, the states 5 wide"):
        plan.check_sizes(Widths(heads=3, neurons=5, states=5))


VALUES = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3) | st.just(["mlp"])
KEYS = ("op", "layers", "tensors", "heads", "neurons", "biases", "rule")
ARRAYS = st.sampled_from([[0, 2], [1, 3, 4], [], [[0]], [0.5, 1.0], [np.inf], [True], [2, 1], [-1, 2]])


@given(st.dictionaries(st.sampled_from(KEYS), VALUES), ARRAYS, ARRAYS, ARRAYS)
def test_whatever_is_wrong_in_it_is_one_line(tmp_path, changes, heads, neurons, bias):
    op = {**HEADS, "neurons": 3, "biases": ["mlp"], **changes}
    plan, message = None, ""
    try:
        plan = read_resized(tmp_path, op, tensors={"a.heads": heads, "a.neurons": neurons, "a.mlp_bias": bias})
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert (plan is None) == bool(message)
    assert plan is None or json.loads(json.dumps(plan.ops[0].to_json())).items() <= op.items()
