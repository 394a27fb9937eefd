"""What the maps show, read from the figure itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_pipeline.show import heat_maps

MATRIX = [
    [1.0, 0.2, 0.1, 0.1, None],
    [0.2, 1.0, 0.5, 0.4, 0.4],
    [0.1, 0.5, 1.0, 0.8, 0.7],
    [0.1, 0.4, 0.8, 1.0, 0.9],
    [None, 0.4, 0.7, 0.9, 1.0],
]
BRIGHT = np.full((5, 5), 0.6).tolist()
PLAN = {"name": "slm", "windows": [(2, 3)], "dropped": [0]}


def panel(matrix: Any, metric: str = "cka", patches: Any = ((0, 0), (1, 3))) -> dict[str, Any]:
    return {"title": "text", "metric": metric, "matrix": matrix, "patches": patches}


@pytest.fixture
def draw(monkeypatch):
    """Draw and return the figure instead of writing it."""
    monkeypatch.setattr(heat_maps, "save", lambda figure, path_stem: figure)
    return lambda panels, **options: heat_maps.heat_maps(panels, Path("unused"), title="maps", **options)


def squares(axes: Any) -> set[tuple[float, float, float]]:
    return {(patch.get_x(), patch.get_y(), patch.get_width()) for patch in axes.patches}


def test_matrix_patches_and_what_a_plan_did(draw):
    axes, _ = draw([panel(MATRIX)], plans=[PLAN]).axes
    (image,) = axes.images
    expected = np.array(MATRIX, dtype=float)
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), expected)
    # the outputs of layers 1 to 3 are states 2 to 4; a patch of one layer has no outline
    assert squares(axes) == {(1.5, 1.5, 3), (2.5, 2.5, 2)}
    dashed = {patch.get_x() for patch in axes.patches if patch.get_linestyle() == "--"}
    assert dashed == {1.5}
    (dropped,) = axes.collections
    assert dropped.get_offsets().tolist() == [[1, 1]]
    ticks = dict(zip(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()], strict=True))
    assert ticks == {0: "emb.", 1: "0", 2: "1", 3: "2", 4: "3"}


def test_legend_names_the_plans(draw):
    nothing = {"name": "none", "windows": [], "dropped": []}
    (legend,) = draw([panel(MATRIX)], plans=[PLAN, nothing]).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "patch",
        "slm: merged, dropped: x",
        "none: nothing changed",
    ]


def test_all_maps_share_one_range_and_one_bar_that_names_both_metrics(draw):
    figure = draw([panel(MATRIX), panel(BRIGHT), panel(BRIGHT, "cosine")])
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in images] == [(0.1, 1.0)] * 3
    assert [axes.get_ylabel() for axes in figure.axes if not axes.images] == ["CKA and cosine similarity"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_long_title_and_all_else_lie_within_the_picture(number, monkeypatch):
    monkeypatch.setattr(heat_maps, "save", lambda figure, path_stem: figure)
    title = "smollm2_135m, float32: CKA of each text's mean state, unbiased, linear kernel, states scaled to length 1"
    figure = heat_maps.heat_maps([panel(MATRIX)] * number, Path("unused"), title=title)
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 > 0
    assert box.y0 > 0
    assert box.x1 < width
    assert box.y1 < height
    map_, bar = figure.axes[0].get_window_extent(), figure.axes[-1].get_window_extent()
    assert 0.75 < map_.height / bar.height < 1.35  # neither is lost beside the other


def test_eight_maps_stand_in_two_rows_and_deep_models_have_few_labels(draw):
    deep = np.eye(81).tolist()
    figure = draw([panel(deep, patches=[])] * 7)
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == 7
    assert {axes.get_subplotspec().rowspan.start for axes in maps} == {0, 1}
    assert list(maps[0].get_xticks()) == [0, 21, 41, 61]
    labelled = [axes.get_xlabel() != "" for axes in maps]
    assert labelled == [False, False, False, True, True, True, True]  # the lowest of each column
