"""What ``slm-analyze`` and ``slm-bench`` left below some folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_pipeline.report.damage import Damaged, read_json, text
from slm_pipeline.report.plots import Picture

_BENCHMARKS = ("search", "methods", "repair", "joint", "sweep", "efficiency", "recovery", "disk", "performance")
# The names of their JSON files.
ANALYSES = ("dynamic_skip", "similarity", "painters", *(f"bench_{group}" for group in _BENCHMARKS))
_OTHERS = {".hydra", "summary.json", "failure.json", "identity.json"}  # of a run, of a result in the store
_HEADER = {"command": text, "model": {"name": text}}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analysis:
    """One that is done: what it is of, its command line, its pictures."""

    title: str
    command: str
    path: Path
    pictures: Sequence[Picture]


def read_analyses(*directories: Path) -> list[Analysis]:
    """Those in or below the folders, by their paths; one that is damaged is a warning."""
    found: dict[str, Analysis] = {}
    for directory in directories:
        for folder, subfolders, files in os.walk(directory):
            if _OTHERS.intersection([*subfolders, *files]):
                subfolders.clear()
                continue
            for name in ANALYSES:
                if f"{name}.json" in files:
                    for one in _read(Path(folder), name):
                        found.setdefault(os.path.realpath(one.path), one)
    return [found[path] for path in sorted(found)]


def _read(folder: Path, name: str) -> Iterator[Analysis]:
    try:
        header = read_json(folder / f"{name}.json", _HEADER)
    except Damaged as damage:
        log.warning("%s: %s", folder, damage)
        return
    if header is None:
        return
    title = f"{name.replace('_', ' ')} of {header['model']['name']}"
    svgs = sorted(path for path in folder.glob("*.svg") if path.is_file())
    pictures = [Picture(f"{title}: {path.stem}" if path.stem != name else title, [path]) for path in svgs]
    yield Analysis(title, header["command"], folder, pictures)
