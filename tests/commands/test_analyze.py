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


def only(folder: Path) -> Path:
    """The one folder in a folder."""
    (found,) = folder.iterdir()
    return found


def test_dynamic_skip(here, capsys):
    assert slm_analyze("dynamic-skip", "analysis.plans=plan.json", *RANDOM, "analysis.tolerance=0.02", "seed=7") == 0
    out = capsys.readouterr().out
    folder = only(here / "outputs" / "analysis" / "dynamic_skip" / "random")
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

    assert slm_analyze("dynamic-skip", *RANDOM, "seed=7", "hydra.run.dir=elsewhere") == 0
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
    words = ["tasks=[piqa,openbookqa]", "texts=[more.txt]", "limit=9", "minibatch=4", "plans=[plan.json]"]
    words = [f"analysis.{word}" for word in words]
    assert slm_analyze("similarity", *RANDOM, "evaluation.data=tasks", *words) == 0
    out = capsys.readouterr().out
    folder = only(here / "outputs" / "analysis" / "similarity" / "random")
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
    words = ["tasks=[piqa]", "per_option=true", "limit=4", "minibatch=4", "raw=true", "max_tokens=25", "num_patches=2"]
    words += ["features=flattened", "estimator=official", "metrics=[cka]"]
    words = [f"analysis.{word}" for word in words]
    assert slm_analyze("similarity", *RANDOM, "evaluation.data=tasks", *words, "hydra.run.dir=there") == 0
    found = json.loads(Path("there/similarity.json").read_text())
    assert {file.name for file in Path("there").iterdir()} == {"similarity.json", "cka.png", "cka.svg"}
    assert "CKA of each text's states in a row, official, linear kernel, states as they are" in capsys.readouterr().out
    assert len(found["maps"]["piqa"]["cka"]["patches"]) == 2
    assert found["texts"]["piqa"]["num_tokens"] == 4 * 25


def test_painters(here, capsys):
    assert slm_analyze("painters", *RANDOM, "analysis.loops=2", "analysis.orders=2", "seed=3") == 0
    out = capsys.readouterr().out
    folder = only(here / "outputs" / "analysis" / "painters" / "random")
    assert {file.name for file in folder.iterdir()} == {f"painters.{kind}" for kind in ("json", "png", "svg")}
    found = json.loads((folder / "painters.json").read_text())
    assert (found["ranges"], found["loops"], found["seed"]) == ([[2, 3], [1, 4]], 2, 3)
    assert list(found["variants"]) == list(painters.VARIANTS)
    assert [len(points["losses"]) for points in found["variants"]["random"]] == [2, 2]
    assert found["text"]["source"] == "text_file"
    assert f"{found['variants']['looped'][1]['perplexity']:.4g}" in out

    assert (
        slm_analyze("painters", *RANDOM, "analysis.corpus=text.txt", "analysis.keep_ends=2", "hydra.run.dir=there") == 0
    )
    again = json.loads(Path("there/painters.json").read_text())
    assert again["ranges"] == [[2, 3]]
    assert (again["text"]["corpus"], again["text"]["num_samples"]) == ("text.txt", 5)
    assert again["dense"] != found["dense"]  # the samples are others


NOTHING_LEFT = (
    "analysis.estimator=official cuts HSIC to whole numbers, which leaves nothing of those below 1: add"
    " analysis.raw=true, keep analysis.kernel=linear"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["skip"], "unknown analysis 'skip'; there is: dynamic-skip, similarity, painters"),
        (["dynamic-skip", "analysis.tolerance=-0.1"], "analysis.tolerance=-0.1 must be at least 0"),
        (["dynamic-skip", "analysis.tolerance=nan"], "analysis.tolerance=nan must be a finite number at least 0"),
        (
            ["dynamic-skip", "analysis.tolerance=x"],
            "analysis.tolerance: Value 'x' of type 'str' could not be converted to Float",
        ),
        (
            ["dynamic-skip", "--tolerance=0.1"],
            "--tolerance=0.1: options are written as for slm, analysis.tolerance=...; see slm-analyze dynamic-skip"
            " --help",
        ),
        (
            ["similarity", "-x"],
            "-x: options are written as for slm, analysis.NAME=...; see slm-analyze similarity --help",
        ),
        (
            ["dynamic-skip", "analysis.plan=x"],
            "analysis.plan does not exist for slm-analyze dynamic-skip; did you mean plans?",
        ),
        (["dynamic-skip", "analysis.plans=none.json"], "cannot read none.json: No such file or directory"),
        (
            ["dynamic-skip", "analysis.plans=[plan.json]", "model.num_layers=7"],
            "plan.json is a plan for 6 layers; random has 7",
        ),
        (["dynamic-skip", "hydra.run.dir=text.txt"], "hydra.run.dir='text.txt': {here}/text.txt is not a folder"),
        (
            ["dynamic-skip", "hydra.run.dir=done"],
            "hydra.run.dir=done has the result of another analysis; choose a new folder",
        ),
        (
            ["dynamic-skip", "calibration.seq_len=1"],
            "calibration.seq_len=1 leaves no token to predict; it must be at least 2",
        ),
        (["dynamic-skip", "seed=1,2"], "seed=1,2 asks for several jobs; slm-analyze dynamic-skip runs one"),
        (
            ["similarity", "analysis.tasks=piqa,boolq"],
            "analysis.tasks=piqa,boolq asks for several jobs; slm-analyze similarity runs one, or as a list"
            " analysis.tasks=[piqa,boolq]",
        ),
        (["similarity", "analysis.metrics=[cosine,angle]"], "analysis.metrics=cosine,angle: choose of cosine, cka"),
        (["similarity", "analysis.metrics=[]"], "analysis.metrics=: choose of cosine, cka"),
        (["similarity", "analysis.estimator=best"], "analysis.estimator=best: choose of unbiased, biased, official"),
        (["similarity", "analysis.kernel=cubic"], "analysis.kernel=cubic: choose of linear, rbf"),
        (["similarity", "analysis.features=last"], "analysis.features=last: choose of mean_pooled, tokens, flattened"),
        (
            ["similarity", "analysis.tasks=[boolq,mnli]"],
            "analysis.tasks=boolq,mnli: choose of boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge,"
            " openbookqa",
        ),
        (
            ["similarity", "analysis.sources=[pile]"],
            "analysis.sources=pile: choose of bundled, text_file, bookcorpus, c4, wikitext2, slimpajama",
        ),
        (["similarity", "analysis.texts=[none.txt]"], "calibration.path='none.txt' does not exist"),
        (["similarity", "analysis.limit=0"], "analysis.limit=0 must be at least 1 and below 2147483648"),
        (["similarity", "analysis.minibatch=1"], "analysis.minibatch=1 must be at least 4"),
        (
            ["similarity", "analysis.estimator=biased", "analysis.minibatch=1"],
            "analysis.minibatch=1 must be at least 2",
        ),
        (["similarity", "analysis.estimator=official"], NOTHING_LEFT),
        (["similarity", "analysis.estimator=official", "analysis.raw=true", "analysis.kernel=rbf"], NOTHING_LEFT),
        (["similarity", "analysis.bandwidth=2"], "analysis.bandwidth does nothing without analysis.kernel=rbf"),
        (
            ["similarity", "analysis.metrics=[cosine]", "analysis.raw=true"],
            "analysis.raw does nothing without analysis.metrics=cka",
        ),
        (["similarity", "analysis.per_option=true"], "analysis.per_option does nothing without analysis.tasks"),
        (
            ["similarity", "analysis.kernel=rbf", "analysis.bandwidth=nan"],
            "analysis.bandwidth=nan must be a finite number above 0",
        ),
        (["similarity", "analysis.num_patches=7"], "analysis.num_patches=7 must be in 1..6, the model's layers"),
        (
            ["similarity", "analysis.plans=[plan.json]", "model.num_layers=7"],
            "plan.json is a plan for 6 layers; random has 7",
        ),
        (["similarity"], "text_file: 5 rows are fewer than analysis.minibatch=64; give it more text"),
        (["painters", "analysis.keep_ends=3"], "analysis.keep_ends=3 leaves fewer than 2 of 6 layers in the middle"),
        (["painters", "analysis.loops=0"], "analysis.loops=0 must be at least 1 and below 2147483648"),
        (
            ["painters", "analysis.corpus=pile"],
            "analysis.corpus: 'pile' is not a file in {here} and not one of bundled, wikitext2, c4, ptb",
        ),
        (
            ["dynamic-skip", "calibration.wrong=1"],
            "Could not override 'calibration.wrong' (did you mean calibration.bos, calibration, calibration.sampling?)."
            " See slm --cfg job for all keys."
            " Key 'wrong' not in 'CalibrationConfig'",
        ),
    ],
)
def test_mistakes_are_one_line_and_found_before_the_model_is_loaded(words, message, here, capsys, monkeypatch):
    monkeypatch.setattr("slm_pipeline.models.loading.load_dense", lambda source: pytest.fail("loaded"))
    Path("done").mkdir()
    Path("done", "dynamic_skip.json").touch()
    name, *rest = words
    assert slm_analyze(name, *RANDOM, *rest) == 2
    assert capsys.readouterr().err == f"error: {message.format(here=here)}\n"
    assert not (here / "outputs").exists()


def test_help(capsys):
    assert slm_analyze() == 2
    assert slm_analyze("--help") == 0
    assert capsys.readouterr().out.count("slm-analyze dynamic-skip") == 4
    for analysis, option in (
        ("dynamic-skip", "analysis.tolerance=0.0 "),
        ("similarity", "analysis.metrics=[cosine,cka] "),
        ("painters", "analysis.corpus=null "),
    ):
        assert slm_analyze(analysis, "--help") == 0
        assert option in capsys.readouterr().out
