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
NUM_JOBS = 200


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The sweep's folder, and the parent's memory in KB after each tenth of the jobs."""
    folder = tmp_path_factory.mktemp("joblib")
    (folder / "text.txt").write_text("the river runs past the old mill and a tree " * 20)
    thresholds = ",".join(f"{0.4 + 0.003 * number:.3f}" for number in range(NUM_JOBS))
    command = [
        sys.executable, "-m", "slm_pipeline", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "hydra.launcher.batch_size='1'", "model=random", "model.num_layers=4", "model.hidden_size=16",
        "model.intermediate_size=16", "model.num_heads=2", "model.num_kv_heads=1", "calibration=text_file",
        "calibration.path=text.txt", "calibration.num_samples=2", "calibration.seq_len=8", "pruning_ratio=none",
        "threshold=fixed", f"threshold.value={thresholds}", "recovery=none", "keep=plan", "evaluation=perplexity",
        "evaluation.of=[dense,pruned]", "evaluation.perplexity.corpora=[text.txt]", "evaluation.perplexity.window=64",
        "tracker=jsonl", "output_dir=out",
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
    assert parent.returncode == 0, (folder / "log").read_text()[-3000:]
    (sweep,) = folder.glob("out/sweeps/slm/*")
    return sweep, memory
