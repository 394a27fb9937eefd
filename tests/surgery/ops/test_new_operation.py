"""An operation that this package does not have: one class, registered, and every stage and report knows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from conftest import run_slm

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.ops import OPS, LayerSize, read_op
from slm_pipeline.surgery.ops.base import Op, check_keys, check_one, read_layer, register
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

NORM = "input_layernorm.weight"


@dataclass(frozen=True)
class Damp(Op):
    """One layer's attention reads its input times a factor."""

    name: ClassVar[str] = "damp"

    factor: float

    @classmethod
    def from_json(cls, values, tensors, where):
        check_keys(values, where, "factor")
        if not isinstance(values.get("factor"), float):
            raise UserError(f"{where}: factor must be a float")
        return cls(read_layer(values, where), values["factor"])

    def check(self, members, where):
        return check_one(self, members, where)

    def count(self, members):
        return replace(members[0], idle=1)

    def apply(self, view, members, tensors):
        (block,) = members
        return replace(block, replaced={**block.replaced, NORM: block.parameter(view, NORM) * self.factor})


@pytest.fixture
def damp(monkeypatch):
    monkeypatch.setitem(OPS, "damp", None)  # afterwards it is forgotten
    del OPS["damp"]
    register(Damp)


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setitem(OPS, "drop", Drop)
    with pytest.raises(ValueError, match="two operations have the name drop"):
        register(type("Other", (Drop,), {}))
    assert OPS["drop"] is Drop
    assert register(Drop) is Drop


def test_whoever_does_not_know_it_says_so():
    with pytest.raises(UserError, match="^the plan: op 3 is 'damp'; this version knows correct, drop, "):
        read_op({"op": "damp", "layers": [1], "factor": 0.5}, {}, "the plan: op 3")


def test_it_nests_with_the_others(damp, tmp_path):
    model = {"name": "m", "fingerprint": "f", "num_layers": 6}
    ops = [Damp((1,), 0.5), Merge((1, 2), "mean"), Damp((1,), 0.5), Drop((0,)), DropSublayer((4,), "mlp", "custom")]
    plan = Plan(model, "by_hand", {}, {}, ops)
    plan.check("the plan")
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert plan.layer_groups == [[1, 2], [3], [4], [5]]
    sizes, changes = measure_changes(plan, [LayerSize(10, 100)] * 6)
    assert [size.at_work for size in sizes] == [109, 110, 10, 110]
    assert changes.idle_parameters == 1
    assert changes.lines[:2] == ["damp of 1", "dropped: feed-forward of 4"]
    with pytest.raises(UserError, match=r"op 5: layers=\[4\] have lost a sublayer already"):
        replace(plan, ops=[*ops, Damp((4,), 2.0)]).check("the plan")


def test_a_job_takes_it_from_a_plugin_alone(damp, tmp_path):
    """Whose code is part of what its checkpoint is; tests/test_extending.py has one from a plugin, to the end."""
    model = {"name": "random", "fingerprint": "x", "num_layers": 4}
    Plan(model, "by_hand", {}, None, ops=[Drop((2,)), Damp((3,), 0.5)]).write(tmp_path / "plan.json")
    outcome = run_slm("model=random", "method=from_plan", f"method.path={tmp_path / 'plan.json'}", "dry_run=true")
    assert (outcome.status, outcome.out) == (2, "")
    assert "test_new_operation.Damp is of no plugin; name its package: plugins=[" in outcome.err
