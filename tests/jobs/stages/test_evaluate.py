"""A result of an evaluation belongs to whoever asks for it, by whatever name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.efficiency import Efficiency
from slm_pipeline.evaluation.perplexity import Perplexity
from slm_pipeline.evaluation.zero_shot import ZeroShot
from slm_pipeline.jobs.stages.evaluate import Evaluate
from slm_pipeline.results.number import Number
from slm_pipeline.store.artifact import Artifact


@dataclass(frozen=True)
class Finished(Artifact):
    """A result that is taken as made."""

    said: dict[str, Any] = field(default_factory=dict)
    done: bool = True

    def record(self) -> dict[str, Any]:
        return {"result": self.said}


def result(**numbers: float) -> Finished:
    written = {key: Number(key, value, "GB", measured={"how": "so"}).to_json() for key, value in numbers.items()}
    return Finished(Path("store"), "evaluate", {}, {"numbers": written})


def test_names_of_a_stage_its_folder_and_what_it_reads():
    texts = Perplexity(corpora=["/data/one/text.txt", "/data/two/text.txt"])
    stage = Evaluate("pruned", texts, "/data/two/text.txt")
    assert stage.name == "evaluate_pruned/perplexity//data/two/text.txt"
    assert stage.folder == "evaluate_pruned/perplexity__data_two_text.txt"
    assert stage.looks_at == Evaluate("dense", texts, "/data/two/text.txt").looks_at
    assert [Evaluate(target, texts, texts.corpora[0]).needs for target in ("dense", "pruned", "recovered")] == [
        (), ("merge",), ("recover",),
    ]  # fmt: skip


def test_numbers_get_the_label_of_the_job_that_reads_them():
    kept = Finished(Path("store"), "evaluate", {}, {"numbers": {"": Number("", 12.5, "perplexity").to_json()}})
    alone = Evaluate("dense", Perplexity(corpora=["one/text.txt"]), "one/text.txt")
    beside = Evaluate("recovered", Perplexity(corpora=["one/text.txt", "two/text.txt"]), "one/text.txt")
    assert [number.key for number in alone.numbers(kept)] == ["dense/perplexity/text.txt"]
    assert [number.key for number in beside.numbers(kept)] == ["recovered/perplexity/one/text.txt"]


def test_numbers_say_their_measure_and_part():
    stage = Evaluate("dense", Efficiency(enabled=True), "")
    numbers = stage.numbers(result(weights_gb=0.5, peak_memory_gb=1.5))
    assert [(number.key, number.value) for number in numbers] == [
        ("dense/efficiency/weights_gb", 0.5), ("dense/efficiency/peak_memory_gb", 1.5),
    ]  # fmt: skip
    assert numbers[0].measured == {"measure": "efficiency", "part": "", "how": "so"}
    (task,) = Evaluate("pruned", ZeroShot(tasks=["piqa"]), "piqa").numbers(
        Finished(Path("store"), "evaluate", {}, {"numbers": {"": Number("", 50.0, "%").to_json()}})
    )
    assert (task.key, task.measured) == ("pruned/piqa", {"measure": "zero_shot", "part": "piqa"})


@pytest.mark.parametrize("target", ["dense", "pruned", "recovered"])
def test_a_checkpoint_is_scored_once_whichever_job_made_it(target):
    texts = Perplexity(corpora=["text.txt"])
    evaluation = SimpleNamespace(identity=lambda: {"perplexity/text.txt": {"text": "t"}})
    job: Any = SimpleNamespace(source=SimpleNamespace(fingerprint="d"), evaluation=evaluation)

    def checkpoint(**results: Finished) -> str | None:
        identity = Evaluate(target, texts, "text.txt").identity(job, results)
        return identity and identity["checkpoint"]

    merge = Finished(Path("store"), "merge", {"method": "a"}, {"checkpoint": "c"})
    same = Finished(Path("store"), "merge", {"method": "b"}, {"checkpoint": "c"})
    to_come = Finished(Path("store"), "merge", {"method": "a"}, {}, done=False)
    recover = Finished(Path("store"), "recover", {}, {})
    if target == "dense":
        assert checkpoint() == "d"
    elif target == "pruned":
        assert checkpoint(merge=merge) == checkpoint(merge=same) == "c"
        assert checkpoint(merge=to_come) is None
    else:
        assert checkpoint(merge=merge) is None
        assert checkpoint(merge=merge, recover=recover) == f"recovered:{recover.key}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_an_error_and_no_result(value, monkeypatch, tmp_path):
    monkeypatch.setattr(Efficiency, "run", lambda *_: {})
    monkeypatch.setattr(Efficiency, "numbers", lambda *_: [Number("weights_gb", 1.0), Number("latency_seconds", value)])
    job = SimpleNamespace(
        loaded=None, recovery=None, source=None, config=SimpleNamespace(model=SimpleNamespace(device="cpu"))
    )
    stage = Evaluate("pruned", Efficiency(enabled=True), "")
    artifact = Artifact(tmp_path, "evaluate", {})
    with pytest.raises(UserError, match=f"pruned/efficiency/latency_seconds is {value}, not a finite number"):
        artifact.produce(lambda out: stage.run(job, {}, out, None))
    assert not artifact.done
