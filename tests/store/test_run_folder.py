"""Runs and studies write into folders of their own, never over what somebody else has there."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import run_slm
from studies import finished, write_run

from slm_pipeline.errors import UserError
from slm_pipeline.jobs.runner import _link
from slm_pipeline.report.runs import read_runs
from slm_pipeline.store import run_folder

MINE = {"config.yaml": "a: 1\n", "plan.json": "[1]", "summary.json": "{}", "metrics.jsonl": "1\n", "merge": "mine"}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One that has nothing to do; the working folder is the test's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The river runs past the mill and the tree.\n" * 20)
    return [
        "model=random", "model.num_layers=6", "model.hidden_size=32", "model.intermediate_size=48", "pictures=false",
        "calibration=text_file", "calibration.path=text.txt", "calibration.num_samples=2", "calibration.seq_len=16",
        "stages=[]", "recovery=none", "evaluation=none", "tracker=jsonl",
    ]  # fmt: skip


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["hydra.run.dir=."],
            "hydra.run.dir=. holds config.yaml, merge, metrics.jsonl and 3 more, which are not of a run",
        ),
        (
            ["-m", "hydra.sweep.dir=.", "seed=1,2"],
            "hydra.sweep.dir=. holds config.yaml, merge, metrics.jsonl and 3 more, which are not of a study",
        ),
        (["-m", "hydra.sweep.subdir=.", "seed=1,2"], "hydra.sweep.subdir gives job 0 the folder '.', not one below"),
        (["-m", "hydra.sweep.subdir=../..", "seed=1,2"], "gives job 0 the folder '../..', not one below"),
        (
            ["-m", "hydra.sweep.subdir=same", "seed=1,2"],
            "hydra.sweep.subdir gives jobs 0 and 1 the same folder 'same', where one would overwrite the other",
        ),
        (
            ["-m", f"hydra.sweep.subdir={'x' * 256}/${{hydra.job.num}}", "seed=1,2"],
            "hydra.sweep.subdir gives job 0 a name of 256 characters",
        ),
        (["hydra.run.dir=text.txt"], "hydra.run.dir='text.txt': "),
        (["hydra.run.dir=outputs/store/x"], "hydra.run.dir=outputs/store/x lies in the store"),
        (["-m", "hydra.sweep.dir=outputs/store", "seed=1,2"], "hydra.sweep.dir=outputs/store lies in the store"),
        (["hydra.job.chdir=true"], "hydra.job.chdir=true would look for the paths of the configuration in the folder"),
        (["-m", "hydra.job.chdir=true", "seed=1,2"], "hydra.job.chdir=true would look for the paths"),
    ],
)
def test_a_folder_that_is_not_ours_alone_is_refused_and_nothing_is_touched(overrides, message, job, tmp_path):
    for name, content in MINE.items():
        (tmp_path / name).write_text(content)
    before = files(tmp_path)
    outcome = run_slm(*overrides, *job)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert f"error: {message}" in outcome.err or message in outcome.err
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("mine", "overrides", "message"),
    [
        (".hydra/config.yaml", ["hydra.run.dir=here"], "hydra.run.dir=here holds .hydra, which are not of a run"),
        ("slm.log", ["hydra.run.dir=here"], "hydra.run.dir=here holds slm.log, which are not of a run"),
        ("multirun.yaml", ["-m", "hydra.sweep.dir=here", "seed=1"], "hydra.sweep.dir=here holds multirun.yaml, which"),
        (
            "conf/config.yaml",
            ["hydra.run.dir=here", "hydra.output_subdir=conf"],
            "hydra.output_subdir=conf: reports look for .hydra",
        ),
        ("../a", ["hydra.run.dir=."], "hydra.run.dir=. holds a, here, text.txt, which are not of a run"),
        ("../a", ["hydra.run.dir=here", "output_dir=here/out"], "hydra.run.dir=here contains output_dir, "),
        ("../a", ["hydra.run.dir=outputs"], "hydra.run.dir=outputs contains output_dir, "),
        ("../a", ["hydra.run.dir=outputs", "dry_run=true"], "hydra.run.dir=outputs contains output_dir, "),
        ("../a", ["hydra.run.dir=a", "dry_run=true"], "hydra.run.dir='a': "),
        ("a", ["hydra.run.dir=here", "dry_run=true"], "hydra.run.dir=here holds a, which are not of a run"),
        ("../a", ["hydra.run.dir="], "hydra.run.dir= is empty"),
        ("../a", ["-m", "hydra.sweep.dir=", "seed=1"], "hydra.sweep.dir= is empty"),
        ("../a", [f"hydra.run.dir={'a' * 290}"], "hydra.run.dir has a name of 290 characters"),
        ("../a", ["-m", f"hydra.sweep.dir=x/{'a' * 290}", "seed=1"], "hydra.sweep.dir has a name of 290 characters"),
        ("../a", [f"output_dir={'a/' * 3000}"], "output_dir='a/a/a"),
        ("../a", ["hydra.job.name=a/b"], "hydra.job.name='a/b' must do as the name of a file"),
        ("../a", ["-m", "method=slm,laco,nosuch"], "job 2 of 3, method=nosuch: method=nosuch: no option of"),
        ("../a", ["-m", "seed=4,abc"], "job 1 of 2, seed=abc: Error merging override"),
    ],
)
def test_a_folder_is_known_by_its_mark_alone_and_a_refusal_makes_nothing(mine, overrides, message, job, tmp_path):
    (tmp_path / "here" / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "here" / mine).write_text("own")
    before = sorted(tmp_path.rglob("*")), files(tmp_path)
    outcome = run_slm(*overrides, *job)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1
    assert (sorted(tmp_path.rglob("*")), files(tmp_path)) == before


def test_a_run_goes_on_in_its_own_folder_whatever_lies_there_since(job, tmp_path):
    assert run_slm(*job, "hydra.run.dir=final/here").status == 0
    (tmp_path / "final/here/notes.txt").write_text("mine")
    assert run_slm(*job, "hydra.run.dir=final/here").status == 0
    assert [run.status for run in read_runs(tmp_path / "final")] == ["done"]
    assert (tmp_path / "final/here/notes.txt").read_text() == "mine"


def test_an_earlier_result_stays_until_a_new_one_is_there(job, tmp_path, monkeypatch):
    words = [*job, "hydra.run.dir=final"]
    assert run_slm(*words).status == 0
    before = files(tmp_path / "final")
    refused = run_slm(*words, "stages=[calibrate]", "model.device=cuda:7")
    assert (refused.status, refused.out, refused.err[:35]) == (2, "", "error: model.device='cuda:7': this ")
    assert files(tmp_path / "final") == before
    with monkeypatch.context() as patch:
        for error, status in ((KeyboardInterrupt(), "interrupted"), (UserError("too late"), "FAILED")):
            patch.setattr("slm_pipeline.jobs.runner.execute", Mock(side_effect=error))
            assert run_slm(*words).status != 0
            assert [run.status for run in read_runs(tmp_path / "final")] == [status]
            assert (tmp_path / "final/summary_before.json").read_text() == before["summary.json"]
    assert run_slm(*words).status == 0
    assert [run.status for run in read_runs(tmp_path / "final")] == ["done"]
    assert not (tmp_path / "final/summary_before.json").exists()


def test_a_run_that_was_killed_before_it_began_is_no_stranger(tmp_path):
    begun = {".hydra", "slm.log"}
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "slm.log").touch()
    run_folder.check_run(tmp_path, "hydra.run.dir", begun)
    (tmp_path / "other.log").touch()
    with pytest.raises(UserError, match=r"holds other\.log, which are not of a run"):
        run_folder.check_run(tmp_path, "hydra.run.dir", begun)
    (tmp_path / ".running.lock").touch()
    run_folder.check_run(tmp_path, "hydra.run.dir", begun)


def test_only_links_are_replaced_by_links(tmp_path, caplog):
    (tmp_path / "merge").write_text("mine")
    (tmp_path / "recover").symlink_to("gone")
    for name in ("merge", "recover"):
        _link(tmp_path / name, tmp_path / "store" / name)
    assert (tmp_path / "merge").read_text() == "mine"
    assert f"no link {tmp_path}/merge: FileExistsError" in caplog.text
    assert (tmp_path / "recover").readlink() == Path("store/recover")


@pytest.mark.parametrize("content", ["", "[]", "null", '{"jobs": 3, "command": ""}', '{"jobs": [[1]], "command": ""}'])
def test_a_study_is_known_by_its_own_file(content, tmp_path):
    (tmp_path / "study.json").write_text(content)
    assert run_folder.study_of(tmp_path) is None
    with pytest.raises(UserError, match=r"holds study\.json, which are not of a study"):
        run_folder.check_study(tmp_path, "hydra.sweep.dir")


def test_named_folders_and_a_folder_used_twice(job, tmp_path):
    """A study of before has left job 9, this one's first attempt job 1; neither is of the second one."""
    words = ["-m", *job, "hydra.sweep.dir=s", "hydra.sweep.subdir=seed_${seed}"]
    write_run(tmp_path / "s" / "seed_9", ["seed=9"], finished(tmp_path, 24, 30.0))
    (tmp_path / "s" / "study.json").write_text(json.dumps({"format": 1, "command": "slm", "jobs": [["seed=9"]]}))
    assert run_slm(*words, "seed=1,2").status == 0
    assert [(run.job, run.status) for run in read_runs(tmp_path / "s")] == [("seed_1", "done"), ("seed_2", "done")]
    assert run_slm(*words, "seed=shuffle(2,3,4)").status == 0
    runs = read_runs(tmp_path / "s")
    assert [(run.job, run.status) for run in runs] == [(f"seed_{seed}", "done") for seed in (2, 3, 4)]
    assert [run.option("seed") for run in runs] == [2, 3, 4]
    assert "3 jobs, 3 done" in (tmp_path / "s" / "summary.md").read_text()
