"""``hydra/launcher=joblib``: many small jobs on two workers, one store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NUM_JOBS = int(os.environ.get("SLM_TEST_JOBS", 30))  # 200 take four minutes on two cores
THRESHOLDS = [0.4 + 0.597 * number / (NUM_JOBS - 1) for number in range(NUM_JOBS)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The sweep's folder, and the parent's memory in KB after each tenth of the jobs."""
    folder = tmp_path_factory.mktemp("joblib")
    (folder / "text.txt").write_text("the river runs past the old mill and a tree " * 20)
    thresholds = ",".join(f"{threshold:.4f}" for threshold in [*THRESHOLDS, 1.5])  # the last one is a mistake
    command = [
        sys.executable, "-m", "slm_pipeline", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "hydra.launcher.batch_size='1'", "model=random", "model.num_layers=4", "model.hidden_size=16",
        "model.intermediate_size=16", "model.num_heads=2", "model.num_kv_heads=1", "calibration=text_file",
        "calibration.path=text.txt", "calibration.num_samples=2", "calibration.seq_len=8", "pruning_ratio=none",
        "threshold=fixed", f"threshold.value={thresholds}", "recovery=none", "keep=plan", "evaluation=perplexity",
        "evaluation.of=[dense,pruned]", "evaluation.perplexity.corpora=[text.txt]", "evaluation.perplexity.window=64",
        "tracker=jsonl", "pictures=false", "output_dir=out",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    memory: list[int] = []
    with open(folder / "log", "w") as log:
        parent = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while parent.poll() is None:
            done = sum(1 for _ in folder.glob("out/sweeps/slm/*/*/summary.json"))
            if done >= (len(memory) + 1) * NUM_JOBS // 10:
                status = Path(f"/proc/{parent.pid}/status").read_text()
                memory.append(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")))
            time.sleep(0.2)
    log_text = (folder / "log").read_text()
    assert parent.returncode == 2, log_text[-3000:]
    assert log_text.endswith("(threshold.value=1.5): threshold.value=1.5 must lie in [0, 1]\n")
    (sweep,) = folder.glob("out/sweeps/slm/*")
    return sweep, memory


def test_no_result_is_lost_or_doubled(study):
    sweep, _ = study
    summaries = {path.parent.name: json.loads(path.read_text()) for path in sweep.glob("*/summary.json")}
    assert sorted(summaries, key=int) == [str(number) for number in range(NUM_JOBS)]
    thresholds = [summaries[str(number)]["threshold"] for number in range(NUM_JOBS)]
    assert thresholds == pytest.approx(THRESHOLDS, abs=1e-4)
    assert f"{NUM_JOBS + 1} jobs, {NUM_JOBS} done, 1 FAILED" in (sweep / "summary.md").read_text()


def test_what_jobs_share_is_computed_once_and_everything_is_whole(study):
    sweep, _ = study
    stages = [json.loads(path.read_text())["stages"] for path in sweep.glob("*/summary.json")]
    everything = {stage["path"] for job in stages for stage in job.values()}
    made = Counter(stage["path"] for job in stages for stage in job.values() if not stage["reused"])
    assert made == dict.fromkeys(everything, 1)
    plans = {str(json.loads(path.read_text())["layer_groups"]) for path in sweep.glob("*/summary.json")}
    by_stage = Counter(Path(path).parent.name for path in everything)
    assert by_stage == {"calibrate": 1, "merge": NUM_JOBS, "evaluate": len(plans)}  # one plan is the dense model

    store = sweep.parent.parent.parent / "store"
    folders = {str(path) for path in store.glob("*/*") if path.is_dir()}
    assert folders == everything
    for folder in map(Path, folders):
        record = json.loads((folder / "stage.json").read_text())
        assert (record["stage"], record["key"]) == (folder.parent.name, folder.name)


def test_the_parent_does_not_grow_with_the_jobs(study):
    """Hydra keeps what each job returned, some KB; two configurations of each would be 200 KB."""
    _, memory = study
    assert len(memory) >= 9
    assert memory[8] - memory[2] < 12 * NUM_JOBS  # of 60 % of the jobs; after the last one it draws the report
