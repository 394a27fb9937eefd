"""A row of each task, as its task file holds it."""

from __future__ import annotations

OPTIONS = {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]}
TASK_ROWS: dict[str, dict] = {
    "boolq": {"passage": "Sky -- It is blue.", "question": "is it blue", "label": 1},
    "piqa": {"goal": "dry a cup", "sol1": "a towel", "sol2": "water", "label": 0},
    "hellaswag": {"activity_label": "Cooking", "ctx_a": "A", "ctx_b": "", "endings": list("wxyz"), "label": "3"},
    "winogrande": {"sentence": "Ann saw _ there.", "option1": "Bea", "option2": "Tom", "answer": "2"},
    "arc_easy": {"question": "What is hot?", "choices": OPTIONS, "answerKey": "B"},
    "arc_challenge": {"question": "What is hot?", "choices": OPTIONS, "answerKey": "C"},
    "openbookqa": {"question_stem": "It is hot:", "choices": OPTIONS, "answerKey": " B"},
}
