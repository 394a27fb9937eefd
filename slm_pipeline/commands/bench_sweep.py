"""``slm-bench sweep``: a study of thresholds with and without what its jobs share.

slm-bench sweep                                       the eight thresholds of sweeps/thresholds.yaml, SmolLM2
slm-bench sweep model=llama2_7b evaluation=none       another model, the searches alone

Shared: calibration, the dense model's scores, every window's similarity, and all that follows from equal plans. Without
sharing every job has a store of its own. The jobs run one after another in this process, in the order of the study,
after one to warm up; block evaluations are those of the searches, the dense pass not counted.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import yaml

from slm_pipeline import config
from slm_pipeline.commands.bench_results import Result, leave
from slm_pipeline.jobs import command_line
from slm_pipeline.jobs.runner import execute
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.show.tables import Table
from slm_pipeline.surgery.plan import Plan

_DEFAULTS = [
    *("threshold=fixed", "threshold.value=0.9", "pruning_ratio=none", "recovery=none", "keep=plan", "pictures=false"),
    *("evaluation=perplexity", "evaluation.of=[dense,pruned]", "evaluation.perplexity.max_tokens=16384"),
    "tracker=jsonl",
]


@dataclass(frozen=True)
class Cost:
    """What a job took.

    Attributes:
        layers: of the pruned model.
        windows, blocks: evaluated in its search.
        seconds: of all its stages.
    """

    layers: int
    windows: int
    blocks: int
    seconds: float


def sweep(words: list[str]) -> None:
    """Measure and print; ``words`` is the command line: overrides as for slm."""
    study = yaml.safe_load((config.SWEEPS_ROOT / "sweeps" / "thresholds.yaml").read_text(encoding="utf-8"))
    thresholds = study["hydra"]["sweeper"]["params"]["threshold.value"].split(",")
    folder = Path(tempfile.mkdtemp(prefix="slm_bench_"))
    rows = []
    try:
        _run(words, thresholds[0], folder / "warm_up")  # imports, and files that the system has not read yet
        for threshold in thresholds:
            alone = _run(words, threshold, folder / f"alone_{threshold}")
            shared = _run(words, threshold, folder / "shared")
            assert alone.layers == shared.layers
            rows.append((threshold, alone, shared))
            print(f"threshold {threshold}: {alone.seconds:.1f} s alone, {shared.seconds:.1f} s shared", flush=True)
    finally:
        shutil.rmtree(folder)
    print(table(rows))
    all_alone, all_shared = sum(row[1].seconds for row in rows), sum(row[2].seconds for row in rows)
    how = f"{all_alone:.1f} and {all_shared:.1f} s"
    result = Result("a study of thresholds, shared against alone", all_alone / all_shared, how=how)
    leave("sweep", command_line.compose_job(["slm-bench", "sweep"], words, _DEFAULTS), words, [result])


def table(rows: list[tuple[str, Cost, Cost]]) -> str:
    """A row for each threshold and one for all of them, as Markdown."""
    counted = [f"{what} {how}" for what in ("windows", "blocks", "seconds") for how in ("alone", "shared")]
    columns = ["threshold", "layers", *counted]
    cells = [[threshold, str(alone.layers), *_pairs(alone, shared)] for threshold, alone, shared in rows]
    alone, shared = (
        Cost(0, *(sum(getattr(row[side], name) for row in rows) for name in ("windows", "blocks", "seconds")))
        for side in (1, 2)
    )
    return Table(columns, [*cells, ["all", "", *_pairs(alone, shared)]]).markdown()


def _pairs(alone: Cost, shared: Cost) -> list[str]:
    numbers = [(side.windows, side.blocks, round(side.seconds, 1)) for side in (alone, shared)]
    return [str(value) for pair in zip(*numbers, strict=True) for value in pair]


def _run(words: list[str], threshold: str, output_dir: Path) -> Cost:
    overrides = [*words, f"threshold.value={threshold}", f"output_dir={output_dir}"]
    job = command_line.compose_job(["slm-bench", "sweep"], overrides, _DEFAULTS)
    run_dir = output_dir / "runs" / threshold
    started = time.monotonic()
    with Tracker(run_dir) as tracker, redirect_stdout(io.StringIO()):
        found = execute(job, run_dir, tracker, [])
    seconds = time.monotonic() - started
    scores = Plan.read(run_dir / "plan.json").scores
    return Cost(found["num_layers"]["pruned"], scores["num_evaluated"], scores["num_block_evaluations"], seconds)
