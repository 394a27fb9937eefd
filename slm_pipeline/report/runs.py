"""The runs below some folders, as they lie on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from slm_pipeline.errors import UserError
from slm_pipeline.report.measurement import Summary
from slm_pipeline.study import REQUEUED, is_running

STATUSES = ("done", "FAILED", "running", "interrupted", "queued")

Value = str | int | float
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is written in C, and not everywhere


@dataclass(frozen=True)
class Run:
    """One job, finished or not."""

    job: str  # its folder, from the one that was asked for
    path: Path
    status: str  # one of `STATUSES`
    reason: str  # why it failed, else empty
    overrides: Sequence[str]  # of the command line
    summary: Summary | None  # what summary.json holds, of a run that is done

    @property
    def state(self) -> str:
        """The status, and why if it failed."""
        return f"{self.status}: {self.reason}" if self.reason else self.status

    @cached_property
    def finished_at(self) -> float:
        """When its summary was written, in seconds since the epoch; 0 if it is not done."""
        return (self.path / "summary.json").stat().st_mtime if self.summary else 0.0

    @cached_property
    def overridden(self) -> dict[str, str]:
        """Option -> value, as on the command line."""
        pairs = (override.lstrip("+").partition("=") for override in self.overrides if not override.startswith("~"))
        return {key: value for key, _, value in pairs}

    @cached_property
    def choices(self) -> Mapping[str, str]:
        """Configuration group -> the option chosen; empty where Hydra's record is not there."""
        found = _read_yaml(self.path / ".hydra" / "hydra.yaml")
        choices = found.get("hydra", found).get("runtime", {}).get("choices", {})
        return {group: choice for group, choice in choices.items() if isinstance(choice, str) and "/" not in group}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration, resolved if the run got so far; empty where there is none."""
        return _read_yaml(self.path / "config.yaml") or _read_yaml(self.path / ".hydra" / "config.yaml")

    def option(self, name: str) -> Value | None:
        """The value of an option: overridden, chosen or configured, as a number if it is one.

        Empty for null, None if the run does not know the option or did not get so far.
        """
        if name in self.overridden:
            return _value(self.overridden[name])
        if name in self.choices:
            return self.choices[name]
        found: Any = self.config
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return None
            found = found[part]
        return None if isinstance(found, Mapping) else _value(found)


def read_runs(*directories: Path) -> list[Run]:
    """Every run in or below the folders, in the order of their names (2 before 10).

    Jobs that a folder's study.json lists and that have no folder yet are there too, as "queued". With one folder,
    ``job`` is the path from there; with several, from what they have in common.

    Raises:
        UserError: there is no such directory, or no run in it.
    """
    runs: dict[Path, Run] = {}
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory of runs")
        found = [*_runs_below(directory)]
        if not found:
            raise UserError(f"no runs in {directory}: expected folders with summary.json, failure.json or .hydra")
        base = directory if len(directories) == 1 else Path(os.path.commonpath([d.resolve() for d in directories]))
        for run in sorted(found, key=lambda run: _in_numbers(run.path)):
            runs.setdefault(run.path.resolve(), _named(run, base))
    return list(runs.values())


def _runs_below(directory: Path) -> Iterator[Run]:
    for folder, subfolders, files in os.walk(directory):
        path = Path(folder)
        if _is_run(path):
            subfolders.clear()  # runs do not nest
            yield _read_run(path)
        elif "study.json" in files:
            jobs = json.loads((path / "study.json").read_text(encoding="utf-8"))["jobs"] or []
            for number, overrides in enumerate(jobs):
                if not _is_run(path / str(number)):
                    yield Run(str(number), path / str(number), "queued", "", overrides, None)


def any_left(directory: Path) -> bool:
    """Whether a job of a study has left neither a result nor a reason; unknown jobs of a search count as left."""
    listed = directory / "study.json"
    jobs = json.loads(listed.read_text(encoding="utf-8"))["jobs"] if listed.exists() else None
    if jobs is None:
        return True
    folders = (directory / str(number) for number in range(len(jobs)))
    return not all((folder / "summary.json").exists() or (folder / "failure.json").exists() for folder in folders)


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in (".hydra", "summary.json", "failure.json"))


def _read_run(path: Path) -> Run:
    overrides_file = path / ".hydra" / "overrides.yaml"
    overrides = _read_yaml(overrides_file) or []  # empty while Hydra writes it
    status, reason, summary = "", "", None
    if (path / "summary.json").exists():
        status, summary = "done", json.loads((path / "summary.json").read_text(encoding="utf-8"))
    elif (path / "failure.json").exists():
        failure = json.loads((path / "failure.json").read_text(encoding="utf-8"))
        status, reason = "FAILED", " ".join(failure["error"].split())
    elif is_running(path):
        status = "running"
    else:
        status = "queued" if (path / REQUEUED).exists() else "interrupted"
    return Run(path.name, path, status, reason, [str(override) for override in overrides], summary)


def _named(run: Run, base: Path) -> Run:
    here = run.path.resolve().relative_to(base.resolve())
    job = run.path.resolve().name if here == Path() else here.as_posix()
    return Run(job, run.path, run.status, run.reason, run.overrides, run.summary)


def _in_numbers(path: Path) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in path.parts]


def _read_yaml(path: Path) -> Any:
    return (yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}) if path.exists() else {}


def _value(given: Any) -> Value:
    """A number if it reads like one, else text; lists as on the command line, null as nothing."""
    if given is None or given == "null":
        return ""
    if isinstance(given, (list, tuple)):
        return "[" + ",".join(str(_value(item)) for item in given) + "]"
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, (int, float)):
        return given
    for number in (int, float):
        try:
            return number(given)
        except ValueError:
            continue
    return str(given)
