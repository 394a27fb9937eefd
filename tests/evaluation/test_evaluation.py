"""The group as a whole: what each measure cannot see of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import evaluation
from slm_pipeline.evaluation.efficiency import Efficiency
from slm_pipeline.evaluation.evaluation import Evaluation
from slm_pipeline.evaluation.zero_shot import ZeroShot


@pytest.mark.parametrize("called", ["piqa", "average"])
def test_two_measures_that_call_a_number_alike_are_refused_before_anything_runs(called, monkeypatch):
    """A task's number has the task's name alone, and so may a measure from outside."""

    @dataclass(kw_only=True)
    class Own(Efficiency):
        name: ClassVar[str] = called

    built = {"zero_shot": ZeroShot(tasks=["piqa"]), called: Own(enabled=True)}
    monkeypatch.setattr(evaluation, "build", lambda node, *, group, key: built[key.partition(".")[2]])
    nodes = {name: {"_target_": "x"} for name in built}
    with pytest.raises(UserError, match=f"evaluation.zero_shot and evaluation.{called} both call a number {called}: "):
        Evaluation.build(nodes)
    built[called] = Own(enabled=False)  # what measures nothing is in nobody's way
    assert list(Evaluation.build(nodes).measures) == ["zero_shot", called]
