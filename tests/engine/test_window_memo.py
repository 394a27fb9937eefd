"""Similarities that searches leave for one another."""

from __future__ import annotations

import threading

import pytest
from conftest import random_source
from problems import problem_of

from slm_pipeline.engine.window_memo import VERSION, WindowMemos
from slm_pipeline.engine.windows import StackSimilarity
from slm_pipeline.methods.slm import SlidingLayerMerging
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView

STACK = ((2, 3), 4, 5)


def problem(folder, input_ids, threshold, forced=False):
    source = random_source()
    model, _ = load_dense(source)
    return problem_of(model, source, input_ids, threshold=threshold, memo=folder, forced=forced)


def test_what_one_finds_another_reads(tmp_path):
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        memo.add(STACK, 0.1 + 0.2)
        memo.add(((1, (2, 3)), 4, 5), 0.5)
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        assert len(memo) == 2
        assert memo[STACK] == 0.1 + 0.2  # every bit of it
        assert ((1, (2, 3)), 4, 5) in memo
    with WindowMemos(tmp_path).open("mean", "final_hidden") as memo:
        assert len(memo) == 0
    with WindowMemos(tmp_path, afresh=True).open("official", "final_hidden") as memo:
        assert len(memo) == 0


def test_half_a_line_is_cut_off(tmp_path):
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        memo.add(STACK, 0.5)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text() + "[[1, 2], 0.")
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        assert len(memo) == 1
        memo.add((4, 5), 0.25)
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        assert (memo[STACK], memo[(4, 5)]) == (0.5, 0.25)


@pytest.mark.parametrize(
    "line",
    ['[[[2, 3], 4, 5], 0.5, "0000000000000000"]', "[[[2, 3], 4, 5], 0.5]", "[", "\\xff", '{"a": 1}', "[[], null, 0]"],
)
def test_a_damaged_line_is_not_believed(line, tmp_path, caplog):
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        memo.add((4, 5), 0.25)
        memo.add((5, 6), 0.75)
    (file,) = tmp_path.glob("*.jsonl")
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + line.encode() + b"\n" + second)
    for _ in range(2):
        with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
            assert (len(memo), memo[(4, 5)], memo[(5, 6)]) == (2, 0.25, 0.75)
    assert caplog.text.count(f"{file}: 1 damaged lines are not believed") == 1  # it is cut out
    assert file.read_bytes() == first + second
    file.write_bytes(first.replace(b"0.25", b"0.26"))
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        assert len(memo) == 0


def test_a_memo_that_cannot_be_used_costs_time_alone(tmp_path, caplog):
    (tmp_path / f"windows_v{VERSION}_official_final_hidden.jsonl").mkdir()
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        memo.add(STACK, 0.5)
        assert memo[STACK] == 0.5
    assert "cannot be used (not a file): this search evaluates every window itself" in caplog.text


def test_searches_at_the_same_time_take_turns(tmp_path):
    inside, order = threading.Event(), []

    def second():
        inside.wait()
        with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
            order.append(("second", len(memo)))

    thread = threading.Thread(target=second)
    thread.start()
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        inside.set()
        thread.join(0.3)
        memo.add(STACK, 0.5)
        order.append(("first", len(memo)))
    thread.join()
    assert order == [("first", 1), ("second", 1)]


def test_a_window_known_is_not_evaluated(tiny_llama, input_ids, tmp_path):
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
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
    with WindowMemos(tmp_path).open("official", "final_hidden") as memo:
        assert evaluated == len(memo)
    again = method.plan(problem(tmp_path, input_ids, 0.9))
    assert again.scores["num_evaluated"] == again.scores["num_block_evaluations"] == 0
    forced = method.plan(problem(tmp_path, input_ids, 0.9, forced=True))
    assert forced.scores["num_evaluated"] == forced.scores["num_evaluations"] > 0
