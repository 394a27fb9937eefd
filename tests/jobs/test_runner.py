"""The order of a job's stages, and what is said of results that are reused."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from slm_pipeline.config import STAGES, TARGETS, EvaluationConfig
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.evaluation import Evaluation
from slm_pipeline.evaluation.fidelity import Fidelity
from slm_pipeline.evaluation.perplexity import Perplexity
from slm_pipeline.jobs import runner, steps
from slm_pipeline.jobs.loaded import LoadedModels
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.stages.evaluate import Evaluate
from slm_pipeline.machine import gpus, provenance
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.heard import Heard


class Step(Stage):
    """A stage that reads the results of others, and whose own is an empty folder."""

    def __init__(self, name: str, *needs: str, stage: str = "merge"):
        self.name, self.needs, self.stage = name, needs, stage

    def identity(self, job: Any, results: Any) -> dict[str, Any] | None:
        return {"name": self.name}

    def run(self, job: Any, results: Any, out: Path, tracker: Any) -> dict[str, Any]:
        return {"device": gpus.in_words("cpu")}

    def publish(self, artifact: Any, tracker: Any, *, reused: bool) -> None:
        """Nothing."""


def job_of(store: Path, *, stages=STAGES, force=(), repair: Any = None, recovery: Any = True, of=TARGETS) -> Any:
    """What the runner reads of a job, with two texts and fidelity to score."""
    measures = {"perplexity": Perplexity(corpora=["a.txt", "b.txt"]), "fidelity": Fidelity(corpora=["a.txt"])}
    config = SimpleNamespace(stages=list(stages), force=list(force), model=SimpleNamespace(device="cpu"))
    evaluation = Evaluation(EvaluationConfig(of=list(of)), measures)
    recovery = object() if recovery else None
    return SimpleNamespace(
        config=config,
        pruning_ratio=SimpleNamespace(of_latency=False),
        source=SimpleNamespace(description=None),
        repair=repair,
        recovery=recovery,
        evaluation=evaluation,
        store=store,
        loaded=LoadedModels(),
        warnings=(),
    )


def scores(target: str) -> list[str]:
    texts = [f"evaluate_{target}/perplexity/{name}.txt" for name in "ab"]
    return texts + ([] if target == "dense" else [f"evaluate_{target}/fidelity/a.txt"])


def test_the_steps_of_a_job_in_their_order(tmp_path):
    names = [step.stage.name for step in steps.steps(job_of(tmp_path))]
    assert names == ["calibrate", "merge", "recover", *scores("dense"), *scores("pruned"), *scores("recovered")]
    assert [step.stage.name for step in steps.steps(job_of(tmp_path, recovery=None))] == [
        "calibrate", "merge", *scores("dense"), *scores("pruned"),
    ]  # fmt: skip
    assert [step.stage.name for step in steps.steps(job_of(tmp_path, repair=object()))] == [
        "calibrate", "merge", "repair", "recover",
        *(name for target in ("dense", "pruned", "repaired", "recovered") for name in scores(target)),
    ]  # fmt: skip
    some = steps.steps(job_of(tmp_path, stages=["recover"]))
    assert [(step.stage.name, step.selected) for step in some] == [
        ("calibrate", False), ("merge", False), ("recover", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("force", "forced"),
    [
        ([], []),
        (["calibrate"], ["calibrate", "merge", "recover", *scores("pruned"), *scores("recovered")]),
        (["merge"], ["merge", "recover", *scores("pruned"), *scores("recovered")]),
        (["recover"], ["recover", *scores("recovered")]),
        (["evaluate"], [*scores("dense"), *scores("pruned"), *scores("recovered")]),
    ],
)
def test_what_is_forced_forces_what_reads_it(force, forced, tmp_path):
    found = steps.steps(job_of(tmp_path, force=force))
    assert [step.stage.name for step in found if step.forced] == forced


@pytest.mark.parametrize(("force", "also"), [("merge", True), ("repair", True), ("recover", False)])
def test_a_forced_repair_forces_the_recovery_that_begins_with_it(force, also, tmp_path):
    found = [step.stage.name for step in steps.steps(job_of(tmp_path, force=[force], repair=object())) if step.forced]
    assert set(found) >= {"recover", *scores("recovered")}
    assert {"repair", *scores("repaired")}.issubset(found) == also
    assert set(scores("pruned")).issubset(found) == (force == "merge")


def test_a_stage_that_reads_what_nobody_makes_is_refused(tmp_path, monkeypatch):
    def selecting(*selected: bool):
        stages = (Step("first"), Step("second", "first"), Step("third", "second"))
        pairs = zip(stages, selected, strict=True)
        monkeypatch.setattr(steps, "steps", lambda _: [steps.Step(stage, chosen, False) for stage, chosen in pairs])

    selecting(False, False, True)
    job = job_of(tmp_path, stages=["merge"])
    with pytest.raises(UserError, match=r"stages=\['merge'\]: third needs the result of second, which is not there"):
        steps.plan(job)
    selecting(False, True, True)
    with pytest.raises(UserError, match="second needs the result of first"):
        steps.plan(job)
    Artifact(tmp_path, "merge", {"name": "first"}).produce(lambda _: {})
    selecting(False, True, True)
    assert [(step.stage.name, step.selected) for step, _ in steps.plan(job)] == [
        ("first", False), ("second", True), ("third", True),
    ]  # fmt: skip


@pytest.fixture
def waiting(tmp_path):
    """Two chains: b reads a, d reads c."""
    stages = [Step("a"), Step("b", "a"), Step("c"), Step("d", "c")]
    return [steps.Step(stage, True, False) for stage in stages]


def held(store: Path, name: str) -> FileLock:
    lock = Artifact(store, "merge", {"name": name}).lock
    lock.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock)


def test_the_next_step_is_the_first_that_nobody_is_at(tmp_path, waiting):
    job = job_of(tmp_path)

    def following(results: dict[str, Artifact]) -> str:
        return runner._next([step for step in waiting if step.stage.name not in results], job, results)[0].stage.name

    def done(*names: str) -> dict[str, Artifact]:
        return {name: Artifact(tmp_path, "merge", {"name": name}) for name in names}

    assert following({}) == "a"
    with held(tmp_path, "a"):
        assert following({}) == "c"  # b has to wait for a
        assert following(done("c")) == "d"
        with held(tmp_path, "c"):
            assert following({}) == "a"  # all are taken: wait for the first
    assert following(done("a")) == "b"
    assert following(done("a", "b", "c")) == "d"


NOW = {"git_commit": "1" * 40, "versions": {
    "slm_pipeline": "2.0", "torch": "2.9", "transformers": "5.0", "tokenizers": "0.22", "numpy": "2.0"}}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "result", "said"),
    [
        ({}, {}, []),
        ({}, {"device": "cpu"}, []),
        ({"numpy": "1.0", "python": "3.9"}, {}, []),
        ({"torch": "2.8"}, {}, ["reused a result of torch 2.8; here is 2.9"]),
        (
            {"transformers": "4.0", "tokenizers": None},
            {},
            ["reused a result of transformers 4.0; here is 5.0", "reused a result of tokenizers None; here is 0.22"],
        ),
        ({"slm_pipeline": "1.0"}, {}, ["reused a result of slm_pipeline 1.0"]),
        ({}, {"device": "H100"}, ["reused a result measured on H100; model.device=cpu is cpu here"]),
    ],
)
def test_what_is_said_of_a_result_that_was_made_otherwise(changes, result, said, monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "collect", lambda: NOW)
    made = {**NOW, "versions": {**NOW["versions"], **changes}}
    stage = Evaluate("dense", Perplexity(corpora=["a.txt"]), "a.txt")
    lines = runner._made_otherwise(stage, {"provenance": made, "result": result}, job_of(tmp_path))
    assert lines == [f"evaluate: {line}" for line in said]


def test_another_commit_is_named_where_the_version_is_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "collect", lambda: NOW)
    job, stage = job_of(tmp_path), Step("a")
    for commit, words in (("2" * 40, "2" * 12), (None, "unknown")):
        record = {"provenance": {**NOW, "git_commit": commit}, "result": {}}
        assert runner._made_otherwise(stage, record, job) == [f"merge: reused a result of commit {words}"]
    older = {"provenance": {"git_commit": "2" * 40, "versions": {**NOW["versions"], "slm_pipeline": "1.0"}}}
    assert runner._made_otherwise(stage, {**older, "result": {}}, job) == ["merge: reused a result of slm_pipeline 1.0"]


def test_each_warning_of_reuse_is_said_once_and_a_results_own_are_said_again(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "slm_pipeline")
    job = job_of(tmp_path)

    class Warns(Step):
        def run(self, *_: Any, **__: Any) -> dict[str, Any]:
            runner.log.warning("the guard failed")
            return {}

    stages = [Step("a", stage="evaluate"), Step("b", stage="evaluate"), Step("c"), Warns("d")]

    def produce() -> list[bool]:
        caplog.clear()
        with Heard() as heard:  # one run
            return [
                runner._produce(
                    steps.Step(stage, True, False),
                    Artifact(tmp_path, stage.stage, stage.identity(job, {})),
                    job,
                    {},
                    None,
                    heard.messages,
                )
                for stage in stages
            ]

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    older = {**provenance.collect()["versions"], "torch": "1.0"}
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "collect", lambda: {"git_commit": None, "versions": older})
        patch.setattr(gpus, "in_words", lambda _: "H100")
        assert produce() == [False, False, False, False]
    assert warnings() == ["the guard failed"]
    now = provenance.collect()
    monkeypatch.setattr(provenance, "collect", lambda: {**now, "git_commit": None})
    assert produce() == [True, True, True, True]
    here = now["versions"]["torch"]
    assert warnings() == [
        f"evaluate: reused a result of torch 1.0; here is {here}",
        "evaluate: reused a result measured on H100; model.device=cpu is cpu here",
        f"merge: reused a result of torch 1.0; here is {here}",
        "merge: reused a result measured on H100; model.device=cpu is cpu here",
        "the guard failed",  # kept with the result that it is about
    ]


def test_models_of_evaluations_are_let_go_before_any_other_stage(tmp_path):
    job = job_of(tmp_path)

    class Scores(Evaluate):
        def __init__(self) -> None:
            super().__init__("dense", Perplexity(corpora=["a.txt"]), "a.txt")

        def run(self, *_: Any, **__: Any) -> dict[str, Any]:
            job.loaded.get("dense", lambda: ("model", "tokenizer"))
            return {}

    def kept_after(stage: Stage) -> bool:
        artifact = Artifact(tmp_path, stage.stage, {"name": stage.name})
        runner._produce(steps.Step(stage, True, False), artifact, job, {}, None, set())
        loads = []
        job.loaded.get("dense", lambda: loads.append("again") or ("model", "tokenizer"))
        return not loads

    assert kept_after(Scores())
    assert not kept_after(Step("a"))  # merge and recover load models of their own
