"""``slm-store list`` and ``slm-store clean``: what the store holds, how big it is, and what is no longer needed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from slm_pipeline.config import STAGES


@dataclass(frozen=True)
class Entry:
    """A folder of the store: a finished result, or what an interrupted job left."""

    path: Path
    stage: str
    finished: bool
    num_bytes: int
    age_days: float
    used_by: int  # run folders that link to it

    @property
    def removable(self) -> bool:
        """No run folder links to it. Unfinished work counts as such: the job that would continue it may never come."""
        return self.used_by == 0


def read_store(output_dir: Path) -> list[Entry]:
    """Every entry below ``<output_dir>/store``, largest first."""
    used = _links(output_dir)
    entries = []
    for stage in STAGES:
        for path in sorted((output_dir / "store" / stage).glob("*")):
            if path.is_dir():
                files = [file.lstat() for file in path.rglob("*") if not file.is_dir()]
                newest = max((state.st_mtime for state in files), default=path.stat().st_mtime)
                entries.append(
                    Entry(
                        path=path,
                        stage=stage,
                        finished=(path / "stage.json").is_file() and not path.suffix,
                        num_bytes=sum(state.st_size for state in files),
                        age_days=(time.time() - newest) / 86400,
                        used_by=used.get(path.resolve(), 0),
                    )
                )
    return sorted(entries, key=lambda entry: -entry.num_bytes)


def _links(output_dir: Path) -> dict[Path, int]:
    """Store folder -> number of links to it in the folders of runs and sweeps."""
    counts: dict[Path, int] = {}
    for place in ("runs", "sweeps"):
        for link in _symlinks(output_dir / place):
            target = link.resolve()
            counts[target] = counts.get(target, 0) + 1
    return counts


def _symlinks(folder: Path) -> Iterator[Path]:
    for path in folder.glob("*"):
        if path.is_symlink():
            yield path
        elif path.is_dir():
            yield from _symlinks(path)


def clean(entries: list[Entry]) -> list[Entry]:
    """Remove ``entries``, except those that a job is working on; returns what was removed."""
    removed = []
    for entry in entries:
        lock = entry.path.with_name(f"{entry.path.name.partition('.')[0]}.lock")
        try:
            with FileLock(lock, timeout=0):
                doomed = entry.path.with_name(f"{entry.path.name}.old")  # a result half deleted must not look whole
                shutil.rmtree(doomed, ignore_errors=True)
                os.replace(entry.path, doomed)
                shutil.rmtree(doomed)
                removed.append(entry)
        except Timeout:
            print(f"in use, left alone: {entry.path}")
    return removed


def _line(entry: Entry) -> str:
    state = "" if entry.finished else "unfinished"
    about = _about(entry.path) if entry.finished else ""
    return (
        f"{entry.stage:<10} {entry.path.name:<24} {_size(entry.num_bytes):>9} {entry.age_days:>6.1f} d"
        f" {entry.used_by:>5} runs  {state}{about}"
    )


def _about(path: Path) -> str:
    """A few words on what a result is, from its stage.json."""
    result = json.loads((path / "stage.json").read_text(encoding="utf-8"))["result"]
    if "num_layers" in result:
        return f"{result['num_layers']['dense']} -> {result['num_layers']['pruned']} layers: {result['layers']}"
    if "num_tokens" in result and "source" in result:
        return f"{result['source']}, {result['num_samples']} x {result['seq_len']} tokens"
    return ", ".join(
        [*result.get("zero_shot", {}), *(f"perplexity {corpus}" for corpus in result.get("perplexity", {}))]
    )


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000  # type: ignore[assignment]
    raise AssertionError


def main() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(prog="slm-store", description=__doc__)
    parser.add_argument("command", choices=["list", "clean"])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="default: outputs")
    parser.add_argument("--stage", choices=STAGES, help="only this stage's results")
    parser.add_argument("--older-than", type=float, default=0, metavar="DAYS", help="clean: only what is older")
    parser.add_argument("--yes", action="store_true", help="clean: remove; without it, only say what would be removed")
    arguments = parser.parse_args()
    if not (arguments.output_dir / "store").is_dir():
        print(f"error: {arguments.output_dir} holds no store; name another with --output-dir", file=sys.stderr)
        sys.exit(2)
    entries = [entry for entry in read_store(arguments.output_dir) if arguments.stage in (None, entry.stage)]
    if arguments.command == "clean":
        entries = [entry for entry in entries if entry.removable and entry.age_days >= arguments.older_than]
    lines = {entry.path: _line(entry) for entry in entries}
    if arguments.command == "clean" and arguments.yes:
        entries = clean(entries)
    for entry in entries:
        print(lines[entry.path])
    total = _size(sum(entry.num_bytes for entry in entries))
    if arguments.command == "list":
        print(f"{len(entries)} results, {total}")
    elif arguments.yes:
        print(f"removed {len(entries)} results, {total}")
    else:
        print(f"would remove {len(entries)} results that no run links to, {total}; add --yes to do it")


if __name__ == "__main__":
    main()
