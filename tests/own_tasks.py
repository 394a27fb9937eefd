"""A folder of lm-eval tasks on local files: two of multiple choice, their group, and one that generates."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

COLOURS = [
    {"question": "What colour is snow?", "options": ["white", "black", "a deep green"], "answer": 0},
    {"question": "What colour is grass?", "options": ["white", "black", "green"], "answer": 2},
    {"question": "What colour is coal?", "options": ["yellow and red", "black", "green"], "answer": 1},
    {"question": "What colour is blood?", "options": ["white", "red", "blue"], "answer": 1},
]
SUMS = [{"sum": f"{a}+{b}", "result": str(a + b)} for a, b in [(1, 2), (2, 2), (3, 1), (4, 4), (5, 2)]]

_CHOICE = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "train",
    "doc_to_text": "!TEXT",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
    ],
    "metadata": {"version": 1.5},
}
_SUMS = {
    "task": "sums",
    "tag": "own_tag",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "fewshot_split": "train",
    "doc_to_text": "{{sum}}=",
    "doc_to_target": "{{result}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
        {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True},
    ],
    "filter_list": [
        {"name": "strict-match", "filter": [{"function": "take_first"}]},
        {"name": "first-sign", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
    ],
    "metadata": {"version": 2},
}
_SIGNS = {
    "include": "sums.yaml",
    "task": "signs",
    "process_results": "!RESULTS",
    "metric_list": [{"metric": "code_points", "aggregation": "mean", "higher_is_better": False}],
}
_GROUP = {
    "group": "both",
    "task": ["colours", {"group": "inner", "task": ["more_colours"]}],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    "metadata": {"version": 7},
}
_CODE = """
def text(doc):
    return f"Question: {doc['question']}\\nAnswer:"


def results(doc, found):
    return {"code_points": sum(number * ord(sign) for number, sign in enumerate(found[0], start=1))}
"""


def write(folder: Path) -> Path:
    """The folder: colours and more_colours (multiple choice, 4 and 2 examples), sums and signs
    (generation, the same 5 examples; signs tells all texts apart), the group ``both`` of the former two, the tag
    ``own_tag`` of colours, sums and signs."""
    data = folder / "data"
    data.mkdir(parents=True)
    for name, rows in (("colours", COLOURS), ("more_colours", COLOURS[1:3]), ("sums", SUMS)):
        for split, part in (("test", rows), ("train", rows[::-1])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (data / f"{name}_{split}.jsonl").write_text(lines, encoding="utf-8")
    for name in ("colours", "more_colours"):
        tags = {"tag": "own_tag"} if name == "colours" else {}
        _dump(folder / f"{name}.yaml", {"task": name, **tags, **_CHOICE, "dataset_kwargs": files(data, name)})
    _dump(folder / "sums.yaml", {**_SUMS, "dataset_kwargs": files(data, "sums")})
    _dump(folder / "signs.yaml", _SIGNS)
    _dump(folder / "both.yaml", _GROUP)
    (folder / "prompts.py").write_text(_CODE, encoding="utf-8")
    return folder


def files(data: Path, name: str) -> dict:
    """A task's ``dataset_kwargs``."""
    return {"data_files": {split: str(data / f"{name}_{split}.jsonl") for split in ("test", "train")}}


def _dump(file: Path, settings: dict) -> None:
    text = yaml.safe_dump(settings, sort_keys=False).replace("'!TEXT'", "!function prompts.text")
    text = text.replace("'!RESULTS'", "!function prompts.results")
    file.write_text(text, encoding="utf-8")
