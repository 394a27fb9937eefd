"""Few shapes judged: exchanges of layers, and what is measured twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from slm_pipeline.engine.candidates import Candidates, exchanges
from slm_pipeline.engine.refit import Refit
from slm_pipeline.engine.window_memo import WindowMemo
from slm_pipeline.errors import UserError
from slm_pipeline.surgery.ops import LayerSize

SIZE = LayerSize(attention=40, mlp=100, other=1, heads=3, neurons=9, per_head=10, per_neuron=10)
HERE, GONE = (3, 9), (0, 0)


class Stub:
    """A fitting whose numbers are known: what stays, weighted by its height."""

    def __init__(self, scores=lambda shape: 0.0):
        self.fit, self.sizes, self.objective, self.refitted = torch.zeros(8, 4), [SIZE] * 5, "kl_divergence", True
        self.scores, self.filled = scores, []

    def how_of(self, shape):
        return Refit()

    def fill(self, shape, num_samples, *, keep):
        self.filled.append((shape, num_samples))
        return SimpleNamespace(score=self.scores(shape))


def test_exchanges_are_with_neighbours_that_stay_and_may_go():
    shape = (HERE, GONE, GONE, HERE, HERE)
    assert list(exchanges(shape, range(5))) == [(GONE, HERE, GONE, HERE, HERE), (HERE, GONE, HERE, GONE, HERE)]
    assert list(exchanges(shape, [1, 2, 3])) == [(HERE, GONE, HERE, GONE, HERE)]


@pytest.mark.parametrize("swaps", [0, 1, 2, 20])
def test_a_layer_that_went_moves_on_as_long_as_it_is_better(swaps):
    fitting = Stub(lambda shape: abs(shape.index(GONE) - 4))
    shape = (HERE, GONE, HERE, HERE, HERE)
    found = Candidates(fitting, WindowMemo()).swapped(shape, range(5), swaps)
    # below: worse; above: better, and below that is known; above: ..., in all 1 + 3 that are tried
    assert found.index(GONE) == {0: 1, 1: 1, 2: 2, 20: 4}[swaps]
    assert len(fitting.filled) == {0: 1, 1: 2, 2: 3, 20: 5}[swaps]


def test_a_swap_may_not_cost_more_than_what_it_is_better_than():
    """Two kinds of layers, by the time that they take: a layer that costs less goes in the place of one that costs
    more."""
    fitting = Stub(lambda shape: abs(shape.index(GONE) - 4))
    shape = (HERE, GONE, HERE, HERE, HERE)
    cheap = LayerSize(attention=40, mlp=99, other=1, heads=3, neurons=9, per_head=10, per_neuron=10)
    prices = [SIZE, SIZE, SIZE, cheap, SIZE]
    assert Candidates(fitting, WindowMemo()).swapped(shape, range(5), 20, prices).index(GONE) == 2
    assert (HERE, HERE, HERE, GONE, HERE) not in [of for of, _ in fitting.filled]


def test_a_shape_that_overflows_is_the_worst_and_the_others_are_judged(caplog):
    def scores(shape):
        if shape.index(GONE) == 2:
            raise UserError("the KL divergence is not finite")
        return shape.index(GONE)

    shapes = [tuple(GONE if layer == gone else HERE for layer in range(5)) for gone in range(5)]
    memo = WindowMemo()
    assert Candidates(Stub(scores), memo).ranked(shapes, 1) == [shapes[i] for i in (0, 1, 3, 4, 2)]
    assert "the KL divergence is not finite" in caplog.text
    again = Stub(scores)
    assert Candidates(again, memo).ranked(shapes, 1)[-1] == shapes[2]
    assert not again.filled  # that too is known


def test_half_of_them_survive_and_each_is_measured_once():
    shapes = [tuple(GONE if layer == gone else HERE for layer in range(5)) for gone in range(5)]
    fitting = Stub(lambda shape: shape.index(GONE))
    candidates = Candidates(fitting, WindowMemo())
    assert candidates.halved([*reversed(shapes), shapes[1]]) == shapes[0]
    assert fitting.filled == [
        *((shape, 2) for shape in reversed(shapes)), *((shape, 4) for shape in shapes[:3]),
        *((shape, 8) for shape in shapes[:2]),
    ]  # fmt: skip
    candidates.halved(shapes)
    assert len(fitting.filled) == 10
    assert [row["num_tokens"] for row in candidates.trace] == [8] * 5 + [16] * 3 + [32] * 2
    assert candidates.trace[0] == {
        "gone": [4], "heads": [3, 3], "neurons": [9, 9], "shape": "3x9 3x9 3x9 3x9 0x0", "parameters": 4 * 141,
        "target": "dense_stream",
        "weighting": "inverse_square", "share": 1.0, "ridges": [0.01, 0.1, 1.0], "num_tokens": 8, "kl": 4,
    }  # fmt: skip
