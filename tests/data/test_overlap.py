"""Overlap counted by hand, against a plain search, and through a whole run."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from conftest import run_slm

from slm_pipeline.data.overlap import overlaps, word_passages
from slm_pipeline.evaluation.zero_shot import task_documents


def numbered(first, count, letter="w"):
    return " ".join(f"{letter}{number:04}" for number in range(first, first + count))


def test_thirteen_words_in_a_row():
    """The first shares words 5 to 17, the second only 12 of them, the third all 13 but not in a row."""
    texts = [numbered(0, 40), numbered(6, 30), numbered(0, 10) + " gap " + numbered(10, 20)]
    examples = [{"text": numbered(100, 50)}, {"text": f"{numbered(300, 9)} {numbered(5, 13)} {numbered(400, 9)}"}]
    assert overlaps({"task": texts}, examples) == {"task": {"documents": 1, "of": 3}}


def test_case_and_signs_do_not_count():
    document = "The (old) mill's wheel -- turning, turning -- has\nstood_still for 100 years, \u00c9mile says."
    example = "THE OLD MILL S WHEEL TURNING TURNING HAS STOOD STILL FOR 100 YEARS \u00c9MILE SAYS"
    assert overlaps({"task": [document]}, [{"text": example}]) == {"task": {"documents": 1, "of": 1}}


def test_short_documents_match_as_a_whole_or_are_not_counted():
    """Lengths 7, 8, 8, 12: of the last but one a word is missing in the example."""
    texts = [numbered(0, 7), numbered(0, 8), numbered(33, 8), numbered(20, 12)]
    examples = [{"text": numbered(0, 40)}]
    assert overlaps({"task": texts}, examples) == {"task": {"documents": 2, "of": 3}}
    assert overlaps({"task": texts[:1], "other": texts[2:3]}, examples) == {}


def test_every_kind_of_example_is_read_and_its_strings_are_one_text():
    document = {"task": [numbered(0, 13)]}
    first, second = numbered(0, 6), numbered(6, 7)
    for example in (
        {"instruction": first, "input": second, "output": "x"},
        {"instruction": "x", "input": first, "output": second},
        {"messages": [{"role": "user", "content": first}, {"role": "assistant", "content": second}]},
    ):
        assert overlaps(document, iter([example])) == {"task": {"documents": 1, "of": 1}}
    assert overlaps(document, [{"text": first}, {"text": second}]) == {}


def test_the_plain_search_finds_the_same():
    draw = random.Random(0)
    texts = [" ".join(draw.choice("ab") for _ in range(draw.randint(5, 30))) for _ in range(200)]
    examples = [{"text": " ".join(draw.choice("ab") for _ in range(400))} for _ in range(5)]

    def overlapping(text):
        words = text.split()
        length = min(len(words), 13)
        runs = [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]
        return any(f" {run} " in f" {example['text']} " for run in runs for example in examples)

    counted = [text for text in texts if len(text.split()) >= 8]
    expected = sum(map(overlapping, counted))
    assert 0 < expected < len(counted) < 200
    assert overlaps({"task": texts}, examples) == {"task": {"documents": expected, "of": len(counted)}}


def test_running_text_is_cut_into_passages():
    cut = word_passages(numbered(0, 450).replace(" ", ".\n"))
    assert cut == [numbered(0, 200), numbered(200, 200), numbered(400, 50)]
    assert word_passages(" - ") == []


def test_documents_of_tasks(tmp_path):
    """Question and options without the answer, as many as are scored."""
    arc = {"id": "1", "question": "Q?", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "A"}
    hellaswag = {
        "activity_label": "Act",
        "ctx_a": "A man",
        "ctx_b": "he",
        "endings": ["x", "y"],
        "label": "1",
        "ind": 0,
    }
    winogrande = {"sentence": "Ann _.", "option1": "a", "option2": "b", "answer": "2"}
    for task, row in (("arc_easy", arc), ("hellaswag", hellaswag), ("winogrande", winogrande)):
        (tmp_path / f"{task}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    found = {
        task: task_documents(task, data=str(tmp_path), limit=limit)
        for task, limit in (("arc_easy", None), ("hellaswag", 2), ("winogrande", 5))
    }
    assert found == {
        "arc_easy": ["Q?\np\nq"] * 3,
        "hellaswag": ["Act\nA man\nhe\nx\ny"] * 2,
        "winogrande": ["Ann _.\na\nb"] * 3,
    }


def test_a_run_says_how_much_of_its_evaluation_it_trained_on(tmp_path, monkeypatch):
    """piqa: of the first three examples one is in the data, one is not, one has 7 words; the fourth is not scored.

    The corpus is 1000 words of 6 bytes, of which 3600 bytes are scored, and the data have 20 words across the end of
    its first passage: 5 there, 15 in the second. The last passage is in the data too, but not scored.
    """
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text(numbered(0, 1000) + " ")
    piqa = [
        {"goal": numbered(0, 14, "p"), "sol1": "this", "sol2": "that", "label": 0},
        {"goal": numbered(0, 5, "q"), "sol1": "this", "sol2": "that", "label": 1},
        {"goal": numbered(0, 30, "r"), "sol1": "this", "sol2": "that", "label": 1},
        {"goal": numbered(50, 14, "p"), "sol1": "this", "sol2": "that", "label": 1},
    ]
    Path("piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in piqa))
    copied = [numbered(0, 100, "p").upper(), numbered(195, 20), numbered(900, 100)]
    Path("data.json").write_text(json.dumps([f"{text} {number}" for text in copied for number in range(5)]))
    overrides = [
        "model=random", "model.num_layers=4", "model.hidden_size=32", "model.intermediate_size=48", "tracker=jsonl",
        "calibration=text_file", "calibration.path=corpus.txt", "calibration.num_samples=2", "calibration.seq_len=16",
        "method=reverse", "pruning_ratio=layers", "pruning_ratio.num_layers=3",
        "recovery.source=file", "recovery.path=data.json", "recovery.validation_size=2", "recovery.max_steps=1",
        "recovery.batch_size=1", "recovery.micro_batch_size=1", "recovery.warmup_steps=0", "recovery.dtype=float32",
        "evaluation=zero_shot", "evaluation.data=.", "evaluation.tasks=[piqa]", "evaluation.limit=3",
        "evaluation.perplexity.corpora=[corpus.txt]", "evaluation.perplexity.window=128",
        "evaluation.perplexity.max_tokens=3600",
    ]  # fmt: skip
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    for _ in range(2):  # the second time all is reused
        outcome = run_slm(*overrides)
        assert outcome.status == 0, outcome.err
        folder = Path(re.search(r"all of it: (\S+)", outcome.out)[1])
        summary = json.loads((folder / "summary.json").read_text())
        details = summary["details"]
        assert details["evaluate_recovered"]["overlap"] == {
            "piqa": {"documents": 1, "of": 2},
            "perplexity/corpus.txt": {"documents": 1, "of": 3},
        }
        assert "overlap" not in details["evaluate_dense"]
        assert "overlap" not in details["evaluate_pruned"]
        assert sorted(summary["metrics"]["recovered"]) == ["perplexity", "zero_shot"]
        said = [line for line in summary["warnings"] if "in a row" in line]
        assert said == [
            "perplexity/corpus.txt: 1 of 3 documents share 13 words in a row with the recovery's training data",
            "piqa: 1 of 2 documents share 13 words in a row with the recovery's training data",
        ]
