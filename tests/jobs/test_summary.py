"""summary.json: its numbers under their keys, and the forms that scripts of before numbers had keys read."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slm_pipeline.config import EvaluationConfig, PruningRatioConfig
from slm_pipeline.evaluation.efficiency import Efficiency
from slm_pipeline.evaluation.evaluation import Evaluation
from slm_pipeline.evaluation.perplexity import Perplexity
from slm_pipeline.evaluation.zero_shot import ZeroShot
from slm_pipeline.jobs import summary
from slm_pipeline.jobs.stages.evaluate import Evaluate
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.results.of_run import numbers_of
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.run_folder import BEFORE
from slm_pipeline.surgery.changes import Changes
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.plan import Plan

TEXTS = ["one/text.txt", "two/text.txt"]
SPREADS = {
    "tokens_per_second": {"median": 64.0, "q1": 62.0, "q3": 66.0, "mean": 64.0, "std": 6.0, "number": 10},
    "latency_seconds": {"median": 2.0, "q1": 1.9, "q3": 2.1, "mean": 2.0, "std": 0.3, "number": 10},
}
SPEED = {
    **{name: spread["median"] for name, spread in SPREADS.items()}, "spread": SPREADS,
    "weights_gb": 0.5, "num_parameters": 125, "cache_bytes_per_token": 64, "peak_memory_gb": None, "device": "cpu",
    "dtype": "float32", "mode": "eager", "batch_size": 1, "prompt_len": 8, "output_len": 128, "num_runs": 30,
    "num_warmup": 20,
}  # fmt: skip
OF_GRID = {**SPEED, "batch_size": 8, "output_len": 16, "spread": {"tokens_per_second": SPREADS["tokens_per_second"]}}
NEWER = {  # than numbers with keys
    f"dense/efficiency/{name}" for name in ("num_parameters", "cache_bytes_per_token", "8x16/tokens_per_second")
}


def text(value: float) -> dict[str, Any]:
    return {
        "perplexity": value, "nll": 1.0, "num_tokens": 100, "window": 64, "stride": None, "bos": False,
        "split": "file", "source": None, "sha256": f"of {value}",
    }  # fmt: skip


def task(name: str, score: float, stderr: float | None) -> dict[str, Any]:
    return {
        "task": name, "metric": "acc", "score": score, "stderr": stderr, "num_examples": 4, "limit": None,
        "batch_size": 16, "all": {}, "lm_eval_version": "0.4", "task_version": 1,
    }  # fmt: skip


@dataclass(frozen=True)
class Finished(Artifact):
    """A result that is taken as made."""

    said: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {"result": self.said, "seconds": 2.5, "peak_memory_gb": 1.0}


MEASURES = {
    "perplexity": Perplexity(corpora=TEXTS),
    "zero_shot": ZeroShot(tasks=["piqa", "boolq"]),
    "efficiency": Efficiency(enabled=True, grid=["8x16"]),
}
FOUND = {
    ("perplexity", TEXTS[0]): text(12.5),
    ("perplexity", TEXTS[1]): text(99.0),
    ("zero_shot", "piqa"): task("piqa", 50.0, 3.0),
    ("zero_shot", "boolq"): task("boolq", 70.0, 4.0),
    ("efficiency", ""): SPEED,
    ("efficiency", "8x16"): OF_GRID,
}


@pytest.fixture
def job():
    """What a summary reads of a job that scores the dense model alone."""
    config = SimpleNamespace(name="first", seed=7, pruning_ratio=PruningRatioConfig(ratio=0.2), pictures=False)
    return SimpleNamespace(
        config=config,
        command="slm name=first",
        source=SimpleNamespace(name="random", fingerprint_of_weights="random:1"),
        method=SimpleNamespace(name="reverse"),
        repair=None,
        recovery=None,
        evaluation=Evaluation(EvaluationConfig(of=["dense"]), MEASURES),
    )


def scored(job: Any, tmp_path: Path) -> tuple[dict[str, Artifact], dict[str, Evaluate]]:
    """The results of all evaluations, and their stages."""
    stages = {stage.name: stage for stage in (Evaluate("dense", *pair) for pair in job.evaluation.parts("dense"))}
    results = {}
    for name, stage in stages.items():
        found = FOUND[stage.measure.name, stage.part]
        numbers = {number.key: number.to_json() for number in stage.measure.numbers(stage.part, found)}
        said = {"measure": stage.measure.name, "found": found, "numbers": numbers, "device": "cpu"}
        results[name] = Finished(tmp_path, "evaluate", {"name": name}, said)
    return results, stages


@pytest.fixture
def built(job, tmp_path):
    results, stages = scored(job, tmp_path)
    reused = {name: "perplexity" in name for name in results}
    return summary.build(job, results, stages, reused, ["careful"])


def test_numbers_of_two_texts_with_one_file_name_stay_two(built):
    numbers = {key: said["value"] for key, said in built["numbers"].items() if key.startswith("dense/perplexity")}
    assert numbers == {"dense/perplexity/one/text.txt": 12.5, "dense/perplexity/two/text.txt": 99.0}
    assert built["numbers"]["dense/perplexity/two/text.txt"]["measured"]["part"] == "two/text.txt"
    assert built["details"]["evaluate_dense"]["perplexity"] == {TEXTS[0]: text(12.5), TEXTS[1]: text(99.0)}


def test_details_metrics_and_efficiency_are_as_they_were(built):
    tasks = {"piqa": task("piqa", 50.0, 3.0), "boolq": task("boolq", 70.0, 4.0)}
    texts = {TEXTS[0]: text(12.5), TEXTS[1]: text(99.0)}
    speed = {**SPEED, "8x16": OF_GRID}
    assert built["details"] == {"evaluate_dense": {"perplexity": texts, "zero_shot": tasks, "efficiency": speed}}
    assert built["metrics"] == {
        "dense": {
            "zero_shot": {"piqa": 50.0, "boolq": 70.0, "average": 60.0},
            "perplexity": {corpus: {"corpus": corpus, **said} for corpus, said in texts.items()},
        }
    }
    assert built["efficiency"] == {"dense": speed}
    assert built["format"] == 1
    assert json.loads(json.dumps(built)) == built


def test_what_scripts_of_before_read_gives_the_same_numbers(built):
    new, old = built["numbers"], numbers_of({key: said for key, said in built.items() if key != "numbers"})
    assert old.keys() == new.keys() - NEWER
    for key, number in old.items():
        said = number.to_json()
        names = ("value", "unit", "higher_is_better", "detail", "cost")
        assert [said.get(name) for name in names] == [new[key].get(name) for name in names], key
        if "efficiency" not in key:  # those were means without a standard error
            assert said["measured"].get("how") == new[key]["measured"].get("how"), key
            assert said["stderr"] == new[key]["stderr"], key


def test_totals_and_costs_stand_behind_the_parts(built):
    numbers = built["numbers"]
    assert list(numbers) == [
        "dense/perplexity/one/text.txt", "dense/perplexity/two/text.txt", "dense/piqa", "dense/boolq", "dense/average",
        "dense/efficiency/tokens_per_second", "dense/efficiency/latency_seconds", "dense/efficiency/weights_gb",
        "dense/efficiency/num_parameters", "dense/efficiency/cache_bytes_per_token",
        "dense/efficiency/8x16/tokens_per_second", "seconds",
    ]  # fmt: skip
    assert numbers["dense/average"]["value"] == 60.0
    assert numbers["dense/average"]["stderr"] == 2.5  # sqrt(3^2 + 4^2) / 2
    assert numbers["dense/average"]["measured"] == {"measure": "zero_shot", "tasks": ["piqa", "boolq"], "limit": None}
    assert numbers["dense/efficiency/latency_seconds"]["stderr"] == pytest.approx(1.2533 * 0.2 / 1.349 / 10**0.5)
    assert numbers["seconds"]["value"] == 4 * 2.5  # what was reused took nothing
    assert numbers["seconds"]["cost"] is True


def test_what_was_not_run_is_absent(job, tmp_path):
    found = summary.build(job, {}, {}, {}, [])
    assert (
        not {"metrics", "details", "efficiency", "recovery", "calibration", "num_layers", "checkpoint"} & found.keys()
    )
    assert list(found["numbers"]) == ["seconds"]
    results, stages = scored(job, tmp_path)
    (piqa,) = (name for name in stages if "piqa" in name)
    one = summary.build(job, {piqa: results[piqa]}, {piqa: stages[piqa]}, {piqa: False}, [])
    assert one["metrics"] == {"dense": {"zero_shot": {"piqa": 50.0, "average": 50.0}}}
    assert "efficiency" not in one


def test_documents_shared_with_the_training_data_are_told_by_their_text(job, tmp_path):
    results, stages = scored(job, tmp_path)
    (name,) = (name for name in stages if "one/text.txt" in name)
    results[name].said["overlap"] = {"documents": 2, "of": 9}
    found = summary.build(job, results, stages, dict.fromkeys(results, False), [])
    assert found["details"]["evaluate_dense"]["overlap"] == {"perplexity/one/text.txt": {"documents": 2, "of": 9}}


def merged(tmp_path: Path, job: Any, **scores: Any) -> dict[str, Any]:
    """The summary of a merge that dropped layer 2 of 5, with 10 parameters each and 50 outside."""
    plan = Plan({"name": "m", "fingerprint": "f", "num_layers": 5}, "reverse", {}, None, [Drop((2,))], scores=scores)
    result = {
        "threshold": None, "num_layers": {"dense": 5, "pruned": 4}, "parameters": {"dense": 100, "pruned": 90},
        "changes": Changes(idle_parameters=5, facts={"sublayers": {"attention": [1]}}).to_json(),
    }  # fmt: skip
    merge = Finished(tmp_path, "merge", {}, result)
    (merge.path / "model").mkdir(parents=True)
    plan.write(merge.path / "plan.json")
    return summary.build(job, {"merge": merge}, {}, {"merge": False}, [])


def test_what_was_asked_and_what_was_got(job, tmp_path):
    found = merged(tmp_path, job)
    assert found["pruning_ratio"] == {
        "asked": 0.2, "of": "layers", "got_layers": 0.2, "got_parameters": 0.15,  # of the 90 left 5 do nothing
    }  # fmt: skip
    assert (found["layer_groups"], found["dropped"]) == ([[0], [1], [3], [4]], [2])
    assert found["changes"] == Changes(idle_parameters=5).to_json(with_facts=False)
    assert found["sublayers"] == {"attention": [1]}
    assert Path(found["checkpoint"]).parent == Path(found["stages"]["merge"]["path"])
    assert found["numbers"]["parameters"]["value"] == 85
    shares = {"asked_of_layers": 20.0, "got_of_layers": 20.0, "got_of_parameters": 15.0}
    numbers = {name: number for name, number in found["numbers"].items() if name.startswith("pruning_ratio/")}
    assert {name: (number["value"], number["unit"]) for name, number in numbers.items()} == {
        f"pruning_ratio/{name}": (pytest.approx(share), "%") for name, share in shares.items()
    }
    assert [name for name, number in numbers.items() if "detail" not in number] == ["pruning_ratio/got_of_parameters"]
    assert not {"plan_seconds", "windows", "fit", "threshold_is_highest"} & found.keys()


def test_what_a_search_said_of_itself(job, tmp_path):
    job.config.pruning_ratio = PruningRatioConfig(num_layers=4)
    found = merged(tmp_path, job, seconds=1.5, num_evaluations=9, num_evaluated=3, exact=False)
    assert found["pruning_ratio"]["asked"] == {"num_layers": 4}
    assert "pruning_ratio/asked_of_layers" not in found["numbers"]
    assert found["plan_seconds"] == found["numbers"]["plan_seconds"]["value"] == 1.5
    assert found["windows"] == {"evaluations": 9, "evaluated": 3}
    assert found["threshold_is_highest"] is False


def test_what_fails_after_the_numbers_are_safe_does_not_undo_them(built, tmp_path, monkeypatch, caplog):
    def full(*_: Any) -> str:
        raise OSError("No space left on device")

    caplog.set_level(logging.WARNING, "slm_pipeline")
    monkeypatch.setattr(summary, "write_summary_md", full)
    (tmp_path / BEFORE).touch()
    with Tracker(tmp_path) as tracker:
        summary.write(dict(built), {}, tmp_path, tracker, ["careful", "late"], draw=False)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {**built, "pictures": [], "warnings": ["careful", "late"]}
    assert not (tmp_path / BEFORE).exists()
    assert [record.getMessage() for record in caplog.records] == [
        "summary.md was not written: OSError: No space left on device"
    ]
