"""Whole layers that go."""

from __future__ import annotations

import pytest
from plans import read

from slm_pipeline.errors import UserError


def test_merged_layers_go_by_all_of_their_originals(tmp_path):
    merge = {"op": "merge", "layers": [2, 3], "rule": "mean"}
    ops = [merge, {"op": "drop", "layers": [0, 2, 3]}]
    assert read(tmp_path, ops=ops, layer_groups=[[1], [4], [5]], dropped=[0, 2, 3]).dropped == [0, 2, 3]
    with pytest.raises(UserError, match=r"op 1: layers=\[2\] are not whole layers"):
        read(tmp_path, ops=[merge, {"op": "drop", "layers": [2]}])
    with pytest.raises(UserError, match=r"op 1: layers=\[3\] are not whole layers"):
        read(tmp_path, ops=[{"op": "drop", "layers": [3]}, {"op": "drop", "layers": [3]}])


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ({"layers": 2}, "layers=2 must be a list of layers"),
        ({"layers": []}, r"layers=\[\] must be a list of layers"),
        ({"layers": [2, 2]}, r"layers=\[2, 2\] must be a list of layers, ascending"),
        ({"layers": [-1]}, r"layers=\[-1\] must be a list of layers"),
        ({"layers": [0.0]}, r"layers=\[0.0\] must be a list of layers"),
        ({"layers": [2], "scale": 0.5}, "op 0: drop has no 'scale'; it has op, layers"),
    ],
)
def test_values_of_the_wrong_type_or_size(op, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, ops=[{"op": "drop", **op}])
