"""Linear maps in the place of layers that went."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_source
from plans import GOOD, read, read_with

from slm_pipeline.errors import UserError
from slm_pipeline.models.loading import load_dense
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops import Widths
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.plan import Plan

FOLD = [{"op": "fold", "layers": [1], "tensor": "fold.0"}, *GOOD["ops"]]


def test_a_map_fits_one_width_of_model(tmp_path):
    plan = read_with(tmp_path, {"fold.0": np.eye(4, dtype=np.float32)}, ops=FOLD)
    plan.check_sizes(Widths(heads=2, neurons=4, states=4))
    with pytest.raises(UserError, match=r"op 0 of the plan: the linear map is \[4, 4\], the states are 5 wide"):
        plan.check_sizes(Widths(heads=2, neurons=4, states=5))


def test_a_map_for_another_width_is_not_applied():
    model = {"name": "random", "fingerprint": "x", "num_layers": 6}
    plan = Plan(model, "test", {}, {}, [Fold((1,), "t")], tensors={"t": np.eye(4, dtype=np.float32)})
    with pytest.raises(UserError, match=r"the linear map is \[4, 4\], the states are 32 wide"):
        apply(plan, load_dense(random_source())[0])


def test_a_merged_layer_goes_by_its_lowest(tmp_path):
    ops = [*GOOD["ops"], {"op": "fold", "layers": [2], "tensor": "fold.0"}]
    plan = read_with(tmp_path, {"fold.0": np.eye(4, dtype=np.float32)}, ops=ops)
    assert [layer.folded for layer in plan.layers()] == [False, False, True, False]
    with pytest.raises(UserError, match=r"op 1: layers=\[3\] is not one layer of the model at that point"):
        read(tmp_path, ops=[*GOOD["ops"], {**ops[1], "layers": [3]}])


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ({"layers": [2]}, "op 0 needs the tensor None"),
        ({"layers": [2], "tensor": ["fold.0"]}, r"op 0 needs the tensor \['fold.0'\]"),
        ({"layers": [2, 3]}, r"layers=\[2, 3\] is not one layer of the model"),
        ({"layers": [2], "tensor": "fold.0", "bias": "fold.1"}, "fold has no 'bias'; it has op, layers, tensor"),
    ],
)
def test_what_is_no_fold(op, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, ops=[{"op": "fold", **op}])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((4, 3), np.float32), "must be a square matrix of finite floats"),
        (np.zeros(4, np.float32), "must be a square matrix"),
        (np.zeros((0, 0), np.float32), "must be a square matrix"),
        (np.zeros((4, 4), np.int64), r"int64, \[4, 4\]\) must be a square matrix of finite floats"),
        (np.full((4, 4), np.nan, np.float32), "finite floats"),
        (np.full((4, 4), np.inf, np.float64), "finite floats"),
    ],
)
def test_a_linear_map_that_is_none(matrix, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_with(tmp_path, {"fold.0": matrix}, ops=FOLD)
