"""Layers that lose a sublayer: then they can become narrower or go, and no more; all lose it in one way."""

from __future__ import annotations

import pytest
from plans import GOOD, read

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.changes import Changes, measure_changes
from slm_pipeline.surgery.ops import LayerSize

LOST = {"op": "drop_sublayer", "layers": [2], "sublayer": "mlp", "export": "stock"}


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (
            [LOST, {"op": "merge", "layers": [2, 3, 4], "rule": "mean"}],
            r"op 1: layers=\[2, 3, 4\] have lost a sublayer",
        ),
        ([LOST, {**LOST, "sublayer": "attention"}], "op 1: .* have lost a sublayer"),
        ([LOST, {**LOST, "layers": [0], "export": "custom"}], "written in one way, not as"),
    ],
)
def test_nothing_is_made_of_a_layer_that_has_lost_a_sublayer(ops, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, ops=ops)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ({"layers": [2], "sublayer": "head"}, "'head' is not one of attention, mlp"),
        ({"layers": [2], "sublayer": "mlp", "export": "pickle"}, "export='pickle' is not one of stock, custom"),
        ({"layers": [2, 3], "sublayer": "mlp", "export": "stock"}, "is not one layer of the model"),
        ({"layers": [2], "sublayer": "mlp", "export": "stock", "rule": "mean"}, "drop_sublayer has no 'rule'"),
    ],
)
def test_what_is_no_loss_of_a_sublayer(op, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, ops=[{"op": "drop_sublayer", **op}])


@pytest.mark.parametrize("export", ["stock", "custom"])
def test_after_a_merge_the_lowest_layer_stands_for_the_loss(export, tmp_path):
    ops = [*GOOD["ops"], {**LOST, "export": export}, {**LOST, "export": export, "layers": [5], "sublayer": "attention"}]
    plan = read(tmp_path, ops=ops)
    lost, nothing = {"attention": [3], "mlp": [2]}, {"attention": [], "mlp": []}
    assert (plan.zeroed(), plan.absent()) == ((lost, nothing) if export == "stock" else (nothing, lost))
    sizes, changes = measure_changes(plan, [LayerSize(10, 100, other=1)] * 6)
    assert [size.at_work for size in sizes] == [111, 111, 11, 101]
    assert sum(size.whole for size in sizes) == (444 if export == "stock" else 334)
    assert changes.idle_parameters == (110 if export == "stock" else 0)
    assert changes.facts == {"sublayers": {"export": export, "attention": [5], "mlp": [2], "parameters": 110}}
    assert changes.lines[0] == "dropped: attention of 5; feed-forward of 2"
    assert changes.lines[1].split(" 110 ")[0] == (
        "the checkpoint has the dense model's class and" if export == "stock" else "the checkpoint leaves their"
    )
    assert [(mark.layers, mark.part) for mark in changes.marks] == [([5], "upper"), ([2], "lower")]
    assert Changes.of({"changes": changes.to_json()}) == changes
    assert Changes.of(changes.facts) == changes  # as results and summaries of before say it


def test_what_a_layer_lost_before_it_went_is_not_told(tmp_path):
    ops = [LOST, {**LOST, "layers": [0]}, {"op": "drop", "layers": [2]}]
    groups = [[0], [1], [3], [4], [5]]
    plan = read(tmp_path, ops=ops, layer_groups=groups, dropped=[2])
    assert plan.zeroed() == {"attention": [], "mlp": [0]}
    sizes, changes = measure_changes(plan, [LayerSize(10, 100, other=1)] * 6)
    assert [size.at_work for size in sizes] == [11, 111, 111, 111, 111]
    assert changes.facts == {"sublayers": {"export": "stock", "attention": [], "mlp": [0], "parameters": 100}}
    assert changes.idle_parameters == 100
    assert [mark.layers for mark in changes.marks] == [[0]]
