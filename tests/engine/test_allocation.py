"""Which units go, by hand."""

from __future__ import annotations

import pytest
import torch

from slm_pipeline.engine.allocation import Units, evenly, lowest
from slm_pipeline.errors import UserError


def units(*scores, size=10, bias=0, fixed=()):
    mask = torch.tensor([index in fixed for index in range(len(scores))])
    return Units(torch.tensor(scores), size, bias, mask)


def test_the_lowest_go_first_by_hand():
    parts = [units(1.0, 5.0, 3.0), units(2.0, 0.0, 4.0, size=4, bias=3, fixed=(1,))]
    kept = {remove: [of.tolist() for of in lowest(parts, remove)] for remove in (1, 10, 11, 12, 21, 25)}
    assert kept[1] == kept[10] == [[1, 2], [0, 1, 2]]
    assert kept[11] == [[1, 2], [1, 2]]  # 10 and 4 - 3
    assert kept[12] == kept[21] == [[1], [1, 2]]
    assert kept[25] == [[1], [1]]
    with pytest.raises(UserError, match="26 parameters cannot go: .* have 25"):
        lowest(parts, 26)


def test_evenly_by_hand():
    heads = [units(1.0, 2.0, 3.0, 4.0, size=100), units(4.0, 3.0, 2.0, 1.0, size=100)]
    neurons = [units(*map(float, range(10)), size=10), units(*map(float, range(10, 0, -1)), size=10, fixed=(9,))]

    def kept(remove, allows=lambda left: True):
        return [[of.tolist() for of in part] for part in evenly(heads, neurons, remove, allows)]

    # of 1000 parameters 300 are 0.3: one of four heads in each layer, and 5 neurons of each for the other 100
    assert kept(300) == [[[1, 2, 3], [0, 1, 2]], [[5, 6, 7, 8, 9], [0, 1, 2, 3, 9]]]
    assert kept(180) == [[[0, 1, 2, 3]] * 2, [[9], [9]]]  # less than a head: neurons make up for it
    all_neurons = [list(range(10))] * 2
    assert kept(181) == [[[1, 2, 3], [0, 1, 2]], all_neurons]  # there is no tenth that may go
    assert kept(300, lambda left: left != 3) == [[[2, 3], [0, 1]], all_neurons]
    assert len(kept(180, lambda left: left != 3)[1][0]) == 1
    assert kept(401, lambda left: left != 1) == [
        [[2, 3], [0, 1]],
        [[1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 9]],
    ]
