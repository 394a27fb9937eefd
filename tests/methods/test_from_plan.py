"""A plan replayed: what it did is done again, what it looked at is not claimed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import context_of, random_source, run_slm
from problems import problem_of

from slm_pipeline.errors import UserError
from slm_pipeline.methods.from_plan import FromPlan
from slm_pipeline.models.loading import load_dense
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.plan import Plan

SEARCHED = {"fingerprint": "of the search", "num_tokens": 7}


def written(path, **changes):
    values = {
        "model": {"name": "m", "fingerprint": random_source().fingerprint, "num_layers": 6},
        "method": "shortgpt",
        "options": {},
        "calibration": SEARCHED,
        "ops": [Drop((4,))],
        "scores": {"order": [4]},
        **changes,
    }
    Plan(**values).write(path)
    return FromPlan(path=str(path))


def replayed(method):
    source = random_source()
    model, _ = load_dense(source)
    return method.plan(problem_of(model, source, None, calibration={"fingerprint": "of this job"}))


def test_a_replay_reads_no_text_and_keeps_what_the_search_read(tmp_path):
    first = replayed(written(tmp_path / "a.json"))
    assert first.calibration is None
    told = {"replayed": {"method": "shortgpt", "calibration": SEARCHED, "scores": {"order": [4]}}}
    assert first.scores == told
    first.write(tmp_path / "b.json")
    again = replayed(FromPlan(path=str(tmp_path / "b.json")))
    assert (again.calibration, again.scores, again.ops) == (None, told, first.ops)


def test_plans_that_say_different_things_are_no_one_result(tmp_path):
    """They make the same checkpoint, but a merge shared by both would tell of one what the other measured."""
    a = written(tmp_path / "a.json")
    b = written(tmp_path / "b.json", calibration={**SEARCHED, "num_tokens": 8})
    c = written(tmp_path / "c.json", threshold=0.5)
    assert a.options() == written(tmp_path / "d.json").options()
    assert len({json.dumps(method.options()) for method in (a, b, c)}) == 3
    assert replayed(a).content() == replayed(b).content() == replayed(c).content()


def test_a_linear_map_behind_which_a_norm_stands_is_refused_before_anything_runs(tmp_path):
    fold = [Fold((1,), "t"), Drop((4,))]
    method = written(tmp_path / "a.json", ops=fold, tensors={"t": np.eye(32, dtype=np.float32)})
    method.check(context_of(random_source()))
    with pytest.raises(UserError, match="op 0 folds a linear map into a projection; in random, a gemma2 model, a norm"):
        method.check(context_of(random_source("gemma2")))


def test_a_home_that_nobody_has_is_no_traceback():
    with pytest.raises(UserError, match="cannot read ~nobody_here/plan.json: No such file"):
        FromPlan(path="~nobody_here/plan.json").options()


def test_jobs_with_different_texts_share_a_removal_that_reads_none(tmp_path):
    """...and neither is told that it used the other's text."""
    common = ["model=random", "method=reverse", "recovery=none", "evaluation=none", "pictures=false", "keep=plan",
              "calibration=text_file", f"calibration.path={__file__}", "calibration.seq_len=16",
              f"output_dir={tmp_path}"]  # fmt: skip
    for number in (2, 3):
        outcome = run_slm(*common, f"calibration.num_samples={number}", f"name=n{number}")
        assert outcome.status == 0, outcome.err
    assert len([*(tmp_path / "store" / "merge").glob("*/stage.json")]) == 1
    assert len([*(tmp_path / "store" / "calibrate").glob("*/stage.json")]) == 2
    for number in (2, 3):
        (plan,) = tmp_path.glob(f"runs/n{number}/*/plan.json")
        assert json.loads(plan.read_text())["calibration"] is None
