"""A plan that contradicts itself is refused when it is read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slm_pipeline.errors import UserError
from slm_pipeline.methods.from_plan import FromPlan
from slm_pipeline.surgery.plan import Plan, format_groups, groups_of_windows

GOOD = {
    "format": 1,
    "model": {"name": "m", "fingerprint": "f", "num_layers": 6},
    "method": "slm",
    "options": {},
    "calibration": {},
    "layer_groups": [[0], [1], [2, 3, 4], [5]],
    "dropped": [],
    "ops": [{"op": "merge", "layers": [2, 3, 4], "rule": "official"}],
    "scores": {},
    "threshold": 0.8,
}


def read(tmp_path, **changes):
    (tmp_path / "plan.json").write_text(json.dumps({**GOOD, **changes}))
    return Plan.read(tmp_path / "plan.json")


def test_a_good_plan(tmp_path):
    assert read(tmp_path).num_layers == 4
    nested = [{"op": "merge", "layers": [3, 4], "rule": "mean"}, {"op": "merge", "layers": [2, 3, 4], "rule": "mean"}]
    assert read(tmp_path, ops=nested).num_layers == 4


def test_a_plan_put_right_is_another_decision_though_its_edits_are_the_same(tmp_path):
    """Else its replay would find what the wrong one left in the store, under the same key."""
    plan = read(tmp_path)
    path = str(tmp_path / "plan.json")
    options = FromPlan(path=path).options()
    assert FromPlan(path=path).options() == options
    for changes in ({"threshold": 0.9}, {"scores": {"steps": [1]}}, {"scores": {"loss": float("nan")}}):
        other = read(tmp_path, **changes)
        assert other.content() == plan.content()
        assert FromPlan(path=path).options() != options
    plan.tensors = {"fold": np.zeros((2, 3), dtype=np.float32)}
    turned = Plan(**{**vars(plan), "tensors": {"fold": np.zeros((3, 2), dtype=np.float32)}})
    assert turned.decision() != plan.decision()


OVERLAPPING = [{"op": "merge", "layers": [3, 4], "rule": "mean"}, {"op": "merge", "layers": [2, 3], "rule": "mean"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": [{"op": "merge", "layers": [1, 2, 3], "rule": "official"}]}, "ops do not lead to its layer_groups"),
        ({"ops": [{"op": "merge", "layers": [2, 3, 99], "rule": "official"}]}, "are not whole layers of the model"),
        ({"ops": [{"op": "merge", "layers": [2, 3, 4]}]}, "rule=None is not one of official"),
        ({"ops": [{"op": "merge", "layers": [2, 3, 4], "rule": "concatenate"}]}, "needs the tensor None.heads.0"),
        ({"ops": [{"op": "merge", "layers": [2, 3, 4], "rule": "weighted"}]}, "one share for each of its 3 parts"),
        ({"ops": [{"op": "twist", "layers": [2]}]}, "op 0 is 'twist'; this version knows drop, merge"),
        ({"ops": [{"op": "fold", "layers": [2]}]}, "op 0 needs the tensor None"),
        ({"ops": [{"op": "fold", "layers": [2, 3]}]}, r"layers=\[2, 3\] is not one layer of the model"),
        ({"ops": [{"op": "drop_sublayer", "layers": [2], "sublayer": "head"}]}, "'head' is not one of attention, mlp"),
        (
            {"ops": [{"op": "drop_sublayer", "layers": [2], "sublayer": "mlp", "export": "pickle"}]},
            "export='pickle' is not one of stock, custom",
        ),
        ({"ops": []}, "ops do not lead to its layer_groups"),
        ({"ops": OVERLAPPING}, "op 1: .* are not whole layers"),
        ({"layer_groups": [[0], [1], [2, 3, 4]]}, "must name each of the 6 layers once"),
        ({"format": 2}, "not a plan of format 1"),
        ({"surprise": 1}, "is not a plan"),
    ],
)
def test_contradictions(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **changes)


def test_groups_in_one_line():
    assert format_groups(groups_of_windows([(22, 24), (17, 18)], 30)) == "0-16 {17-18} 19-21 {22-24} 25-29"
    assert format_groups([[0], [2], [3], [5]]) == "0 2-3 5"
    assert format_groups([[0, 1], [2]]) == "{0-1} 2"


LOST = {"op": "drop_sublayer", "layers": [2], "sublayer": "mlp", "export": "stock"}


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (
            [LOST, {"op": "merge", "layers": [2, 3, 4], "rule": "mean"}],
            r"op 1: layers=\[2, 3, 4\] have lost a sublayer",
        ),
        ([LOST, {"op": "drop", "layers": [2]}], "op 1: .* have lost a sublayer"),
        ([LOST, {**LOST, "sublayer": "attention"}], "op 1: .* have lost a sublayer"),
        ([LOST, {**LOST, "layers": [0], "export": "custom"}], "written in one way, not as"),
    ],
)
def test_nothing_follows_the_loss_of_a_sublayer(ops, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, ops=ops)
