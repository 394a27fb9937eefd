"""An operation that this package does not have: one class, registered, and every stage and report knows it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import run_slm
from safetensors.torch import load_file

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
    with pytest.raises(UserError, match="^the plan: op 3 is 'damp'; this version knows drop, "):
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


def test_it_goes_through_the_whole_pipeline(damp, tmp_path):
    values = {
        "format": 1,
        "model": {"name": "random", "fingerprint": "x", "num_layers": 4},
        "method": "by_hand",
        "options": {},
        "calibration": None,
        "layer_groups": [[0], [1], [3]],
        "dropped": [2],
        "ops": [{"op": "drop", "layers": [2]}, {"op": "damp", "layers": [3], "factor": 0.5}],
    }
    (tmp_path / "plan.json").write_text(json.dumps(values))
    (tmp_path / "text.txt").write_text("The mill stood by the river. " * 40)
    outcome = run_slm(
        "model=random", "method=from_plan", f"method.path={tmp_path / 'plan.json'}", "recovery=none", "evaluation=none",
        "calibration=text_file", f"calibration.path={tmp_path / 'text.txt'}", "calibration.num_samples=2",
        "calibration.seq_len=16", f"output_dir={tmp_path / 'out'}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "damp of 3" in outcome.out
    (file,) = tmp_path.glob("out/runs/*/*/summary.json")
    summary = json.loads(file.read_text())
    assert summary["layer_groups"] == values["layer_groups"]
    assert summary["changes"]["lines"] == ["damp of 3"]
    assert summary["changes"]["marks"] == [{"label": "damp", "layers": [3], "part": "whole"}]
    assert "damp" in (file.parent / "layer_groups.svg").read_text()
    folder = Path(summary["checkpoint"])
    assert "damp of 3" in (folder / "README.md").read_text()
    weights = load_file(folder / "model.safetensors")
    torch.testing.assert_close(weights["model.layers.2." + NORM], 0.5 * weights["model.layers.1." + NORM])
