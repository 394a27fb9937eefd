"""``slm-bench repair`` and ``slm-bench joint``: what these stages take, in time and in memory.

slm-bench repair                                       rescale and refit after angular, SmolLM2
slm-bench joint model=llama2_7b pruning_ratio=r35      the joint search, and its refit, on another model

Each job is a ``slm`` in a process of its own with a store of its own, which goes afterwards. Seconds and peak memory
are those that its stages note.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slm_pipeline.commands.bench_results import QUIET, Result, leave, table
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line
from slm_pipeline.jobs.job import Job

_DEFAULTS = ["recovery=none", "keep=plan", *QUIET]


@dataclass(frozen=True)
class Cost:
    """Of a stage, or of a whole job.

    Attributes:
        peak_gb: of the GPU, else of the process.
        work: seconds of it without loading and saving, as the stage notes them; None where it does not.
    """

    seconds: float
    peak_gb: float
    work: float | None = None


def around(words: Sequence[str], group: str) -> Job:
    """The model, text and output folder that words are about, whatever else they ask for."""
    common = [word for word in words if not word.startswith(("method", "threshold", "repair", "pruning_ratio"))]
    return command_line.compose_job(["slm-bench", group], common, [*_DEFAULTS, "method=none", "pruning_ratio=none"])


@contextmanager
def scratch(words: Sequence[str], group: str) -> Iterator[Path]:
    """A folder below the output folder that goes afterwards."""
    parent = Path(around(words, group).config.output_dir).expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"slm_bench_{group}_", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run_slm(words: Sequence[str], folder: Path, launcher: Sequence[str] = (sys.executable, "-m")) -> dict[str, Cost]:
    """Run ``slm`` with its output in ``folder`` and return what each stage took, and the ``command`` with its start.
    What it says is in ``folder``/said.txt.

    Raises:
        UserError: it failed; with the last line that it said.
    """
    command = [*launcher, "slm_pipeline", *words, f"output_dir={folder}"]
    started = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    seconds = time.monotonic() - started
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "said.txt").write_text(run.stdout + run.stderr, encoding="utf-8")
    if run.returncode != 0:
        said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        raise UserError(f"slm {' '.join(words)} failed: {next(iter(said[-1:]), 'it said nothing')}")
    costs = dict(_cost(file) for file in folder.glob("store/*/*/stage.json"))
    return costs | {"command": Cost(seconds, max((cost.peak_gb for cost in costs.values()), default=0.0))}


def _cost(file: Path) -> tuple[str, Cost]:
    """Of a finished stage, by its stage.json; a merge notes its search's seconds in the plan."""
    record = json.loads(file.read_text(encoding="utf-8"))
    plan = file.with_name("plan.json")
    found = json.loads(plan.read_text(encoding="utf-8"))["scores"] if record["stage"] == "merge" else record["result"]
    return record["stage"], Cost(record["seconds"], record["peak_memory_gb"], found.get("seconds"))


def repair(words: list[str]) -> None:
    """Time both repairs; ``words`` is the command line: overrides as for slm."""
    jobs = {name: ["method=angular", *_DEFAULTS, *words, f"repair={name}"] for name in ("rescale", "refit")}
    _stages("repair", words, jobs, ["repair"])


def joint(words: list[str]) -> None:
    """Time the joint search and its refit."""
    _stages("joint", words, {"joint": ["method=joint", *_DEFAULTS, *words]}, ["merge", "repair"])


def _stages(group: str, words: list[str], jobs: dict[str, list[str]], stages: Sequence[str]) -> None:
    results = []
    for name, overrides in jobs.items():
        with scratch(words, group) as folder:
            results += of_stages(name, run_slm(overrides, folder), stages)
    print(table(results))
    leave(group, around(words, group), words, results)


def of_stages(name: str, costs: dict[str, Cost], stages: Sequence[str]) -> list[Result]:
    """Seconds and peak memory of some stages."""
    found = [(stage, costs[stage]) for stage in stages if stage in costs]
    return [
        *(Result(f"{name}, {stage}", cost.seconds, "s") for stage, cost in found),
        *(Result(f"{name}, {stage}, peak", cost.peak_gb, "GB") for stage, cost in found),
    ]
