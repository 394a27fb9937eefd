"""Layers with other last projections: whose, of which shape, and what they compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_source
from plans import GOOD, narrowing, read, read_with

from slm_pipeline.errors import UserError
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply, planned_blocks
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.ops import LayerSize, Widths
from slm_pipeline.surgery.ops.replace import Replace
from slm_pipeline.surgery.ops.scale import Scale
from slm_pipeline.surgery.plan import Plan

BOTH = {"op": "replace", "layers": [1], "sublayers": ["attention", "mlp"], "tensors": "r"}
TENSORS = {"r.attention": np.ones((4, 3)), "r.mlp": np.ones((4, 5))}
SIZE = LayerSize(100, 1000, 1, heads=4, neurons=10, per_head=20, per_neuron=90, attention_bias=7, mlp_bias=0)


def test_it_is_written_read_counted_and_marked(tmp_path):
    ops = [*GOOD["ops"], {**BOTH, "layers": [2], "biases": ["attention"]}]
    plan = read_with(tmp_path, {**TENSORS, "r.attention_bias": np.zeros(4)}, ops=ops)
    plan.write(tmp_path / "again.json")
    again = Plan.read(tmp_path / "again.json")
    assert again.fingerprint() == plan.fingerprint()
    assert again.ops[1] == Replace((2,), ("attention", "mlp"), "r", biases=("attention",))
    sizes, changes = measure_changes(plan, [SIZE] * 6)
    assert [size.whole for size in sizes] == [1101, 1101, 1108, 1101]
    assert changes.lines[-1] == "new weights in the last projections of 2"
    assert (changes.marks[-1].label, changes.marks[-1].layers) == ("new weights", [2])


@pytest.mark.parametrize(
    ("op", "tensors", "message"),
    [
        ({**BOTH, "layers": [1, 2]}, TENSORS, "is not one layer"),
        ({**BOTH, "sublayers": []}, TENSORS, r"sublayers=\[\] must be one or all of attention, mlp, in this order"),
        ({**BOTH, "sublayers": ["mlp", "attention"]}, TENSORS, "in this order"),
        ({**BOTH, "sublayers": ["mlp", "mlp"]}, TENSORS, "must be one or all"),
        ({**BOTH, "sublayers": ["head"]}, TENSORS, r"sublayers=\['head'\] must be one or all"),
        ({**BOTH, "sublayers": "mlp"}, TENSORS, "sublayers='mlp' must be one or all"),
        ({**BOTH, "tensors": "s"}, TENSORS, "needs the tensor 's.attention'"),
        ({**BOTH, "export": "stock"}, TENSORS, "replace has no 'export'"),
        (BOTH, {**TENSORS, "r.mlp": np.ones(5)}, r"r.mlp \(float64, \[5\]\) must be a matrix of finite floats"),
        (BOTH, {**TENSORS, "r.mlp": np.full((4, 5), np.nan)}, "must be a matrix of finite floats"),
        (BOTH, {**TENSORS, "r.mlp": np.ones((4, 5), np.int64)}, r"int64, \[4, 5\]\) must be a matrix"),
        ({**BOTH, "biases": []}, TENSORS, r"biases=\[\] must be one or all of attention, mlp"),
        ({**BOTH, "biases": ["mlp"]}, TENSORS, "needs the tensor 'r.mlp_bias'"),
        ({**BOTH, "biases": ["mlp"]}, {**TENSORS, "r.mlp_bias": np.ones((1, 4))}, "must be a row of finite floats"),
        ({**BOTH, "norms": ["mlp"]}, TENSORS, "needs the tensor 'r.mlp_norm'"),
        ({**BOTH, "norms": ["head"]}, TENSORS, r"norms=\['head'\] must be one or all of attention, mlp"),
        ({**BOTH, "norms": ["mlp"]}, {**TENSORS, "r.mlp_norm": np.ones((4, 4))}, "must be a row of finite floats"),
        (BOTH, {**TENSORS, "r.mlp_bias": np.ones(4)}, "holds 'r.mlp_bias', which no op names"),
    ],
)
def test_what_is_no_replace(op, tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_with(tmp_path, tensors, ops=[op], layer_groups=[[layer] for layer in range(6)])


def test_a_sublayer_that_is_gone_gets_no_weights(tmp_path):
    gone = {"op": "drop_sublayer", "layers": [1], "sublayer": "mlp", "export": "stock"}
    groups = [[layer] for layer in range(6)]
    with pytest.raises(UserError, match=r"op 1: layers=\[1\] has lost its mlp: it writes nothing"):
        read_with(tmp_path, TENSORS, ops=[gone, BOTH], layer_groups=groups)
    tensors = {"r.attention": np.ones((4, 3))}
    read_with(tmp_path, tensors, ops=[gone, {**BOTH, "sublayers": ["attention"]}], layer_groups=groups)
    with pytest.raises(UserError, match=r"op 1: layers=\[1\] is not one layer"):
        read_with(tmp_path, TENSORS, ops=[{"op": "drop", "layers": [1]}, BOTH], layer_groups=groups[:1] + groups[2:])


def test_its_rows_are_as_wide_as_the_states(tmp_path):
    plan = read_with(tmp_path, TENSORS, ops=[BOTH], layer_groups=[[layer] for layer in range(6)])
    plan.check_sizes(Widths(heads=4, neurons=5, states=4))
    with pytest.raises(UserError, match="op 0 of the plan: the tensor r.attention has 4 rows, the states are 8 wide"):
        plan.check_sizes(Widths(heads=4, neurons=5, states=8))


@torch.no_grad()
def test_a_narrower_layer_takes_narrower_weights():
    model = load_dense(random_source())[0]
    view = ModelView(model)
    plan = narrowing({4: (None, [3, 40])})
    weights = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    plan.ops.append(Replace((4,), ("mlp",), "replace.4"))
    plan.tensors["replace.4.mlp"] = weights.numpy()
    plan.check("the plan")
    assert torch.equal(planned_blocks(plan, view)[4].replaced["mlp.down_proj.weight"], weights)
    plan.tensors["replace.4.mlp"] = np.ones((32, 3), np.float32)
    with pytest.raises(
        UserError, match=r"the new mlp.down_proj.weight of layer 4 is \[32, 3\], the model's is \[32, 2\]"
    ):
        apply(plan, model)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_layer_that_writes_half_leaves_the_other_half_out(architecture):
    source, ids = random_source(architecture), torch.arange(20).view(2, 10)
    model, half = load_dense(source)[0], load_dense(source)[0]
    plan = Plan({"name": "m", "fingerprint": "f", "num_layers": 6}, "test", {}, None, [Scale((5,), 0.5)])
    apply(plan, half)
    states = [m(ids, output_hidden_states=True).hidden_states[-2] for m in (model, half)]
    assert torch.equal(*states)
    layers = ModelView(model).layers, ModelView(half).layers
    outputs = ("self_attn.o_proj", "mlp.down_proj") if architecture == "llama" else ("self_attn.out_proj", "fc2")
    for output in outputs:
        for name, parameter in layers[0][5].get_submodule(output).named_parameters():
            assert torch.equal(layers[1][5].get_submodule(output).get_parameter(name), 0.5 * parameter)


@pytest.mark.parametrize("factor", [0, -1, None, "1", True])
def test_a_factor_is_above_0(factor, tmp_path):
    with pytest.raises(UserError, match="must be a number above 0"):
        read(tmp_path, ops=[{"op": "scale", "layers": [0], "factor": factor}, *GOOD["ops"]])


def test_the_norm_behind_a_projection_gets_other_gains(tmp_path):
    found = {}
    for architecture in ("gemma3_text", "llama"):
        source = random_source(architecture)
        model, _ = load_dense(source)
        view = ModelView(model)
        width = view.mlp_output(1).weight.shape
        tensors = {"r.mlp": np.zeros(width, np.float32), "r.mlp_norm": np.full(width[0], 0.5, np.float32)}
        op = {"op": "replace", "layers": [1], "sublayers": ["mlp"], "tensors": "r", "norms": ["mlp"]}
        plan = read_with(tmp_path, tensors, ops=[op], layer_groups=[[layer] for layer in range(6)])
        plan.write(tmp_path / f"{architecture}.json")
        found[architecture] = Plan.read(tmp_path / f"{architecture}.json"), model
    plan, model = found["gemma3_text"]
    assert plan.ops == [Replace((1,), ("mlp",), "r", norms=("mlp",))]
    before = model.model.layers[0].post_feedforward_layernorm.weight.clone()
    pruned = apply(plan, model)
    layers = pruned.model.layers
    assert torch.equal(layers[1].post_feedforward_layernorm.weight, torch.full_like(before, 0.5))
    assert torch.equal(layers[0].post_feedforward_layernorm.weight, before)
    plan, model = found["llama"]
    with pytest.raises(UserError, match="layer 1 has no norm behind its mlp that could get other gains"):
        apply(plan, model)
