"""A recovery of one's own: what it has to bring, what it is given, and where it shows."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import torch
from recovery.conftest import BUDGET, problem

from slm_pipeline.config.ranges import Range
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line
from slm_pipeline.jobs.runner import execute
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.models.view import ModelView
from slm_pipeline.recovery.base import Recovery, RecoveryProblem, RecoveryResult
from slm_pipeline.recovery.block_mse import BlockMse
from slm_pipeline.recovery.distill import Distill
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.recovery.full import Full
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.recovery.partial_layers import PartialLayers


@dataclass(kw_only=True)
class Louder(Recovery):
    """Trains nothing: multiplies the weights of the final norm."""

    factor: Annotated[float, Range(above=0, at_most=10)] = 2.0

    name: ClassVar[str] = "louder"

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        started = time.monotonic()
        with torch.no_grad():
            ModelView(problem.model).final_norm.weight.mul_(self.factor)
        return RecoveryResult(problem.model, {"num_tokens": 0, "seconds": time.monotonic() - started}, [])


@dataclass(kw_only=True)
class Norms(FineTuning):
    """Trains the final norm alone."""

    name: ClassVar[str] = "norms"

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        return self.train_modules(problem, [ModelView(problem.model).final_norm])


def test_name_and_run_are_all_that_a_recovery_needs(tmp_path, monkeypatch):
    """It goes through the stage: its key, the saved model, the summary."""
    monkeypatch.setattr("slm_pipeline.config.plugins.code_of", lambda *_: {})  # as if it were of ours
    words = [
        "model=random", "model.hidden_size=32", "method=reverse", "pruning_ratio=layers", "pruning_ratio.num_layers=3",
        "recovery=full", "stages=[calibrate,merge,recover]", "tracker=jsonl", "pictures=false",
        "calibration.num_samples=2", "calibration.seq_len=16", f"output_dir={tmp_path}",
    ]  # fmt: skip
    job = command_line.compose_job(["slm"], words)
    summaries = []
    for factor in (2.0, 2.0, 3.0):
        louder = Louder(factor=factor)
        own = dataclasses.replace(
            job, recovery=louder, identities={**job.identities, "recovery": louder.identity(None)}
        )
        run_dir = tmp_path / "runs" / str(len(summaries))
        with Tracker(run_dir) as tracker:
            execute(own, run_dir, tracker, [])
        summaries.append(json.loads((run_dir / "summary.json").read_text()))
    assert [summary["stages"]["recover"]["reused"] for summary in summaries] == [False, True, False]
    assert summaries[0]["recovery"] == {**summaries[1]["recovery"], "name": "louder", "options": {"factor": 2.0}}
    assert summaries[2]["recovery"]["options"] == {"factor": 3.0}
    loaded = [ModelView(_model(summary)).final_norm.weight for summary in summaries]
    assert [weight.mean().item() for weight in loaded] == [2.0, 2.0, 3.0]  # random models' norms begin at 1


def _model(summary):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(f"{summary['stages']['recover']['path']}/model")


def test_without_a_run_it_is_none():
    @dataclass(kw_only=True)
    class Idle(Recovery):
        name: ClassVar[str] = "idle"

    with pytest.raises(TypeError, match="abstract method '?run"):
        Idle()
    with pytest.raises(TypeError, match="abstract method '?run"):
        FineTuning()


def test_its_options_are_held_to_their_ranges():
    with pytest.raises(UserError, match=r"recovery.factor=11.0 must"):
        Louder(factor=11.0)


def test_one_that_trains_says_what(data, tmp_path):
    task = problem(data, tmp_path)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    result = Norms(**BUDGET).run(task)
    changed = [name for name, value in result.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.norm.weight"]
    assert result.metrics["trainable_parameters"] == 32
    assert all(parameter.requires_grad for parameter in result.model.parameters())


@pytest.mark.parametrize("recovery", [Lora, Full, PartialLayers, Distill, BlockMse])
def test_the_key_holds_name_options_and_data_but_no_class(recovery, data):
    identity = recovery(**BUDGET).identity(data)
    assert list(identity) == ["recovery", "options", "data"]
    assert identity["recovery"] == recovery.name
    assert set(identity["options"]) == {field.name for field in dataclasses.fields(recovery)}
    assert (identity["options"]["max_steps"], identity["data"]["source"]) == (6, "file")
    assert "slm_pipeline" not in json.dumps(identity)
    assert recovery(**{**BUDGET, "max_steps": 7}).identity(data) != identity


@pytest.mark.parametrize(
    ("metrics", "curve", "lacking"),
    [
        ({"num_tokens": 1}, [], "seconds"),
        ({}, [], "num_tokens, seconds"),
        ({"num_tokens": 1, "seconds": 1.0}, [{"step": 1, "loss": 2.0}], "loss"),
    ],
)
def test_a_result_without_what_the_tables_show_is_refused(metrics, curve, lacking):
    with pytest.raises(ValueError, match=f"lack {lacking}$"):
        RecoveryResult(None, metrics, curve)
