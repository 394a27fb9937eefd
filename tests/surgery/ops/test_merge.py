"""Merges: what each rule needs, and that nothing else stands there."""

from __future__ import annotations

import numpy as np
import pytest
from plans import GOOD, read, read_with

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.merge_rules import RULES
from slm_pipeline.surgery.ops import LayerSize, Widths
from slm_pipeline.surgery.ops.merge import Merge

CONCATENATE = {
    "layer_groups": [[0], [1], [2, 3], [4], [5]],
    "ops": [{"op": "merge", "layers": [2, 3], "rule": "concatenate", "shares": [0.5, 0.5], "tensors": "m"}],
}
UNITS = {"m.heads.0": [0], "m.heads.1": [1], "m.neurons.0": [0, 3], "m.neurons.1": [1, 2]}


def test_units_fit_one_size_of_model(tmp_path):
    plan = read_with(tmp_path, UNITS, **CONCATENATE)
    plan.check_sizes(Widths(heads=2, neurons=4, states=4))
    with pytest.raises(UserError, match="op 0 of the plan makes a layer of 2 heads; the model's have 3"):
        plan.check_sizes(Widths(heads=3, neurons=4, states=4))
    with pytest.raises(UserError, match="makes a layer of 4 neurons; the model's have 8"):
        plan.check_sizes(Widths(heads=2, neurons=8, states=4))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ({"layers": [2, 3, 4]}, "rule=None is not one of official"),
        ({"layers": [2, 3, 4], "rule": "concatenate"}, "needs the tensor 'None.heads.0'"),
        ({"layers": [2, 3, 4], "rule": "weighted"}, "one share for each of its 3 parts"),
        ({"layers": [2, 3, 4], "rule": "weighted", "shares": [0.5, 0.5]}, "one share for each of its 3 parts"),
        ({"layers": [2, 3, 4], "rule": "weighted", "shares": None}, "shares=None must be numbers"),
        ({"layers": [2, 3], "rule": {}}, "rule={} is not one of"),
        ({"layers": [2, 3, 4], "rule": "mean", "shares": [1, 0, 0]}, "merge has no 'shares'; it has op, layers, rule"),
        (
            {"layers": [2, 3, 4], "rule": "weighted", "shares": [0.5, 0.5, 0.5]},
            "must be numbers in .* that sum to 1",
        ),
        ({"layers": [2, 3, 4], "rule": "weighted", "shares": [2, -1, 0]}, "must be numbers in .* that sum to 1"),
        ({"layers": [2, 3], "rule": "concatenate", "fold_norm": 1}, "fold_norm=1 must be true or false"),
        ({"layers": [2, 3], "rule": "concatenate", "official_gqa": None}, "official_gqa=None must be true or false"),
    ],
)
def test_what_is_no_merge(op, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, ops=[{"op": "merge", **op}])


def test_a_part_may_be_a_merged_layer(tmp_path):
    """Three original layers, but two parts, each with a share."""
    ops = [
        {"op": "merge", "layers": [3, 4], "rule": "mean"},
        {"op": "merge", "layers": [2, 3, 4], "rule": "weighted", "shares": [0.25, 0.75]},
    ]
    assert read(tmp_path, ops=ops).layer_groups == GOOD["layer_groups"]


@pytest.mark.parametrize("rule", [*RULES, "weighted", "concatenate"])
def test_a_merged_layer_has_the_size_of_the_one_whose_module_it_is(rule):
    sizes = [LayerSize(1, 2), LayerSize(3, 4), LayerSize(5, 6)]
    last = rule in ("official", "keep_highest")
    assert Merge((0, 1, 2), rule).count(sizes) == sizes[-1 if last else 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"m.heads.0": [-1]},
        {"m.heads.1": [2]},
        {"m.neurons.0": [3, 0]},
        {"m.neurons.0": [3, 3]},
        {"m.neurons.0": [[0, 3]]},
        {"m.neurons.1": [1.0, 2.0]},
        {"m.heads.0": np.array([0], np.int32)},
    ],
)
def test_units_that_no_layer_has(changes, tmp_path):
    (name,) = changes
    with pytest.raises(UserError, match=f"the tensor {name} .* must be int64 indices, ascending, from 0 to "):
        read_with(tmp_path, {**UNITS, **changes}, **CONCATENATE)
