"""The table of block times: its arithmetic by hand, and what it finds where time is a known function of a model."""

from __future__ import annotations

import json

import pytest
from block_times import of_model, pretended
from conftest import peculiar_model, random_source
from plans import narrowing

from slm_pipeline.evaluation import block_times
from slm_pipeline.evaluation.block_times import BlockTimes, Kind, levels, measure
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.surgery.apply import apply_beside, layer_sizes
from slm_pipeline.surgery.changes import measure_changes
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer

KIND = Kind(
    layers=[0, 2, 3],
    widths={"attention": 4, "mlp": 8},
    seconds=10.0,
    saved={"attention": [(2, 1.0), (0, 4.0)], "mlp": [(4, 2.0), (2, 2.5), (0, 5.0)]},
)
OTHER = Kind(layers=[1], widths={"attention": 4, "mlp": 8}, seconds=7.0, saved={"attention": [], "mlp": []})


@pytest.mark.parametrize(
    ("heads", "neurons", "seconds"),
    [(4, 8, 10.0), (3, 8, 9.5), (2, 8, 9.0), (1, 8, 7.5), (0, 8, 6.0), (4, 6, 9.0), (4, 3, 7.75), (4, 1, 6.25),
     (4, 0, 5.0), (2, 4, 7.0), (0, 0, 1.0)],
)  # fmt: skip
def test_a_width_between_two_that_were_measured_lies_on_the_line_between_them(heads, neurons, seconds):
    assert KIND.block({"attention": heads, "mlp": neurons}) == pytest.approx(seconds)


def test_a_table_is_read_as_it_was_written():
    times = BlockTimes(50.0, [KIND, OTHER], "a GPU", {"mode": "eager", "batch_size": 1, "context": 8})
    assert BlockTimes.from_json(json.loads(json.dumps(times.to_json()))) == times
    assert times.blocks == 37.0


def test_levels_are_multiples_of_64_where_there_are_enough():
    assert levels("mlp", 11008) == [9600, 8256, 5504, 2752, 0]
    assert levels("mlp", 8) == [7, 6, 4, 2, 0]
    assert levels("attention", 3) == [2, 1, 0]
    assert levels("attention", 1) == [0]
    assert levels("mlp", 0) == []


@pytest.mark.parametrize("peculiar", [False, True])
def test_times_that_are_a_sum_over_layers_are_found_and_predicted(peculiar, monkeypatch):
    """Two kinds of layers, a narrow dense layer among them, and what a plan does to them."""
    monkeypatch.setattr(block_times, "alternate", pretended)
    model = peculiar_model("qwen3") if peculiar else load_dense(random_source())[0]
    view, bars = ModelView(model), []
    monkeypatch.setattr(ProgressBar, "close", lambda bar: bars.append((bar.n, bar.total)))
    times = measure(view, mode="eager", batch_size=2, context=5)
    assert bars[0][0] == bars[0][1] > 4  # what is shown ends at all of it
    assert [kind.layers for kind in times.kinds] == ([[0, 3], [1, 2, 4, 5]] if peculiar else [[0, 1, 2, 3, 4, 5]])
    assert times.seconds == pytest.approx(of_model(model))
    kept = {1: ([0], [2, 5]), 3: (None, [*range(31)])}
    plan = narrowing(kept, Drop((2,)), DropSublayer((4,), "mlp", "custom"), DropSublayer((5,), "attention", "custom"))
    sizes, _ = measure_changes(plan, layer_sizes(view))
    assert times.of(plan, sizes) == pytest.approx(of_model(apply_beside(plan, view)))
    assert times.settings == {"mode": "eager", "batch_size": 2, "context": 5}


def test_a_narrower_block_that_seems_slower_saves_nothing(monkeypatch):
    """Noise, or a width that a device is slow for."""
    monkeypatch.setattr(block_times, "alternate", lambda runs, **_: {name: [1.0, 1.0] for name in runs})
    view = ModelView(load_dense(random_source())[0])
    times = measure(view, mode="eager", batch_size=1, context=5)
    (kind,) = times.kinds
    assert {seconds for pairs in kind.saved.values() for _, seconds in pairs} == {0.0}
    assert kind.seconds == 0.0


@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_rounds_that_lie_far_apart_are_warned_of(noise, monkeypatch, caplog):
    """As on a machine that does something else meanwhile."""

    def noisy(runs, **_):
        found = pretended(runs, **_)
        return {name: [of[0] * (1 + noise * step / 8) for step in range(9)] for name, of in found.items()}

    monkeypatch.setattr(block_times, "alternate", noisy)
    measure(ModelView(load_dense(random_source())[0]), mode="eager", batch_size=1, context=5)
    warned = [line for line in caplog.messages if "of 9 rounds the middle half found that blocks take" in line]
    assert bool(warned) == (noise == 0.5)
