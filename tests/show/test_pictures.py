"""What is drawn, read from the figures themselves, and that the same numbers give the same files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from slm_pipeline.show import pictures

STEPS = [
    {"low": 7, "high": 8, "similarity": 0.95, "accepted": True},
    {"low": 6, "high": 8, "similarity": 0.90, "accepted": True},
    {"low": 5, "high": 8, "similarity": 0.70, "accepted": False},
    {"low": 4, "high": 5, "similarity": 0.60, "accepted": False},
    {"low": 3, "high": 4, "similarity": 0.85, "accepted": True},
]


@pytest.fixture
def figure(monkeypatch):
    """Draw with the given function and return the figure instead of writing it."""

    def draw(function: Any, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "_save", lambda figure, path_stem: figure)
            return function(*arguments, Path("unused"), **options)

    return draw


def boxes(axes: Any) -> list[tuple[float, float, float]]:
    """(left, bottom, width) of the rectangles."""
    return [(patch.get_x(), patch.get_y(), patch.get_width()) for patch in axes.patches]


def test_committed_windows_are_the_longest_accepted_of_each_upper_end():
    assert pictures.committed_windows(STEPS) == [1, 4]
    assert pictures.committed_windows(STEPS[2:4]) == []


def test_candidates_stand_over_their_size_and_the_best_on_most_text_is_ringed(figure):
    rows = [(4, 100, 0.2), (4, 100, 0.3), (2, 100, 0.5), (2, 100, 0.7), (2, 200, 0.65), (2, 200, 0.6)]
    trace = [{"parameters": m * 1e6, "num_tokens": tokens, "kl": kl} for m, tokens, kl in rows]
    (axes,) = figure(pictures.search_candidates, trace, title="joint").axes
    few, most, ring = axes.collections
    assert few.get_offsets().tolist() == [[4, 0.2], [4, 0.3], [2, 0.5], [2, 0.7]]
    assert most.get_offsets().tolist() == [[2, 0.65], [2, 0.6]]
    assert ring.get_offsets().tolist() == [[2, 0.6]]
    assert few.get_alpha() < most.get_alpha() == 1
    assert axes.get_xlim()[0] > axes.get_xlim()[1]  # smaller to the right
    chosen = [{**row, "accepted": row["kl"] == 0.65} for row in trace]  # another way to fill it was the better one
    (axes,) = figure(pictures.search_candidates, chosen, title="joint").axes
    assert axes.collections[-1].get_offsets().tolist() == [[2, 0.65]]


def test_search_steps_tells_accepted_rejected_and_committed_apart(figure):
    above, below = figure(pictures.search_steps, STEPS, 0.81, title="search").axes
    accepted, rejected = (collection.get_offsets().tolist() for collection in above.collections)
    assert accepted == [[1, 0.95], [2, 0.90], [5, 0.85]]
    assert rejected == [[3, 0.70], [4, 0.60]]
    colors = [to_hex(collection.get_facecolor()[0]).upper() for collection in above.collections]
    assert colors == [pictures.COLORS["accepted"], pictures.COLORS["rejected"]]
    assert len({collection.get_paths()[0].vertices.tobytes() for collection in above.collections}) == 2  # markers
    assert [text.get_text() for text in above.texts] == ["6-8", "3-4"]
    assert above.lines[0].get_ydata() == [0.81, 0.81]

    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in below.patches}
    assert {n: (bar.get_y(), bar.get_height()) for n, bar in bars.items()} == {
        1: (6.5, 2),
        2: (5.5, 3),
        3: (4.5, 4),
        4: (3.5, 2),
        5: (2.5, 2),
    }
    assert [n for n, bar in sorted(bars.items()) if bar.get_alpha() == 1.0] == [2, 5]


def test_search_without_a_threshold_has_no_line(figure):
    assert len(figure(pictures.search_steps, STEPS, None, title="search").axes[0].lines) == 0


def test_loss_curve_marks_the_best_validation_loss(figure):
    curve = [
        {"step": 1, "loss": 4.0, "learning_rate": 1e-4},
        {"step": 2, "loss": 3.5, "learning_rate": 1e-4},
        {"step": 2, "eval_loss": 3.1},
        {"step": 3, "loss": 3.0, "learning_rate": 1e-4},
        {"step": 4, "eval_loss": 3.2},
    ]
    (axes,) = figure(pictures.loss_curve, curve, title="loss").axes
    training, validation, best = axes.lines
    assert training.get_xydata().tolist() == [[1, 4.0], [2, 3.5], [3, 3.0]]
    assert validation.get_xydata().tolist() == [[2, 3.1], [4, 3.2]]
    assert (best.get_ydata(), best.get_label()) == ([3.1, 3.1], "best 3.100 at step 2")
    assert axes.get_yscale() == "linear"


def test_a_single_training_mean_is_a_point(figure):
    rows = [{"step": 0, "eval_loss": 9.0}, {"step": 4, "loss": 7.0}, {"step": 4, "eval_loss": 5.0}]
    training, validation, _ = figure(pictures.loss_curve, rows, title="loss").axes[0].lines
    assert (training.get_xydata().tolist(), training.get_marker()) == ([[2.5, 7.0]], "o")
    assert validation.get_xydata().tolist() == [[0, 9.0], [4, 5.0]]


def test_a_training_mean_stands_in_the_middle_of_its_steps():
    """Logged every 10 steps: the mean over steps 1 to 10 is at 5.5. The second training begins at step 20."""
    rows = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.5}]
    assert pictures.loss_points(rows, "loss") == [(5.5, 3.0), (15.5, 2.0)]
    assert pictures.loss_points(rows, "eval_loss") == [(20, 2.5)]
    later = [{"step": 20, "eval_loss": 9.0}, {"step": 24, "loss": 8.0}]
    assert pictures.loss_points(later, "loss") == [(22.5, 8.0)]
    every = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert pictures.loss_points(every, "loss") == [(1, 3.0), (2, 2.0)]


def test_loss_curve_of_layers_in_turn_and_of_the_whole_model(figure):
    """Each layer's line is its own, none of them has a best, and logits have a panel."""
    curve = [
        {"step": 0, "eval_loss": 40.0},
        {"step": 1, "loss": 30.0},
        {"step": 2, "eval_loss": 20.0},
        {"step": 2, "eval_loss": 2.0},
        {"step": 3, "loss": 1.5},
        {"step": 4, "eval_loss": 1.0},
        {"step": 4, "logit_eval_loss": 0.6},
        {"step": 5, "logit_loss": 0.5},
        {"step": 6, "logit_eval_loss": 0.4},
    ]
    states, logits = figure(pictures.loss_curve, curve, title="loss", loss="mse of states, 2 layers").axes
    lines = [line.get_xydata().tolist() for line in states.lines]
    assert lines == [[[1, 30.0]], [[0, 40.0], [2, 20.0]], [[3, 1.5]], [[2, 2.0], [4, 1.0]]]
    assert [text.get_text() for text in states.get_legend().get_texts()] == ["training", "validation"]
    assert states.get_yscale() == "log"
    assert states.get_ylabel() == "loss (mse of states, 2 layers)"
    assert states.get_xlabel() == "optimiser step, one layer after the other"
    assert logits.get_xlabel() == "optimiser step"
    assert [line.get_xydata().tolist() for line in logits.lines[:2]] == [[[5, 0.5]], [[4, 0.6], [6, 0.4]]]
    assert logits.lines[2].get_label() == "best 0.400 at step 6"


def skip_study(losses: list[float | None], plan_loss: float | None) -> dict[str, Any]:
    return {
        "num_layers": 3,
        "tolerance": 0.1,
        "static": [{"loss": loss} for loss in losses],
        "at_most": [{"loss": loss} for loss in (9.0, 5.0, 2.0)],
        "oracle": {"mean_num_layers": 2.5, "loss": 2.1, "counts": [0, 1, 1]},
        "plans": [{"method": method, "num_layers": 2, "loss": plan_loss} for method in ("sleb", "slm")],
    }


def test_dynamic_skip_shows_curves_plans_and_how_many_sequences_need_how_many_layers(figure):
    above, below = figure(pictures.dynamic_skip, skip_study([9.0, 7.0, 2.0], 4.0), title="skip").axes
    static, oracle, dense = above.lines
    assert static.get_xydata().tolist() == [[1, 9.0], [2, 7.0], [3, 2.0]]
    assert oracle.get_xydata().tolist() == [[1, 9.0], [2, 5.0], [3, 2.0]]
    assert dense.get_ydata() == [2.0, 2.0]
    star, sleb, slm = above.collections
    assert [points.get_offsets().tolist() for points in (star, sleb, slm)] == [[[2.5, 2.1]], [[2, 4.0]], [[2, 4.0]]]
    assert [points.get_label() for points in (sleb, slm)] == ["plan: sleb, 2 layers", "plan: slm, 2 layers"]
    assert len({points.get_paths()[0].vertices.tobytes() for points in (star, sleb, slm)}) == 3  # markers
    assert above.get_yscale() == "log"
    assert [bar.get_height() for bar in below.patches] == [0, 1, 1]
    assert below.get_title(loc="left").endswith("within 10%")


def test_dynamic_skip_leaves_out_what_is_not_finite(figure):
    above = figure(pictures.dynamic_skip, skip_study([None, 7.0, 2.0], None), title="skip").axes[0]
    np.testing.assert_array_equal(above.lines[0].get_ydata(), [np.nan, 7.0, 2.0])
    assert len(above.collections) == 1  # the star


def test_painters_has_a_curve_for_each_way_that_starts_at_the_whole_model(figure):
    found = {
        "dense": {"loss": 2.0},
        "ranges": [[2, 3], [1, 4]],
        "variants": {"skip": [{"loss": 2.5}, {"loss": 9.0}], "swap": [{"loss": 2.1}, {"loss": None}]},
    }
    (axes,) = figure(pictures.painters, found, title="painters").axes
    skip, swap, dense = axes.lines
    assert skip.get_xydata().tolist() == [[0, 2.0], [2, 2.5], [4, 9.0]]
    np.testing.assert_array_equal(swap.get_ydata(), [2.0, 2.1, np.nan])
    assert [line.get_label() for line in axes.lines] == ["skip", "swap", "whole model"]
    assert dense.get_ydata() == [2.0, 2.0]
    assert skip.get_color() != swap.get_color()
    assert skip.get_marker() != swap.get_marker()
    assert axes.get_yscale() == "log"


def test_layer_strip_puts_each_pruned_layer_below_the_middle_of_its_group(figure):
    (axes,) = figure(pictures.layer_strip, [[0], [1, 2, 3], [5]], [4], 6).axes
    above = {x: patch for (x, y, _), patch in zip(boxes(axes), axes.patches, strict=True) if y == 1.0}
    below = [x for x, y, _ in boxes(axes) if y == -0.5]
    assert sorted(above) == [0, 1, 2, 3, 4, 5]
    assert below == [0.0, 2.0, 5.0]
    assert [x for x, patch in sorted(above.items()) if patch.get_hatch()] == [4]
    merged = [x for x, p in sorted(above.items()) if to_hex(p.get_facecolor()).upper() == pictures.COLORS["merged"]]
    assert merged == [1, 2, 3]
    numbers = [(text.get_position(), text.get_text()) for text in axes.texts]
    assert {((2.5, 0.0), "1"), ((4.5, 1.5), "4")} <= set(numbers)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dense: 6 layers", "pruned: 3 layers"]


def test_same_numbers_give_the_same_files_whatever_the_users_settings(tmp_path):
    first = pictures.search_steps(STEPS, 0.81, tmp_path / "new" / "search.0.81", title="search")
    assert [path.name for path in first] == ["search.0.81.png", "search.0.81.svg"]
    with matplotlib.rc_context({"font.size": 20.0, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        second = pictures.search_steps(STEPS, 0.81, tmp_path / "again", title="search")
        assert matplotlib.rcParams["font.size"] == 20.0
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    width, height = struct.unpack(">II", first[0].read_bytes()[16:24])
    assert (width, height) == (6.9 * 200, 3.9 * 200)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(self: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        pictures.layer_strip([[0], [1]], [], 2, tmp_path / "strip")
    assert list(tmp_path.iterdir()) == []
