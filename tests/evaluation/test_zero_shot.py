"""Scores against log-likelihoods summed token by token, prompts written out by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import lm_eval.utils
import pytest
import torch

from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.zero_shot import TASKS, average, score_task, task_requests


def _choices(*texts: str, answer: str) -> dict:
    return {"choices": {"text": list(texts), "label": list("ABCDE"[: len(texts)])}, "answerKey": answer}


ROWS = {
    "boolq": [
        {"passage": f"Sky -- {text}", "question": question, "idx": i, "label": label}
        for i, (text, question, label) in enumerate(
            [("The sky is blue.", "is the sky blue", 1), ("Rain is wet.", "is rain dry", 0), ("Ice melts.", "is it", 1)]
        )
    ],
    "piqa": [
        {"goal": "dry a cup", "sol1": "use a towel", "sol2": "use more water and wait for it", "label": 0},
        {"goal": "cut bread", "sol1": "with a spoon", "sol2": "with a knife", "label": 1},
        {"goal": "open a can", "sol1": "sing", "sol2": "turn the opener around its rim", "label": 1},
    ],
    "hellaswag": [
        {
            "ind": i,
            "activity_label": "Cooking [title]",
            "ctx_a": "A man [substeps] stirs a pot.",
            "ctx_b": "the man",
            "endings": endings,
            "label": label,
        }
        for i, (endings, label) in enumerate(
            [
                (["adds salt.", "flies  away over the hills [step] and sea.", "is\u00e9 r\u00e9d\u00e9.", "x"], "0"),
                (["eats the soup with a large spoon.", "rows.", "sleeps in it.", "turns to sing."], "2"),
                (["yes", "no no no no", "perhaps", "\u00e9\u00e9\u00e9\u00e9"], "3"),
            ]
        )
    ],
    "winogrande": [
        {"sentence": "Ann thanked Bea because _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        {"sentence": "The cup missed the box as _ was small.", "option1": "the cup", "option2": "it", "answer": "1"},
        {"sentence": "He met Tom but _ left.", "option1": "he", "option2": "Tom", "answer": "2"},
    ],
    "arc_easy": [
        {"id": "a", "question": "What is hot?", **_choices("ice", "fire and all that burns", "snow", answer="B")},
        {"id": "b", "question": "What is red?", **_choices("grass", "the sky", "blood", answer="C")},
        {"id": "c", "question": "What flies?", **_choices("a bird", "a stone in the sea", "mud", answer="A")},
    ],
    "arc_challenge": [
        {"id": "a", "question": "What is hot?", **_choices("ice", "fire and all that burns", "snow", answer="B")},
        {"id": "b", "question": "What is red?", **_choices("grass", "sky", "blood", "\u00e9\u00e9\u00e9", answer="D")},
        {"id": "c", "question": "What flies?", **_choices("a bird", "a stone in the sea", "mud", answer="A")},
    ],
    "openbookqa": [
        {"id": "a", "question_stem": "A warm thing is", **_choices("ice", "fire and all that burns", answer="A")},
        {"id": "b", "question_stem": "A red thing is", **_choices("grass", "sky", "bl\u00f6\u00f6\u00f6d", answer="C")},
        {"id": "c", "question_stem": "It flies:", **_choices("a bird", "a stone in the sea", "mud", answer="B")},
    ],
}
HELLASWAG = ROWS["hellaswag"]


def _options(task: str, row: dict) -> tuple[list[tuple[str, str]], int, list[str]]:
    """(context, continuation) of each option, the right one, and the texts whose length normalises acc_norm."""
    if task == "boolq":
        context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return [(context, " no"), (context, " yes")], row["label"], ["no", "yes"]
    if task == "piqa":
        texts, context = [row["sol1"], row["sol2"]], f"Question: {row['goal']}\nAnswer:"
        return [(context, f" {text}") for text in texts], row["label"], texts
    if task == "hellaswag":
        # brackets and double spaces of WikiHow are cleaned away, the second context is capitalised
        texts = [text.replace(" [step]", "").replace("  ", " ") for text in row["endings"]]
        context = "Cooking. : A man stirs a pot. The man"
        return [(context, f" {text}") for text in texts], int(row["label"]), texts
    if task == "winogrande":
        before, after = row["sentence"].split("_")
        texts = [before + row["option1"], before + row["option2"]]
        return [(text, f" {after.strip()}") for text in texts], int(row["answer"]) - 1, texts
    texts = row["choices"]["text"]
    context = row["question_stem"] if task == "openbookqa" else f"Question: {row['question']}\nAnswer:"
    return [(context, f" {text}") for text in texts], "ABCDE".index(row["answerKey"]), texts


def _log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    context_ids = tokenizer(context)["input_ids"]
    ids = tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[i - 1, ids[i]].item() for i in range(len(context_ids), len(ids)))


def _right(model, tokenizer, task: str, row: dict, normalised: bool) -> bool:
    options, gold, texts = _options(task, row)
    scores = [_log_likelihood(model, tokenizer, *option) for option in options]
    if normalised:
        scores = [score / len(text) for score, text in zip(scores, texts, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__) == gold


@pytest.fixture
def sharp_model(tiny_llama):
    """A tiny model whose predictions are far from uniform."""
    model, tokenizer = tiny_llama
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for task, rows in ROWS.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_score_is_the_share_of_rows_whose_gold_option_is_likeliest(sharp_model, folder, task):
    model, tokenizer = sharp_model
    result = score_task(model, tokenizer, task, data=str(folder), limit=None, batch_size=2)
    for metric in ("acc", "acc_norm"):
        if metric in result["all"]:
            right = [_right(model, tokenizer, task, row, metric == "acc_norm") for row in ROWS[task]]
            assert result["all"][metric] == pytest.approx(sum(right) / 3)
    share = result["score"] / 100
    assert share == pytest.approx(result["all"][TASKS[task]])
    assert result["stderr"] == pytest.approx(100 * (share * (1 - share) / 2) ** 0.5)
    assert (result["num_examples"], result["metric"], result["limit"]) == (3, TASKS[task], None)


def test_the_rows_above_tell_the_metrics_apart(sharp_model):
    model, tokenizer = sharp_model
    found = {
        (task, normalised): [_right(model, tokenizer, task, row, normalised) for row in rows]
        for task, rows in ROWS.items()
        for normalised in (False, True)
    }
    assert any(found[task, False] != found[task, True] for task in ROWS)
    assert any(True in right and False in right for right in found.values())


def test_limit_takes_the_first_examples(sharp_model, folder):
    model, tokenizer = sharp_model
    result = score_task(model, tokenizer, "piqa", data=str(folder), limit=2, batch_size=4)
    right = [_right(model, tokenizer, "piqa", row, normalised=False) for row in ROWS["piqa"][:2]]
    assert result["score"] == pytest.approx(50 * sum(right))
    assert (result["num_examples"], result["limit"]) == (2, 2)


def test_relative_folder_is_looked_up_in_data_dir(sharp_model, folder):
    model, tokenizer = sharp_model
    result = score_task(model, tokenizer, "boolq", data=folder.name, limit=1, batch_size=1, data_dir=folder.parent)
    assert (result["num_examples"], result["stderr"]) == (1, None)


def test_hub_reads_lm_evals_own_data_set(sharp_model, tmp_path, monkeypatch):
    model, tokenizer = sharp_model
    repo = tmp_path / "baber" / "piqa"  # a folder in the hub's layout stands for the hub's data set
    (repo / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = ROWS["piqa"] if split == "validation" else ROWS["piqa"][:1]
        (repo / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    result = score_task(model, tokenizer, "piqa", data="hub", limit=None, batch_size=2)
    right = [_right(model, tokenizer, "piqa", row, normalised=False) for row in ROWS["piqa"]]
    assert result["all"]["acc"] == pytest.approx(sum(right) / 3)
    assert result["num_examples"] == 3


def test_model_tokenizer_and_logging_are_left_as_they_were(tiny_llama, folder):
    model, tokenizer = tiny_llama
    tokenizer.pad_token = None
    logger, root = logging.getLogger("lm_eval"), logging.getLogger()
    before = (logger.level, logger.propagate, logger.handlers[:], root.level, root.handlers[:])
    score_task(model, tokenizer, "boolq", data=str(folder), limit=1, batch_size=1)
    assert (logger.level, logger.propagate, logger.handlers, root.level, root.handlers) == before
    assert "from_string" not in vars(lm_eval.utils.env)
    assert tokenizer.pad_token is None
    assert not model.training


def test_texts_that_look_like_dates_stay_texts_and_labels_may_be_numbers(sharp_model, tmp_path):
    """A JSON reader takes a column of dates for time stamps, whose options lm-eval cannot read."""
    model, tokenizer = sharp_model
    rows = [{**ROWS["piqa"][0], "sol1": "2020-01-01", "sol2": "2021-03-05"}]
    (tmp_path / "piqa.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (tmp_path / "hellaswag.json").write_text(json.dumps([{**row, "label": int(row["label"])} for row in HELLASWAG]))
    (request, _) = task_requests("piqa", data=str(tmp_path), limit=2)
    assert request == "Question: dry a cup\nAnswer: 2020-01-01"
    result = score_task(model, tokenizer, "hellaswag", data=str(tmp_path), limit=None, batch_size=2)
    right = [_right(model, tokenizer, "hellaswag", row, normalised=True) for row in HELLASWAG]
    assert result["all"]["acc_norm"] == pytest.approx(sum(right) / 3)


def test_unusable_task_file_is_a_user_error(tiny_llama, tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 7}\n')
    with pytest.raises(UserError, match=r"piqa.jsonl, line 1, column label: 7 is not one of 0, 1"):
        score_task(*tiny_llama, "piqa", data=str(tmp_path), limit=None, batch_size=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "mmlu"}, "no zero-shot task 'mmlu'; tasks are boolq, piqa"),
        ({"data": "nowhere"}, "nowhere has no piqa.jsonl or piqa.json or piqa.parquet"),
    ],
)
def test_unusable_settings_are_user_errors(tiny_llama, tmp_path, settings, message):
    options = {"task": "piqa", "data": "bundled", "limit": 1, "batch_size": 1, "data_dir": tmp_path, **settings}
    with pytest.raises(UserError, match=message):
        score_task(*tiny_llama, options.pop("task"), **options)


def test_average_is_the_plain_mean():
    assert average({"boolq": 60.0, "piqa": 70.0, "hellaswag": 35.0}) == 55.0
