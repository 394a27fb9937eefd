"""What the store promises, tried by hand: python tests/torture.py kills | jobs | disk. A small random model, on a CPU.

kills   one job for each recovery, killed with SIGKILL at random moments and started again until it ends
jobs    eight jobs on one store at once, killed and started again likewise
disk    each job on a disk that is full at one of eight sizes; some space more each time, until it ends (needs root)

Every job must end with the numbers and weights of one that nothing happened to. Exit status 1 if one does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import small_pipeline

REPOSITORY = Path(__file__).resolve().parent.parent
RECOVERIES = {
    "lora": ["recovery.dropout=0.05"],
    "partial_layers": ["recovery.num_layers=2"],
    "distill": ["recovery.logit_share=0.4", "recovery.order=blocks"],
    "block_mse": [],
    "full": [],
}
FINDINGS = ("metrics", "layer_groups", "dropped", "threshold", "num_layers", "parameters", "calibration")
MAX_STARTS = 200  # of one job


def overrides(recovery: str, data: Path) -> list[str]:
    common = small_pipeline.overrides(data, seq_len=128, max_steps=20, save_steps=3)
    more = ["model.device=cpu", "pictures=false", "pruning_ratio=r35", f"recovery={recovery}"]
    return [*common, *more, *RECOVERIES[recovery]]


class Job:
    """One command in a run folder of its own, started as often as need be."""

    def __init__(self, recovery: str, data: Path, output_dir: Path, run_dir: Path):
        self.recovery, self.run_dir = recovery, run_dir
        given = [*overrides(recovery, data), f"output_dir={output_dir}", f"hydra.run.dir={run_dir}"]
        self.command = [sys.executable, "-m", "slm_pipeline", *given]
        self.seconds = 0.0

    def start(self, kill_after: float | None = None) -> tuple[int, str]:
        """Exit status and standard error; killed after so many seconds if it has not ended."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        started = time.monotonic()
        process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            error = process.communicate(timeout=kill_after)[1]
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            error = process.communicate()[1]
        self.seconds = time.monotonic() - started
        return process.returncode, error

    def result(self) -> dict[str, Any]:
        """What must not depend on what happened on the way."""
        summary = json.loads((self.run_dir / "summary.json").read_text())
        weights = Path(summary["checkpoint"]) / "model.safetensors"
        assert weights.parent.parent.parent.name == "recover", weights
        recovery = {name: value for name, value in summary["recovery"].items() if name != "seconds"}
        return {
            **{name: summary[name] for name in FINDINGS},
            "recovery": recovery,
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }


def undisturbed(recovery: str, data: Path, folder: Path) -> tuple[dict[str, Any], float]:
    """The result of a job that nothing happens to, and its seconds."""
    job = Job(recovery, data, folder / "outputs", folder / "run")
    status, error = job.start()
    assert status == 0, error
    return job.result(), job.seconds


def kill_until_done(job: Job, seconds: float, generator: random.Random, max_kills: int) -> int:
    """Start the job again and again, killed at a random moment of its first ``seconds``; how often it was killed."""
    for kills in range(MAX_STARTS):
        status, error = job.start(generator.uniform(0.3, 1) * seconds if kills < max_kills else None)
        if status == 0:
            return kills
        if status != -signal.SIGKILL:
            raise AssertionError(f"{job.recovery} ended with status {status}:\n{error}")
    raise AssertionError(f"{job.recovery} did not end in {MAX_STARTS} starts")


def compare(job: Job, expected: dict[str, Any]) -> None:
    found = job.result()
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"{job.recovery} ended with other {', '.join(different)}"


def kills(count: int, seed: int, folder: Path) -> None:
    """``count`` kills over all stages and recoveries, one job after another, each in a store of its own."""
    data, generator, done, round_number = folder / "data", random.Random(seed), 0, 0
    small_pipeline.write_data(data)
    known = {recovery: undisturbed(recovery, data, folder / f"undisturbed_{recovery}") for recovery in RECOVERIES}
    while done < count:
        for recovery, (expected, seconds) in known.items():
            if done >= count:
                break
            place = folder / f"{recovery}_{round_number}"
            job = Job(recovery, data, place / "outputs", place / "run")
            done += (killed := kill_until_done(job, seconds, generator, min(12, count - done)))
            compare(job, expected)
            left = [str(path) for path in (place / "outputs" / "store").glob("*/*.partial")]
            assert not left, left
            shutil.rmtree(place)
            print(f"{recovery}: killed {killed} times, ended as if undisturbed ({done} of {count})", flush=True)
        round_number += 1


def jobs(count: int, seed: int, folder: Path) -> None:
    """``count`` jobs on one store at once, two of each recovery and more, each killed three times."""
    data = folder / "data"
    small_pipeline.write_data(data)
    known = {recovery: undisturbed(recovery, data, folder / f"undisturbed_{recovery}") for recovery in RECOVERIES}
    names = [list(RECOVERIES)[number % len(RECOVERIES)] for number in range(count)]
    started = [Job(name, data, folder / "outputs", folder / f"run_{number}") for number, name in enumerate(names)]

    def one(number: int) -> int:
        job = started[number]
        return kill_until_done(job, 2 * known[job.recovery][1], random.Random(seed + number), 3)

    with ThreadPoolExecutor(count) as pool:
        killed = list(pool.map(one, range(count)))
    for job in started:
        compare(job, known[job.recovery][0])
    print(f"{count} jobs on one store, killed {sum(killed)} times, ended as if undisturbed")


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def disk(folder: Path, recovery: str = "full") -> None:
    """A job on disks of eight sizes below what it needs. Each start ends in one line; the next has half more."""
    data = folder / "data"
    small_pipeline.write_data(data)
    expected, _ = undisturbed(recovery, data, folder / "undisturbed")
    needed = subprocess.run(["du", "-sk", folder / "undisturbed"], check=True, capture_output=True, text=True).stdout
    kilobytes = int(needed.split()[0])
    for part in range(2, 10):
        place, size, refused = folder / f"disk_{part}", kilobytes * part // 10, 0
        with small_disk(place, size):
            job = Job(recovery, data, place / "outputs", place / "run")
            while True:
                status, error = job.start()
                if status == 0:
                    break
                last = error.strip().splitlines()[-1]
                assert status == 2, f"status {status}:\n{error}"
                assert "Traceback" not in error, error
                assert "no space left" in last.lower(), error
                refused += 1
                size = size * 3 // 2
                subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True)
            compare(job, expected)
        print(f"a disk of {kilobytes * part // 10} kB: full {refused} times, ended as if undisturbed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "jobs", "disk"])
    parser.add_argument("--count", type=int, help="kills: 100; jobs: 8")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no disk stays mounted
    folder = Path(tempfile.mkdtemp(prefix="slm_torture_"))
    print(f"in {folder}", flush=True)
    if given.what == "kills":
        kills(given.count or 100, given.seed, folder)
    elif given.what == "jobs":
        jobs(given.count or 8, given.seed, folder)
    else:
        disk(folder)
    shutil.rmtree(folder)  # what went wrong stays


if __name__ == "__main__":
    main()
