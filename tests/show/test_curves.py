"""What is drawn, read from the figures themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from slm_pipeline.show import curves, strips
from slm_pipeline.show.canvas import spans_decades
from slm_pipeline.show.curves import Axis, Curve, Point, Trace, Training, pareto_front
from slm_pipeline.show.looks import METHODS
from slm_pipeline.show.marks import Mark
from slm_pipeline.show.strips import Strip

SLM, LACO = METHODS["slm"], METHODS["laco"]


@pytest.fixture
def figure(monkeypatch):
    """Draw with the given function and return the figure instead of writing it."""

    def draw(function: Any, *arguments: Any, **options: Any) -> Any:
        for module in (curves, strips):
            monkeypatch.setattr(module, "save", lambda figure, path_stem: figure)
        return function(*arguments, Path("unused"), **options)

    return draw


def test_pareto_front_by_hand():
    #          beaten by 2   on it       on it       beaten by 1  equal to 1: both stay
    points = [(1.0, 2.0), (3.0, 3.0), (1.0, 5.0), (2.9, 3.0), (3.0, 3.0), (4.0, 0.0)]
    assert pareto_front(points) == [2, 1, 4, 5]
    assert pareto_front([(-1.0, -5.0)]) == [0]
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]) == [2]


def test_pareto_front_is_what_the_definition_says():
    points = [(float(7 * i % 11), float(5 * i % 13)) for i in range(40)]
    expected = []
    for i, (x, y) in enumerate(points):
        beaten = False
        for a, b in points:
            if (a >= x and b > y) or (a > x and b >= y):
                beaten = True
        if not beaten:
            expected.append(i)
    assert sorted(pareto_front(points)) == expected


def test_a_logarithmic_axis_is_for_numbers_that_span_a_decade():
    assert spans_decades([3.0, 30.0])
    assert not spans_decades([3.0, 29.0])
    assert not spans_decades([0.0, 100.0])
    assert not spans_decades([])


def test_a_curve_has_its_look_its_bars_and_its_points_in_order(figure):
    slm = Curve("slm", SLM, [Point(30, 20.0, 1.5), Point(24, 50.0, 2.0)])
    laco = Curve("laco", LACO, [Point(24, 4000.0)])
    (axes,) = figure(
        curves.against,
        [slm, laco],
        title="t",
        x=Axis("layers"),
        y=Axis("perplexity", log=True),
        reference=("dense", 15.0),
    ).axes
    first, *_ = axes.containers[0].lines
    assert first.get_xydata().tolist() == [[24, 50.0], [30, 20.0]]
    assert (first.get_color(), first.get_marker(), first.get_linestyle()) == (SLM.color, SLM.marker, SLM.line)
    (bars,) = axes.containers[0].lines[2]
    assert [segment.tolist() for segment in bars.get_segments()] == [[[24, 48], [24, 52]], [[30, 18.5], [30, 21.5]]]
    plain = [line for line in axes.lines if line.get_label() == "laco"]
    assert plain[0].get_xydata().tolist() == [[24, 4000.0]]
    assert axes.get_yscale() == "log"
    assert [line.get_ydata() for line in axes.lines if line.get_label() == "dense"] == [[15.0, 15.0]]


def test_a_ranking_has_its_rows_from_the_top(figure):
    found = [Curve("slm", SLM, [Point(0, 20.0)]), Curve("laco", LACO, [Point(1, 30.0, 2.0)])]
    (axes,) = figure(curves.ranked, ["slm", "laco"], found, title="t", x=Axis("perplexity")).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["slm", "laco"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # counted downwards
    places = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert places == [[[20.0, 0.0]], [[30.0, 1.0]]]


def test_sizes_that_are_nearly_one_lie_side_by_side(figure):
    """113.24 and 113.27 million: an axis of their own would say 113.2M at every mark."""
    found = [Curve("slm", SLM, [Point(113.24e6, 20.0)]), Curve("laco", LACO, [Point(113.27e6, 30.0)])]
    (axes,) = figure(curves.against, found, title="t", x=Axis("parameters"), y=Axis("perplexity")).axes
    low, high = axes.get_xlim()
    assert (low + high) / 2 == pytest.approx(113.255e6)
    assert high - low == pytest.approx(0.04 * 113.27e6)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(set(labels)) == len(labels)


def test_the_front_joins_its_points(figure):
    found = [Curve("slm", SLM, [Point(40, 60.0), Point(50, 55.0)])]
    (axes,) = figure(
        curves.front, found, [(40.0, 60.0), (50.0, 55.0)], title="t", x=Axis("x"), y=Axis("y"),
        reference=("dense", Point(35, 62)),
    ).axes  # fmt: skip
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["Pareto front"] == [[40.0, 60.0], [50.0, 55.0]]
    assert lines["dense"] == [[35, 62]]


def test_traces_tell_accepted_and_rejected_apart(figure):
    steps = [{"similarity": 0.9, "accepted": True}, {"similarity": 0.7, "accepted": False}]
    traces = [Trace("0.8", SLM, steps, 0.8), Trace("0.5", LACO, steps[:1], None)]
    (axes,) = figure(curves.search_traces, traces, title="t").axes
    offsets = [collection.get_offsets().tolist() for collection in axes.collections]
    assert offsets == [[[1, 0.9]], [[2, 0.7]], [[1, 0.9]], []]
    filled = [collection.get_facecolor().tolist() for collection in axes.collections[:2]]
    assert filled[0] != filled[1] == [[1.0, 1.0, 1.0, 1.0]]
    assert [line.get_ydata() for line in axes.lines if list(line.get_xdata()) == [0, 1]] == [[0.8, 0.8]]


def test_each_recovery_has_a_panel(figure):
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 2, "eval_loss": 3.5}]
    trainings = [
        Training("lora", "nats per answer token", "slm", SLM, rows),
        Training("block_mse", "mean squared error", "slm", SLM, rows[:2]),
        Training("lora", "nats per answer token", "laco", LACO, rows),
    ]
    lora, block_mse = figure(curves.training_curves, trainings, title="t").axes
    assert (lora.get_title(loc="left"), block_mse.get_title(loc="left")) == ("lora", "block_mse")
    assert block_mse.get_ylabel() == "loss (mean squared error)"
    assert [line.get_xydata().tolist() for line in lora.lines[:2]] == [[[1, 4.0], [2, 3.0]], [[2, 3.5]]]
    assert [text.get_text() for text in lora.get_legend().get_texts()] == ["laco", "slm"]


def test_layers_in_turn_have_lines_of_their_own_and_units_panels(figure):
    rows = [{"step": 0, "eval_loss": 9.0}, {"step": 2, "eval_loss": 8.0}, {"step": 2, "eval_loss": 0.5}]
    trainings = [
        Training("distill", "kl of states, 2 layers", "slm", SLM, rows),
        Training("distill", "nats, whole model", "slm", SLM, rows[:1]),
    ]
    states, logits = figure(curves.training_curves, trainings, title="t").axes
    assert [line.get_xydata().tolist() for line in states.lines] == [[[0, 9.0], [2, 8.0]], [[2, 0.5]]]
    assert (states.get_yscale(), logits.get_yscale()) == ("log", "linear")
    assert (states.get_ylabel(), logits.get_ylabel()) == ("loss (kl of states, 2 layers)", "loss (nats, whole model)")
    assert [text.get_text() for text in states.get_legend().get_texts()] == ["slm"]


def test_strips_lie_on_one_axis_of_the_dense_layers(figure):
    found = [
        Strip("a", [[0], [1, 2, 3], [5]], [4], 6),
        Strip("b", [[i] for i in range(6)], [], 6, [Mark("no attention", [2], "upper"), Mark("no mlp", [3], "lower")]),
    ]
    (axes,) = figure(strips.layer_strips, found, title="t").axes
    boxes = [(p.get_x(), p.get_y() + 0.36, p.get_width(), p.get_height(), p.get_hatch()) for p in axes.patches]
    first = [(x, width, hatch) for x, y, width, height, hatch in boxes if abs(y) < 1e-9 and height > 0.5]
    assert first == [(-0.5, 1, None), (0.5, 3, None), (4.5, 1, None), (3.5, 1, "//////")]
    halves = [(x, round(y, 2), hatch) for x, y, _, height, hatch in boxes if height < 0.5]
    assert halves == [(1.5, 1.0, "////"), (2.5, 1.36, "....")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["3", "6", "left"]


def test_the_same_numbers_give_the_same_files(tmp_path):
    arguments = [Curve("slm", SLM, [Point(1, 2.0, 0.5), Point(2, 30.0)])]
    options: dict[str, Any] = {"title": "t", "x": Axis("x"), "y": Axis("y", log=True), "reference": ("dense", 1.0)}
    first = curves.against(arguments, tmp_path / "one" / "plot", **options)
    second = curves.against(arguments, tmp_path / "two" / "plot", **options)
    assert [path.name for path in first] == ["plot.png", "plot.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_long_label_leaves_room_for_the_curves(tmp_path):
    row = {"step": 1, "eval_loss": 2.0}
    trainings = [Training("lora", "nats per token", "model=local recovery=lora method=slm " * 4, SLM, [row])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, that no room is left
        curves.training_curves(trainings, tmp_path / "losses", title="t")


def test_a_long_title_stands_within_its_picture(figure):
    name = "speed_by_ratio: pruned/perplexity/bundled by pruned/efficiency/token_speedup"
    found = [Curve("slm", SLM, [Point(1, 20.0), Point(2, 30.0)])]
    drawn = figure(curves.against, found, title=name, x=Axis("x"), y=Axis("y"))
    title = drawn._suptitle
    assert title.get_text().replace("\n", " ") == name
    assert title.get_window_extent(drawn.canvas.get_renderer()).x1 < drawn.bbox.width
