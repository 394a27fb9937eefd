"""A multirun as a whole: what it writes before, while and after its jobs run."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import run_slm
from filelock import FileLock
from studies import finished, write_run
from wandb_files import only

from slm_pipeline.commands.study import status
from slm_pipeline.config import TrackerConfig
from slm_pipeline.jobs import runner, study
from slm_pipeline.jobs.stages.calibrate import Calibrate
from slm_pipeline.report.runs import read_runs
from slm_pipeline.store import run_folder

TEXT = "The river runs past the mill and the tree.\n" * 80
HOLD = """
import sys, time
from pathlib import Path
from slm_pipeline.store import run_folder
with run_folder.running(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A job's folder in which another process works, and that process."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "0")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    yield tmp_path / "0", process
    process.kill()
    process.wait()


def test_a_job_runs_as_long_as_its_process_lives(held, tmp_path):
    folder, process = held
    assert run_folder.is_running(folder)
    assert run_folder.is_running(folder)  # asking does not disturb it
    assert not run_folder.is_running(tmp_path / "1")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not run_folder.is_running(folder)
    with open(folder / ".running.lock", "rb") as file:  # another one who asks at this moment
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not run_folder.is_running(folder)


def test_status(held, tmp_path):
    folder, process = held
    write_run(folder, ["method=slm", "seed=1"], None)
    write_run(tmp_path / "1", ["method=slm", "seed=2"], "no threshold reaches it")
    write_run(tmp_path / "2", ["method=slm", "seed=3"], finished(tmp_path, 24, 30.0))
    jobs = [["method=slm", f"seed={number}"] for number in (1, 2, 3, 4)]
    (tmp_path / "study.json").write_text(json.dumps({"format": 1, "command": "slm", "jobs": jobs}))
    log = folder / "slm.log"
    log.write_text("2026-11-25 07:00:00,000 INFO slm_pipeline.jobs.runner: merge: starts\n\n")
    os.utime(log, (1000, 1000))
    with FileLock(tmp_path / ".study.lock"):  # as the study's process holds it
        lines = status(read_runs(tmp_path), now=1300.0).splitlines()
    assert lines[0] == "4 jobs: 1 done, 1 FAILED, 1 running, 1 queued"
    cells = [line.split(maxsplit=2) for line in lines[3:]]
    assert cells == [
        ["0", "seed=1", "running: merge: starts (5 min ago)"],
        ["1", "seed=2", "FAILED: no threshold reaches it"],
        ["3", "seed=4", "queued"],
    ]
    process.kill()
    process.wait()
    assert status(read_runs(tmp_path), now=1300.0).splitlines()[0].endswith("2 interrupted")


def test_how_many_jobs_failed_and_which_was_the_first(tmp_path):
    results = [finished(tmp_path, 24, 30.0), "no threshold reaches it", finished(tmp_path, 20, 40.0), "loss is nan"]
    for number, result in enumerate(results):
        write_run(tmp_path / str(number), ["method=slm", f"seed={number}"], result)
    first = "2 of 4 jobs failed; the first, job 1 (seed=1): no threshold reaches it"
    assert study.failures(tmp_path, "no threshold reaches it") == first
    assert study.failures(tmp_path, "joblib ended the study") == "2 of 4 jobs failed; joblib ended the study"
    assert study.failures(tmp_path / "1", "no threshold reaches it") == ""


def test_nothing_more_is_said_of_a_study_that_is_done(tmp_path):
    write_run(tmp_path / "0", [], finished(tmp_path, 24, 30.0))
    assert status(read_runs(tmp_path), now=0.0) == "1 job: 1 done\n"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The folder of a study of three jobs on a tiny model, the second of which fails, with its W&B runs."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    words = ["-m", "model=random", "recovery=none", "calibration=text_file", "calibration.path=text.txt"]
    words += ["calibration.num_samples=2", "calibration.seq_len=16", "evaluation=none", "threshold=fixed"]
    words += ["pruning_ratio=none", "threshold.value=0.99,1.5,0.5", "name=tiny", "stages=[calibrate,merge]"]
    outcome = run_slm(*words, "pictures=false")
    assert outcome.status == 2
    first = "job 1 (threshold.value=1.5): threshold.value=1.5 must lie in [0, 1]"
    assert outcome.err.endswith(f"\nerror: 1 of 3 jobs failed: {first}\n")
    (folder,) = Path("outputs/sweeps/tiny").iterdir()
    return folder.absolute()


def test_a_study_is_reported_once_and_to_wandb_as_a_run_of_its_own(sweep):
    written = json.loads((sweep / "study.json").read_text())
    assert written["command"].startswith("slm -m model=random")
    thresholds = [[item for item in job if item.startswith("threshold.value")] for job in written["jobs"]]
    assert thresholds == [["threshold.value=0.99"], ["threshold.value=1.5"], ["threshold.value=0.5"]]
    assert [run.status for run in read_runs(sweep)] == ["done", "FAILED", "done"]
    assert "threshold.value=1.5 must lie in" in (sweep / "summary.csv").read_text()
    assert (sweep / "report.html").is_file()
    runs = {path.parent.parent.name: path for path in sweep.glob("*/wandb/offline-run-*")}
    assert sorted(runs) == ["0", "2", "study"]  # the second found its mistake before it had a run
    tables = [path.name for path in (runs["study"] / "files" / "media" / "table").iterdir()]
    assert len(tables) == 1
    assert tables[0].startswith("study_")
    groups = {name: only(path.parent.parent, "run").run_group for name, path in runs.items()}
    assert groups == dict.fromkeys(runs, f"tiny/{sweep.name}")


def begun(folder: Path) -> None:
    """A study of one job, which is done, in this process."""
    if not (folder / "0").exists():
        write_run(folder / "0", ["seed=1"], finished(folder, 24, 30.0))
    lock = FileLock(folder / ".study.lock")
    lock.acquire()
    study._begun[:] = [study._Begun(folder, "tiny", TrackerConfig(), "slm -m", ["0"], lock, None)]


def test_an_interrupted_study_has_its_table_and_no_report(tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr(study, "_report", lambda *_: reports.append(True))
    begun(tmp_path)
    with pytest.raises(KeyboardInterrupt), study.reported():
        raise KeyboardInterrupt
    assert not reports
    assert (tmp_path / "summary.md").read_text().startswith(f"# {tmp_path.name}: 1 job, 1 done\n")
    begun(tmp_path)
    with pytest.raises(ValueError, match="x"), study.reported():
        raise ValueError("x")
    assert reports == [True]


def test_a_report_that_cannot_be_written_does_not_hide_the_studys_own_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(study, "_report", Mock(side_effect=OSError("no space left")))
    begun(tmp_path)
    with pytest.raises(ValueError, match="the job's"), study.reported():
        raise ValueError("the job's")
    assert "no report of the study: OSError: no space left" in caplog.text
    begun(tmp_path)
    with study.reported():  # nor does it make a study fail
        pass


def test_a_job_that_its_cluster_stops_is_queued_until_it_comes_back(tmp_path, monkeypatch):
    """submitit ends such a job with SystemExit, when Slurm has it in its queue again."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    words = ["-m", "model=random", "recovery=none", "calibration=text_file", "calibration.path=text.txt", "seed=1,2"]
    words += ["calibration.num_samples=2", "calibration.seq_len=16", "evaluation=none", "threshold=fixed"]
    words += ["pruning_ratio=none", "threshold.value=0.9", "stages=[calibrate]", "tracker=jsonl", "hydra.sweep.dir=s"]
    with monkeypatch.context() as stopped:
        stopped.setattr(Calibrate, "run", lambda *_, **__: sys.exit(0))
        run_slm(*words)
    runs = read_runs(tmp_path / "s")
    assert [run.status for run in runs] == ["queued", "interrupted"]  # nobody is there who could start the second
    assert (runs[0].path / run_folder.REQUEUED).exists()
    assert run_slm(*words).status == 0
    assert [run.status for run in read_runs(tmp_path / "s")] == ["done", "done"]
    assert not (runs[0].path / run_folder.REQUEUED).exists()


GLOB = ["model=random", "calibration=text_file", "calibration.path=text.txt", "calibration.num_samples=2"]
GLOB += ["calibration.seq_len=16", "evaluation=none", "tracker=jsonl", "pictures=false", "recovery=none"]


def test_options_are_chosen_by_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    words = ["-m", *GLOB, "model.num_layers=16", "method=glob([s*,la*],exclude=[short*,sl*])", "stages=[]"]
    words.append("hydra.sweep.dir=s")
    found = ["laco", "streamline"]
    outcome = run_slm(*words, "dry_run=true")
    assert outcome.status == 0, outcome.err
    assert [word for word in outcome.out.split() if word.startswith("method=")] == [f"method={name}" for name in found]
    assert run_slm(*words).status == 0
    assert [(run.option("method"), run.status) for run in read_runs(tmp_path / "s")] == [
        (name, "done") for name in found
    ]
    outcome = run_slm("-m", *GLOB, "method=glob(x*)")
    assert (outcome.status, outcome.err) == (2, "error: method=glob(x*) sweeps over no option of a group\n")
    outcome = run_slm("-m", *GLOB, "sweeps=search", "objective.metric=num_layers", "method=glob(la*)")
    assert outcome.err == "error: method=glob(la*): a search chooses from a list, method=choice(laco)\n"


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]])
def test_a_key_that_one_job_lacks_is_its_failed_row_and_the_others_run(launcher, tmp_path, monkeypatch):
    """Only lora has a rank, and only its job is not refused for it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    words = ["-m", *GLOB[:-1], "recovery=distill,lora", "recovery.rank=4", "stages=[]", "hydra.sweep.dir=s"]
    outcome = run_slm(*words, "dry_run=true")
    assert "would fail: recovery.rank does not exist for recovery=distill, only for recovery=lora" in outcome.out
    assert outcome.err == "error: 1 of 2 jobs would fail, see above\n"
    outcome = run_slm(*words, *launcher)
    assert outcome.status == 2
    assert "job 0 (recovery=distill): recovery.rank does not exist for recovery=distill" in outcome.err.splitlines()[-1]
    runs = read_runs(tmp_path / "s")
    assert [(run.option("recovery"), run.status) for run in runs] == [("distill", "FAILED"), ("lora", "done")]
    assert runs[0].reason.startswith("recovery.rank does not exist for recovery=distill, only for recovery=lora")


def test_a_key_that_only_a_swept_option_has(tmp_path, monkeypatch):
    """Hydra composes the study itself with the default method, which has no such key."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    words = ["-m", *GLOB, "method=come,come_posterior", "method.repeat=when_needed", "stages=[]"]
    assert run_slm(*words, "hydra.sweep.dir=s").status == 0
    assert [run.status for run in read_runs(tmp_path / "s")] == ["done", "done"]


def test_a_mistake_that_all_jobs_share_is_said_before_any(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    outcome = run_slm("-m", *GLOB, "method=slm,laco", "oops=1")
    assert outcome.status == 2
    assert outcome.err.startswith("error: Could not override 'oops'")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_study_that_is_refused_leaves_nothing_of_itself(earlier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    if earlier:
        Path("s").mkdir()
        Path("s/study.json").write_text(json.dumps({"format": 1, "command": "slm earlier", "jobs": []}))
    monkeypatch.setattr("submitit.AutoExecutor", Mock(side_effect=RuntimeError("no sbatch here")))
    outcome = run_slm("-m", *GLOB, "seed=1,2", "hydra/launcher=slurm", "hydra.sweep.dir=s")
    assert (outcome.status, "no sbatch here" in outcome.err) == (2, True)
    assert Path("s").exists() == earlier
    assert not earlier or run_folder.study_of(Path("s"))["command"] == "slm earlier"


def test_ctrl_c_leaves_a_job_and_the_rest_interrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    words = ["-m", *GLOB, "seed=1,2,3", "stages=[]", "hydra.sweep.dir=s"]
    execute, calls = runner.execute, []

    def second_is_interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return execute(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "execute", second_is_interrupted)
        outcome = run_slm(*words)
    assert outcome.status == 130
    assert outcome.err.endswith("error: interrupted; the same command goes on from here\n")
    assert [run.status for run in read_runs(tmp_path / "s")] == ["done", "interrupted", "interrupted"]
    assert "3 jobs, 1 done, 2 interrupted" in Path("s/summary.md").read_text()
    assert run_slm(*words).status == 0
    assert [run.status for run in read_runs(tmp_path / "s")] == ["done", "done", "done"]


def test_sigterm_ends_a_run_like_ctrl_c_and_the_same_command_goes_on(tmp_path):
    """A process of its own, ended while it works."""
    (tmp_path / "text.txt").write_text(TEXT)
    program = "import time\nfrom slm_pipeline.jobs import runner\nfrom slm_pipeline.cli import main\n"
    program += "def execute(*_):\n    print('here', flush=True)\n    time.sleep(60)\nrunner.execute = execute\nmain()"
    words = [*GLOB, "stages=[]", "hydra.run.dir=run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(study.__file__).parent.parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    assert [run.status for run in read_runs(tmp_path / "run")] == ["running"]
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.endswith("error: ended by SIGTERM; the same command goes on from here\n")
    assert "Traceback" not in err
    assert [run.status for run in read_runs(tmp_path / "run")] == ["interrupted"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert run_slm(*words).status == 0
    assert [run.status for run in read_runs(tmp_path / "run")] == ["done"]
