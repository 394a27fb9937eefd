"""Similarities that searches leave for one another."""

from __future__ import annotations

import threading

import pytest
from conftest import random_source

from slm_pipeline.engine.window_memo import open_memo
from slm_pipeline.engine.windows import StackSimilarity
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.slm import SlidingLayerMerging
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView

STACK = ((2, 3), 4, 5)


def problem(folder, input_ids, threshold, forced=False):
    source = random_source()
    view = ModelView(load_dense(source)[0])
    return PruningProblem(source, view, input_ids, None, None, threshold, 5, False, {}, memo=folder, forced=forced)


def test_what_one_finds_another_reads(tmp_path):
    with open_memo(tmp_path, "official", "final_hidden") as memo:
        memo.add(STACK, 0.1 + 0.2)
        memo.add(((1, (2, 3)), 4, 5), 0.5)
    with open_memo(tmp_path, "official", "final_hidden") as memo:
        assert len(memo) == 2
        assert memo[STACK] == 0.1 + 0.2  # every bit of it
        assert ((1, (2, 3)), 4, 5) in memo
    with open_memo(tmp_path, "mean", "final_hidden") as memo:
        assert len(memo) == 0
    with open_memo(tmp_path, "official", "final_hidden", afresh=True) as memo:
        assert len(memo) == 0


def test_half_a_line_is_cut_off(tmp_path):
    with open_memo(tmp_path, "official", "final_hidden") as memo:
        memo.add(STACK, 0.5)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text() + "[[1, 2], 0.")
    with open_memo(tmp_path, "official", "final_hidden") as memo:
        assert len(memo) == 1
        memo.add((4, 5), 0.25)
    with open_memo(tmp_path, "official", "final_hidden") as memo:
        assert (memo[STACK], memo[(4, 5)]) == (0.5, 0.25)


def test_searches_at_the_same_time_take_turns(tmp_path):
    inside, order = threading.Event(), []

    def second():
        inside.wait()
        with open_memo(tmp_path, "official", "final_hidden") as memo:
            order.append(("second", len(memo)))

    thread = threading.Thread(target=second)
    thread.start()
    with open_memo(tmp_path, "official", "final_hidden") as memo:
        inside.set()
        thread.join(0.3)
        memo.add(STACK, 0.5)
        order.append(("first", len(memo)))
    thread.join()
    assert order == [("first", 1), ("second", 1)]


def test_a_window_known_is_not_evaluated(tiny_llama, input_ids, tmp_path):
    with open_memo(tmp_path, "official", "final_hidden") as memo:
        memo.add(STACK, 0.125)
        similarity = StackSimilarity(ModelView(tiny_llama[0]), input_ids, "official", "final_hidden", memo)
        assert similarity(STACK) == 0.125
        assert (similarity.num_evaluated, similarity.num_block_evaluations) == (0, 0)
        assert similarity((3, 4, 5)) == pytest.approx(1)
        assert (similarity.num_evaluated, similarity.num_block_evaluations) == (1, 3)
        assert set(similarity.asked) == {STACK, (3, 4, 5)}


def test_plans_are_the_same_with_what_others_found(input_ids, tmp_path):
    """All thresholds of a study: no window twice, and each decides as if it were alone."""
    method, evaluated = SlidingLayerMerging(), 0
    for threshold in (0.999, 0.99, 0.95, 0.9, 0.8):
        alone = method.plan(problem(None, input_ids, threshold))
        shared = method.plan(problem(tmp_path, input_ids, threshold))
        assert shared.content() == alone.content()
        assert shared.scores["steps"] == alone.scores["steps"]
        assert shared.scores["num_evaluations"] == alone.scores["num_evaluations"] == alone.scores["num_evaluated"]
        evaluated += shared.scores["num_evaluated"]
    with open_memo(tmp_path, "official", "final_hidden") as memo:
        assert evaluated == len(memo)
    again = method.plan(problem(tmp_path, input_ids, 0.9))
    assert again.scores["num_evaluated"] == again.scores["num_block_evaluations"] == 0
    forced = method.plan(problem(tmp_path, input_ids, 0.9, forced=True))
    assert forced.scores["num_evaluated"] == forced.scores["num_evaluations"] > 0
