"""Operations in any order: what a plan allows can be done, is of the size it says, and computes what its steps do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import random_source
from hypothesis import given
from hypothesis import strategies as st

from slm_pipeline.errors import UserError
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import byte_tokenizer, load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply, layer_sizes
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

SOURCE = random_source(num_layers=5)
IDS = torch.arange(24).view(2, 12) * 7 % 256


def plan_of(num_layers, ops, tensors):
    return Plan({"name": "m", "fingerprint": "f", "num_layers": num_layers}, "test", {}, None, ops, tensors=tensors)


@st.composite
def operation(draw, number, depth):
    """One on a model of so many layers, and its tensors; some cannot be done to what others have left."""
    layer = draw(st.integers(0, depth - 1))
    kinds = ["drop", "merge", "resize", "resize", "drop_sublayer", "fold"]
    kind, name, generator = draw(st.sampled_from(kinds)), f"{number}", np.random.default_rng(number)
    if kind == "drop":
        return Drop((layer,)), {}
    if kind == "merge":
        rule = draw(st.sampled_from(["official", "mean", "keep_lowest", "keep_highest", "base_difference"]))
        return Merge((layer, min(layer + 1, depth - 1)) if layer < depth - 1 else (layer - 1, layer), rule), {}
    if kind == "drop_sublayer":
        return DropSublayer((layer,), draw(st.sampled_from(["attention", "mlp"])), "custom"), {}
    if kind == "fold":
        return Fold((layer,), name), {name: np.eye(32, dtype=np.float32) + 0.1 * generator.random((32, 32), np.float32)}
    heads, neurons = draw(st.sampled_from([(1, None), (None, 9), (1, 20)]))
    tensors = {f"{name}.heads": np.array([draw(st.integers(0, 1))])} if heads else {}
    if neurons:
        tensors[f"{name}.neurons"] = np.sort(generator.permutation(48)[:neurons])
    biases = draw(st.sampled_from([None, "mlp" if neurons else "attention"]))
    if biases:
        tensors[f"{name}.{biases}_bias"] = generator.standard_normal(32).astype(np.float32)
    return Resize((layer,), name, heads, neurons, biases=(biases,) if biases else None), tensors


@st.composite
def sequences(draw):
    return [draw(operation(number, 3)) for number in range(draw(st.integers(1, 4)))]


@pytest.fixture(scope="module")
def dense():
    return load_dense(SOURCE)[0]


@torch.no_grad()
@given(sequence=sequences())
def test_what_a_plan_allows_is_its_steps_one_after_the_other(dense, tmp_path_factory, sequence):
    """Each is planned for the model that the ones before it left, as steps of `method=combined` are."""
    whole, stepped = plan_of(5, [], {}), copy.deepcopy(dense)
    for op, tensors in sequence:
        before = (list(whole.ops), dict(whole.tensors))
        step = plan_of(whole.num_layers, [op], tensors)
        if max(op.layers) >= whole.num_layers:
            continue
        try:
            whole.then(step, f"{len(whole.ops)}.")
            whole.check("the plan")
        except UserError:
            whole.ops, whole.tensors = before
            continue
        stepped = apply(step, stepped)
    found = apply(whole, copy.deepcopy(dense))
    expected = stepped(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    sizes, _ = measure_changes(whole, layer_sizes(ModelView(dense)))
    view = ModelView(found)
    assert [size.whole for size in sizes] == [view.block_parameters(layer) for layer in range(view.num_layers)]
    folder = tmp_path_factory.mktemp("nested") / "model"
    reloaded = checkpoint.save(found, byte_tokenizer(), folder, card="", config=SOURCE.config)
    torch.testing.assert_close(reloaded(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
