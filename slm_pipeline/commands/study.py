"""``slm-study status DIR``: how far the jobs of a study are, wherever its launcher waits. Only reads.

slm-study status outputs/sweeps/thresholds/TIME
slm-study status outputs/sweeps --watch 30

queued: it has not begun and somebody will start it, the study's process or a cluster; running: a process works in its
folder; interrupted: it has neither a result nor a reason and nobody is at it, so the same command again is needed;
unreadable: its files were damaged, and how.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from slm_pipeline.cli import errors_in_one_line
from slm_pipeline.commands.arguments import parsed
from slm_pipeline.errors import UserError
from slm_pipeline.report.runs import STATUSES, Run, read_runs
from slm_pipeline.show.tables import Table

_TAIL = 65536  # bytes of a log in which its last line is looked for


def status(runs: Sequence[Run], now: float) -> str:
    """A line of counts, and a row for each job that is not done.

    Args:
        runs: of `read_runs`.
        now: seconds since the epoch, from which the age of a log's last line is taken.
    """
    counts = Counter(run.status for run in runs)
    number = f"{len(runs)} job{'s' if len(runs) > 1 else ''}"
    head = f"{number}: " + ", ".join(f"{counts[name]} {name}" for name in STATUSES if counts[name])
    if set(counts) == {"done"}:
        return f"{head}\n"
    shared = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    rows = [
        [run.job, " ".join(item for item in run.overrides if item not in shared), _state(run, now)]
        for run in runs
        if run.status != "done"
    ]
    return f"{head}\n\n{Table(['job', 'overrides', 'status'], rows).text()}"


def _state(run: Run, now: float) -> str:
    """The status, and why it failed or the last line of its log."""
    log = run.path / "slm.log"
    if run.status not in ("running", "interrupted") or not log.is_file():
        return run.state
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        age = now - log.stat().st_mtime
    except OSError:
        return run.state
    if not lines:
        return run.state
    message = lines[-1].partition(": ")[2] or lines[-1]  # without the time and the module's name
    return f"{run.status}: {message} ({_age(age)} ago)"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def main() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(
        prog="slm-study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["status"])
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a study, or a folder with some below")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again every so often, until no job is left")
    given = parsed(parser)
    with errors_in_one_line():
        if given.watch is not None and not given.watch > 0:
            raise UserError(f"--watch={given.watch:g} must be a positive number of seconds")
        while True:
            runs = read_runs(*given.directories)
            print(status(runs, time.time()), end="", flush=True)
            if given.watch is None or not any(run.status in ("queued", "running") for run in runs):
                return
            time.sleep(given.watch)
            print(flush=True)


if __name__ == "__main__":
    main()
