"""Runs as they lie on disk."""

from __future__ import annotations

import json

import pytest
from filelock import FileLock
from studies import finished, write_run

from slm_pipeline.errors import UserError
from slm_pipeline.report.runs import read_runs
from slm_pipeline.store.run_folder import REQUEUED


def test_every_job_is_found_in_order(sweep):
    runs = read_runs(sweep)
    assert [(run.job, run.status) for run in runs] == [
        ("0", "done"),
        ("1", "FAILED"),
        ("2", "done"),
        ("10", "interrupted"),
    ]
    assert runs[1].state == "FAILED: ratio=2 must be below 1"
    assert runs[2].overrides == ["model=tiny", "pruning_ratio=r2"]
    assert runs[2].summary["num_layers"]["pruned"] == 24
    assert [run.job for run in read_runs(sweep / "2")] == ["2"]


def test_a_folder_without_runs_is_an_error(sweep, tmp_path):
    with pytest.raises(UserError, match="is not a directory of runs"):
        read_runs(sweep / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no runs in .*empty"):
        read_runs(sweep, tmp_path / "empty")


def test_jobs_that_have_no_folder_yet_are_queued_while_somebody_will_start_them(sweep):
    jobs = [["model=tiny", f"pruning_ratio=r{i}"] for i in range(5)]
    (sweep / "3").mkdir()  # made, but nothing in it yet
    study = {"format": 1, "command": "slm -m", "jobs": jobs}
    (sweep / "study.json").write_text(json.dumps(study))
    with FileLock(sweep / ".study.lock"):  # as its process holds it
        runs = read_runs(sweep)
    assert [(run.job, run.status) for run in runs[2:]] == [("2", "done"), ("3", "queued"), ("4", "queued")]
    assert runs[3].option("pruning_ratio") == "r3"
    assert [run.status for run in read_runs(sweep)[3:]] == ["interrupted", "interrupted"]
    (sweep / "study.json").write_text(json.dumps({**study, "launcher": "hydra_plugins.slm_launchers.SlurmLauncher"}))
    assert [run.status for run in read_runs(sweep)[3:]] == ["queued", "queued"]  # whoever put them there is not needed
    (sweep / "study.json").write_text(json.dumps({"format": 1, "command": "slm -m", "jobs": None}))
    assert len(read_runs(sweep)) == 4


def test_a_study_counts_its_own_jobs_alone(sweep):
    """Of an earlier one in the same folder are job 10, which this one does not have, and job 1, which differs."""
    jobs = [["model=tiny", "pruning_ratio=r0"], ["model=tiny", "pruning_ratio=r7"], ["model=tiny", "pruning_ratio=r2"]]
    write_run(sweep / "1" / "x", ["model=tiny"], None)
    (sweep / "study.json").write_text(json.dumps({"format": 1, "command": "slm -m", "jobs": jobs}))
    runs = read_runs(sweep)
    assert [(run.job, run.state) for run in runs] == [("0", "done"), ("1", "interrupted"), ("2", "done")]
    assert runs[1].option("pruning_ratio") == "r7"


def test_folders_of_jobs_have_names_where_the_study_gives_them(tmp_path):
    jobs = [["seed=1"], ["seed=2"], ["seed=3"]]
    folders = ["seed=1", "a/seed=2", "a/seed=3"]
    study = {"format": 1, "command": "slm -m", "jobs": jobs, "folders": folders}
    write_run(tmp_path / "seed=1", jobs[0], finished(tmp_path, 24, 20.0))
    write_run(tmp_path / "a" / "seed=2", jobs[1], "no")
    (tmp_path / "study.json").write_text(json.dumps(study))
    found = {run.job: run.state for run in read_runs(tmp_path)}
    assert found == {"seed=1": "done", "a/seed=2": "FAILED: no", "a/seed=3": "interrupted"}


def test_runs_of_several_folders_are_named_from_what_these_have_in_common(sweep, seeds, tmp_path):
    jobs = [run.job for run in read_runs(seeds, sweep)]
    assert jobs[:2] == ["seeds/0", "seeds/1"]
    assert jobs[-4:] == ["ratio/0", "ratio/1", "ratio/2", "ratio/10"]
    assert len(read_runs(tmp_path, seeds)) == 10  # a run is there once, however often it is asked for


def test_an_option_is_overridden_chosen_or_configured(tmp_path):
    config = {"seed": 3, "recovery": {"learning_rate": 1e-4, "lora": {"r": 8}}, "data_dir": None, "stages": ["merge"]}
    overrides = ["method=slm", "++recovery.learning_rate=2e-3", "model.path=null", "note=a=b"]
    choices = {"method": "laco", "recovery": "lora", "experiment": None, "hydra/launcher": "basic"}
    write_run(tmp_path / "run", overrides, finished(tmp_path, 24, 20.0), config=config, choices=choices)
    (run,) = read_runs(tmp_path / "run")
    assert (run.option("method"), run.option("recovery"), run.option("recovery.learning_rate")) == (
        "slm",
        "lora",
        0.002,
    )
    assert (run.option("seed"), run.option("recovery.lora.r"), run.option("stages")) == (3, 8, "[merge]")
    assert (run.option("model.path"), run.option("data_dir"), run.option("note")) == ("", "", "a=b")
    assert (run.option("recovery.lora"), run.option("absent.key"), run.option("experiment")) == (None, None, None)


def test_a_job_that_hydra_is_just_beginning_disturbs_nobody(tmp_path):
    """Hydra opens overrides.yaml before it writes into it."""
    write_run(tmp_path / "0", ["seed=1"], None)
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("")
    assert [(run.status, run.overrides) for run in read_runs(tmp_path)] == [("interrupted", [])]


def test_a_job_that_is_back_in_a_clusters_queue_is_queued(tmp_path):
    write_run(tmp_path / "0", ["seed=1"], None)
    (tmp_path / "0" / REQUEUED).touch()
    assert [run.status for run in read_runs(tmp_path)] == ["queued"]
