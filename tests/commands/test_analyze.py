"""``slm-analyze`` end to end on a random model, and what it says to wrong arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from slm_pipeline.analysis import dynamic_skip, painters
from slm_pipeline.commands import analyze
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan


def plan_for(num_layers: int = 6) -> Plan:
    """One layer dropped, two merged."""
    return Plan(
        model={"name": "random", "fingerprint": "", "num_layers": num_layers},
        method="by_hand",
        options={},
        calibration={},
        ops=[Merge((1, 2), "mean"), Drop((4,))],
    )


RANDOM = (
    "model=random", "model.num_layers=6", "model.device=cpu", "calibration=text_file", "calibration.path=text.txt",
    "calibration.num_samples=5", "calibration.seq_len=16",
)  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the mill stands by the river " * 20)
    plan_for().write(Path("plan.json"))
    return tmp_path


def slm_analyze(*words: str) -> int:
    """Exit status of ``slm-analyze words``."""
    try:
        with mock.patch.object(sys, "argv", ["slm-analyze", *words]):
            analyze.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_dynamic_skip(here, capsys):
    assert slm_analyze("dynamic-skip", "--plan", "plan.json", *RANDOM, "--tolerance", "0.02", "seed=7") == 0
    out = capsys.readouterr().out
    folder = here / "outputs" / "analysis" / "dynamic_skip"
    assert {file.name for file in folder.iterdir()} == {f"dynamic_skip.{kind}" for kind in ("json", "png", "svg")}
    found = json.loads((folder / "dynamic_skip.json").read_text())
    assert found["model"]["name"] == "random"
    assert found["calibration"]["num_samples"] == 5
    assert found["calibration"]["seed"] == 7
    assert len(found["calibration"]["fingerprint"]) == 64
    assert found["tolerance"] == 0.02
    assert found["keep_sets"] == dynamic_skip.evenly_spaced(6)
    assert [len(row) for row in found["losses"]] == [5] * 6
    assert sum(found["oracle"]["counts"]) == 5
    assert out.startswith("random, 5 x 16 tokens of text_file, float32\n")
    assert f"{found['oracle']['mean_num_layers']:.1f} of 6 on average" in out
    assert f"{found['static'][2]['perplexity']:.4g}" in out
    assert f"{found['plans'][0]['perplexity']:.4g}" in out
    assert not (here / "outputs" / "store").exists()

    assert slm_analyze("dynamic-skip", *RANDOM, "seed=7", "--out", "elsewhere") == 0
    again = json.loads(Path("elsewhere/dynamic_skip.json").read_text())
    assert (again["losses"], again["plans"]) == (found["losses"], [])


def write_tasks() -> None:
    """Examples of two tasks, in a folder."""
    piqa = [{"goal": f"goal {i * 'x'}", "sol1": "left", "sol2": "right", "label": i % 2} for i in range(12)]
    openbookqa = [
        {"question_stem": f"stem {i * 'y'}", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
        for i in range(12)
    ]
    Path("tasks").mkdir()
    for task, rows in (("piqa", piqa), ("openbookqa", openbookqa)):
        Path("tasks", f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_similarity(here, capsys):
    write_tasks()
    Path("more.txt").write_text("another day at the sea " * 20)
    words = [
        "--tasks",
        "piqa,openbookqa",
        "--text",
        "more.txt",
        "--limit",
        "9",
        "--minibatch",
        "4",
        "--plan",
        "plan.json",
    ]
    assert slm_analyze("similarity", *RANDOM, "evaluation.data=tasks", *words) == 0
    out = capsys.readouterr().out
    folder = here / "outputs" / "analysis" / "similarity"
    names = {f"{stem}.{kind}" for stem in ("cosine", "cka") for kind in ("png", "svg")}
    assert {file.name for file in folder.iterdir()} == {"similarity.json", *names}
    found = json.loads((folder / "similarity.json").read_text())
    assert list(found["maps"]) == ["text_file", "more.txt", "piqa", "openbookqa"]
    assert {name: about["num_sequences"] for name, about in found["texts"].items()} == {
        "text_file": 5,
        "more.txt": 5,
        "piqa": 9,
        "openbookqa": 9,
    }
    assert found["texts"]["piqa"]["num_minibatches"] == 2
    assert found["settings"]["estimator"] == "unbiased"
    for maps in found["maps"].values():
        for summary in maps.values():
            matrix = summary["matrix"]
            assert [len(row) for row in matrix] == [7] * 7
            assert [matrix[i][i] for i in range(7)] == pytest.approx([1.0] * 7)
            assert [layer for first, last in summary["patches"] for layer in range(first, last + 1)] == list(range(6))
    assert found["plans"][0]["windows"] == [[1, 2]]
    assert found["maps"]["piqa"]["cka"]["matrix"] != found["maps"]["openbookqa"]["cka"]["matrix"]
    assert out.startswith("random, float32\ncosine similarity")
    assert "piqa: " in out
    assert f"{found['agreement']['cka'][0][1]:.3f}" in out
    assert "by_hand, plan.json: merges 1-2; drops 4" in out
    assert not (here / "outputs" / "store").exists()


def test_similarity_as_published(here, capsys):
    """Flattened pairs of question and option in minibatches of 16, the published estimator."""
    write_tasks()
    words = ["--tasks", "piqa", "--per-option", "--limit", "4", "--minibatch", "4", "--raw", "--max-tokens", "25"]
    words += ["--features", "flattened", "--estimator", "official", "--metric", "cka", "--num-patches", "2"]
    assert slm_analyze("similarity", *RANDOM, "evaluation.data=tasks", *words, "--out", "there") == 0
    found = json.loads(Path("there/similarity.json").read_text())
    assert {file.name for file in Path("there").iterdir()} == {"similarity.json", "cka.png", "cka.svg"}
    assert "CKA of each text's states in a row, official, linear kernel, states as they are" in capsys.readouterr().out
    assert len(found["maps"]["piqa"]["cka"]["patches"]) == 2
    assert found["texts"]["piqa"]["num_tokens"] == 4 * 25


def test_painters(here, capsys):
    assert slm_analyze("painters", *RANDOM, "--loops", "2", "--orders", "2", "seed=3") == 0
    out = capsys.readouterr().out
    folder = here / "outputs" / "analysis" / "painters"
    assert {file.name for file in folder.iterdir()} == {f"painters.{kind}" for kind in ("json", "png", "svg")}
    found = json.loads((folder / "painters.json").read_text())
    assert (found["ranges"], found["loops"], found["seed"]) == ([[2, 3], [1, 4]], 2, 3)
    assert list(found["variants"]) == list(painters.VARIANTS)
    assert [len(points["losses"]) for points in found["variants"]["random"]] == [2, 2]
    assert found["text"]["source"] == "text_file"
    assert f"{found['variants']['looped'][1]['perplexity']:.4g}" in out

    assert slm_analyze("painters", *RANDOM, "--corpus", "text.txt", "--keep-ends", "2", "--out", "there") == 0
    again = json.loads(Path("there/painters.json").read_text())
    assert again["ranges"] == [[2, 3]]
    assert (again["text"]["corpus"], again["text"]["num_samples"]) == ("text.txt", 5)
    assert again["dense"] != found["dense"]  # the samples are others


NOTHING_LEFT = (
    "--estimator=official cuts HSIC to whole numbers, which leaves nothing of those below 1: add --raw, keep"
    " --kernel linear"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["skip"], "unknown analysis 'skip'; there is: dynamic-skip, similarity, painters"),
        (["dynamic-skip", "--tolerance=-0.1"], "--tolerance=-0.1 must be a number of at least 0"),
        (["dynamic-skip", "--tolerance=nan"], "--tolerance=nan must be a number of at least 0"),
        (
            ["dynamic-skip", "--tolerance=x"],
            "argument --tolerance: invalid float value: 'x'; see slm-analyze dynamic-skip --help",
        ),
        (["dynamic-skip", "--wrong"], "unrecognized arguments: --wrong; see slm-analyze dynamic-skip --help"),
        (["dynamic-skip", "--plan", "none.json"], "cannot read none.json: No such file or directory"),
        (
            ["dynamic-skip", "--plan", "plan.json", "model.num_layers=7"],
            "plan.json is a plan for 6 layers; random has 7",
        ),
        (["dynamic-skip", "--out", "text.txt"], "--out='text.txt': {here}/text.txt is not a folder"),
        (
            ["dynamic-skip", "calibration.seq_len=1"],
            "calibration.seq_len=1 leaves no token to predict; it must be at least 2",
        ),
        (["dynamic-skip", "seed=1,2"], "seed=1,2 asks for several jobs; slm-analyze dynamic-skip runs one"),
        (["similarity", "--metric", "cosine,angle"], "--metric=cosine,angle: choose of cosine, cka"),
        (["similarity", "--estimator=best"], "--estimator=best: choose one of unbiased, biased, official"),
        (["similarity", "--kernel=linear,rbf"], "--kernel=linear,rbf: choose one of linear, rbf"),
        (["similarity", "--features=last"], "--features=last: choose one of mean_pooled, tokens, flattened"),
        (
            ["similarity", "--tasks", "boolq,mnli"],
            "--tasks=boolq,mnli: choose of boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa",
        ),
        (
            ["similarity", "--sources", "pile"],
            "--sources=pile: choose of bundled, text_file, bookcorpus, c4, wikitext2, slimpajama",
        ),
        (["similarity", "--text", "none.txt"], "calibration.path='none.txt' does not exist"),
        (["similarity", "--limit=0"], "--limit=0 must be at least 1"),
        (["similarity", "--minibatch=1"], "--minibatch=1 must be at least 4"),
        (["similarity", "--estimator=biased", "--minibatch=1"], "--minibatch=1 must be at least 2"),
        (["similarity", "--estimator=official"], NOTHING_LEFT),
        (["similarity", "--estimator=official", "--raw", "--kernel=rbf"], NOTHING_LEFT),
        (["similarity", "--bandwidth=2"], "--bandwidth does nothing without --kernel rbf"),
        (["similarity", "--metric=cosine", "--raw"], "--raw does nothing without --metric cka"),
        (["similarity", "--per-option"], "--per-option does nothing without --tasks"),
        (["similarity", "--kernel=rbf", "--bandwidth=nan"], "--bandwidth=nan must be a number above 0"),
        (["similarity", "--num-patches=7"], "--num-patches=7 must be in 1..6, the model's layers"),
        (["similarity", "--plan", "plan.json", "model.num_layers=7"], "plan.json is a plan for 6 layers; random has 7"),
        (["similarity"], "text_file: 5 rows are fewer than --minibatch=64; give it more text"),
        (["painters", "--keep-ends=3"], "--keep-ends=3 leaves fewer than 2 of 6 layers in the middle"),
        (["painters", "--loops=0"], "--loops=0 must be at least 1"),
        (
            ["painters", "--corpus", "pile"],
            "--corpus: 'pile' is not a file in {here} and not one of bundled, wikitext2, c4, ptb",
        ),
        (
            ["dynamic-skip", "calibration.wrong=1"],
            "Could not override 'calibration.wrong'. See slm --cfg job for all keys."
            " Key 'wrong' not in 'CalibrationConfig'",
        ),
    ],
)
def test_mistakes_are_one_line_and_found_before_the_model_is_loaded(words, message, here, capsys, monkeypatch):
    monkeypatch.setattr("slm_pipeline.models.loading.load_dense", lambda source: pytest.fail("loaded"))
    name, *rest = words
    assert slm_analyze(name, *RANDOM, *rest) == 2
    assert capsys.readouterr().err == f"error: {message.format(here=here)}\n"
    assert not (here / "outputs").exists()


def test_help(capsys):
    assert slm_analyze() == 2
    assert slm_analyze("--help") == 0
    assert capsys.readouterr().out.count("slm-analyze dynamic-skip") == 4
    for analysis, option in (("dynamic-skip", "--tolerance"), ("similarity", "--estimator"), ("painters", "--loops")):
        assert slm_analyze(analysis, "--help") == 0
        assert option in capsys.readouterr().out
