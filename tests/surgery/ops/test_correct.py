"""Layers that read through a linear map: whose, and what they compute."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import peculiar_model
from plans import GOOD, narrowing, read_with
from repairs import plan_of

from slm_pipeline.errors import UserError
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.ops import LayerSize
from slm_pipeline.surgery.ops.correct import Correct
from slm_pipeline.surgery.plan import Plan

BOTH = {"op": "correct", "layers": [1], "sublayers": ["attention", "mlp"], "tensors": "r"}
TENSORS = {"r.attention": np.eye(4), "r.mlp": np.eye(4)}
SIZE = LayerSize(100, 1000, 1, heads=4, neurons=10, per_head=20, per_neuron=90, attention_bias=7, mlp_bias=0)


def test_it_is_written_read_counted_and_marked(tmp_path):
    plan = read_with(tmp_path, TENSORS, ops=[*GOOD["ops"], {**BOTH, "layers": [2]}])
    plan.write(tmp_path / "again.json")
    again = Plan.read(tmp_path / "again.json")
    assert again.fingerprint() == plan.fingerprint()
    assert again.ops[1] == Correct((2,), ("attention", "mlp"), "r")
    sizes, changes = measure_changes(plan, [SIZE] * 6)
    assert [size.whole for size in sizes] == [1101] * 4
    assert changes.lines[-1] == "what 2 read is corrected by linear maps"
    assert (changes.marks[-1].label, changes.marks[-1].layers) == ("corrected", [2])


@pytest.mark.parametrize(
    ("op", "tensors", "message"),
    [
        ({**BOTH, "layers": [1, 2]}, TENSORS, "is not one layer"),
        ({**BOTH, "sublayers": []}, TENSORS, r"sublayers=\[\] must be one or all of attention, mlp, in this order"),
        ({**BOTH, "tensors": "s"}, TENSORS, "needs the tensor 's.attention'"),
        ({**BOTH, "biases": []}, TENSORS, "correct has no 'biases'"),
        (BOTH, {**TENSORS, "r.mlp": np.full((4, 4), np.inf)}, "must be a matrix of finite floats"),
    ],
)
def test_what_is_no_correction(op, tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_with(tmp_path, tensors, ops=[op], layer_groups=[[layer] for layer in range(6)])


def test_a_sublayer_that_is_gone_reads_nothing(tmp_path):
    gone = {"op": "drop_sublayer", "layers": [1], "sublayer": "mlp", "export": "stock"}
    with pytest.raises(UserError, match=r"op 1: layers=\[1\] has lost its mlp: it reads nothing"):
        read_with(tmp_path, TENSORS, ops=[gone, BOTH], layer_groups=[[layer] for layer in range(6)])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@torch.no_grad()
def test_a_sublayer_reads_what_the_map_makes_of_its_input(architecture):
    """Each projection that reads puts out W (M x), whatever it is called, also where the sublayer is narrower."""
    model = peculiar_model(architecture)
    width = model.config.hidden_size
    matrix = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    groups = ModelView(model).num_kv_heads
    narrower = narrowing({1: (None if groups == 1 else [0], [0, 3, 5])})
    correct = Correct((1,), ("attention", "mlp"), "m")
    tensors = {**narrower.tensors, "m.attention": matrix, "m.mlp": 2 * matrix}
    plan = dataclasses.replace(narrower, ops=[*narrower.ops, correct], tensors=tensors)
    before, after = (apply(one, copy.deepcopy(model)) for one in (narrower, plan))
    view, num_read = ModelView(before), 0
    for name, weight in view.layers[1].named_parameters():
        now = ModelView(after).layers[1].get_parameter(name)
        part = next((p for p in ("attention", "mlp") if name in view.reading_names(1, p)), None)
        if part is None:
            torch.testing.assert_close(now, weight, rtol=0, atol=0)
        else:
            num_read += 1
            scale = 1 if part == "attention" else 2
            torch.testing.assert_close(now, weight @ (scale * torch.from_numpy(matrix)), rtol=1e-5, atol=1e-5)
    fused = {"phi3": 2, "gpt_neox": 2, "opt": 4}
    assert num_read == fused.get(architecture, 5)


def test_a_map_of_another_width_is_refused():
    correct, tensors = Correct((1,), ("mlp",), "m"), {"m.mlp": np.eye(5, dtype=np.float32)}
    with pytest.raises(UserError, match=r"the tensor m.mlp is \[5, 5\], the states are 32 wide"):
        apply(plan_of(correct, tensors=tensors), peculiar_model("llama"))
