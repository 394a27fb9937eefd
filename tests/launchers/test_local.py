"""``hydra/launcher=slurm_local``: the launcher of Slurm with processes of this machine, and joblib, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from slm_pipeline.report.runs import read_runs

REPOSITORY = Path(__file__).resolve().parent.parent.parent

SLURM_LOCAL = ["hydra/launcher=slurm_local", "hydra.launcher.array_parallelism=2"]
KILLED_BEFORE_MERGE = """
import os
from slm_pipeline.jobs.stages.merge import Merge

run = Merge.run
def dies(self, job, *arguments, **options):
    if job.threshold.floor.similarity == 0.6:
        os.kill(os.getpid(), 9)
    return run(self, job, *arguments, **options)
Merge.run = dies
"""


def run_study(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts" / "text.txt").write_text("the river runs past the old mill and a tree " * 20)
    (folder / "sweeps").mkdir(exist_ok=True)
    (folder / "sweeps" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /threshold: fixed\n  - override /pruning_ratio: none\n"
        "  - override /recovery: none\n  - override /evaluation: none\n"
        "name: mine\nhydra: {sweeper: {params: {threshold.value: '0.9,1.5,0.6,0.5'}}}\n"
    )
    command = [
        sys.executable, "-m", "slm_pipeline", "-m", "sweeps=mine", "model=random", "model.num_layers=6",
        "model.hidden_size=32", "model.intermediate_size=48", "data_dir=texts", "calibration=text_file",
        "calibration.path=text.txt", "calibration.num_samples=2", "calibration.seq_len=16", "pictures=false",
        "output_dir=out", *overrides,
    ]  # fmt: skip
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
    )


def run_deadly_study(folder: Path, workers: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The job with threshold 0.6 dies in a process that has ``workers`` on its command line."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(
        f"import sys\nif any({workers!r} in word for word in sys.orig_argv):\n    import deadly\n"
    )
    (folder / "site" / "deadly.py").write_text(KILLED_BEFORE_MERGE)
    return run_study(folder, *overrides, PYTHONPATH=f"{REPOSITORY}:{folder}/site")


def test_jobs_find_the_users_sweep_and_data_and_fail_one_by_one(tmp_path):
    """The study lies in the user's own ./sweeps, text and results in relative folders; one threshold is wrong, and one
    job is killed."""
    done = run_deadly_study(tmp_path, "submitit.core._submit", *SLURM_LOCAL, "tracker=wandb_offline")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    first = "job 1 (threshold.value=1.5): threshold.value=1.5 must lie in [0, 1]"
    assert line == f"error: 2 of 4 jobs failed; the first, {first}"
    (sweep,) = (tmp_path / "out" / "sweeps" / "mine").iterdir()
    table = (sweep / "summary.md").read_text()
    assert "4 jobs, 2 done, 2 FAILED" in table
    assert "FAILED: threshold.value=1.5 must lie in [0, 1]" in table
    assert "ended without a result: it was killed" in table
    failure = json.loads((sweep / "2" / "failure.json").read_text())
    assert failure["type"] == "UserError"
    assert "threshold.value=0.6" in failure["command"]
    layers = [json.loads((sweep / job / "summary.json").read_text())["num_layers"]["pruned"] for job in ("0", "3")]
    assert layers == [5, 3]
    runs = [[path.name for path in sweep.glob(f"{job}/wandb/offline-run-*")] for job in ("0", "3")]
    assert [len(of_job) for of_job in runs] == [1, 1]
    assert runs[0] != runs[1]


def test_a_killed_worker_of_joblib_ends_the_study_with_a_word(tmp_path):
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "threshold.value=0.6,0.9", "tracker=jsonl"]
    done = run_deadly_study(tmp_path, "loky", *words)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "a worker process was killed for want of memory, perhaps, (SIGKILL(-9)" in line
    assert "the same command runs what is missing" in line
    assert "Traceback" not in done.stderr
    (sweep,) = (tmp_path / "out" / "sweeps" / "mine").iterdir()
    assert [run.status for run in read_runs(sweep)][0] == "interrupted"
