"""The runs below some folders, as they lie on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError, printable
from slm_pipeline.report.damage import FAILURE, SUMMARY, Damaged, read_json, read_yaml, text
from slm_pipeline.results.measurement import Summary
from slm_pipeline.store.run_folder import REQUEUED, STUDY, is_running, study_of, will_start

STATUSES = ("done", "FAILED", "unreadable", "running", "interrupted", "queued")

Value = str | int | float

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One job, finished or not."""

    job: str  # its folder, from the one that was asked for
    path: Path
    status: str  # one of `STATUSES`
    reason: str  # why it failed or cannot be read, else empty
    overrides: Sequence[str]  # of the command line
    summary: Summary | None  # what summary.json holds, of a run that is done
    begun: bool = True  # else its folder is not there, or has something of an earlier study

    @property
    def state(self) -> str:
        """The status, and why if there is nothing to show."""
        return f"{self.status}: {self.reason}" if self.reason else self.status

    @cached_property
    def finished_at(self) -> float:
        """When its summary was written, in seconds since the epoch; 0 if it is not done."""
        try:
            return (self.path / "summary.json").stat().st_mtime if self.summary else 0.0
        except OSError:
            return 0.0

    @cached_property
    def overridden(self) -> dict[str, str]:
        """Option -> value, as on the command line."""
        pairs = (override.lstrip("+").partition("=") for override in self.overrides if not override.startswith("~"))
        return {key: value for key, _, value in pairs}

    @cached_property
    def choices(self) -> Mapping[str, str]:
        """Configuration group -> the option chosen; empty where Hydra's record is not there."""
        found: Any = self._recorded(".hydra/hydra.yaml")
        for key in ("hydra", "runtime", "choices"):
            inner = found.get(key, found if key == "hydra" else {})
            found = inner if isinstance(inner, Mapping) else {}
        return {group: choice for group, choice in found.items() if isinstance(choice, str) and "/" not in str(group)}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration, resolved if the run got so far; empty where there is none."""
        return self._recorded("config.yaml") or self._recorded(".hydra/config.yaml")

    def _recorded(self, name: str) -> Mapping[str, Any]:
        try:
            found = read_yaml(self.path / name) if self.begun else None
        except Damaged as damage:
            log.warning("%s: %s", self.path, damage)
            return {}
        return found if isinstance(found, Mapping) else {}

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

    Of a study these are the jobs that its study.json lists: what an earlier study left in its folder is none of them,
    and those that have not begun are there too. With one folder, ``job`` is the path from there; with several, from
    what they have in common.

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
        base = (
            directory if len(directories) == 1 else Path(os.path.commonpath([os.path.realpath(d) for d in directories]))
        )
        for run in sorted(found, key=lambda run: _in_numbers(run.path)):
            runs.setdefault(Path(os.path.realpath(run.path)), _named(run, base))
    return list(runs.values())


def _runs_below(directory: Path) -> Iterator[Run]:
    for folder, subfolders, files in os.walk(directory, onerror=lambda error: log.warning("not read: %s", error)):
        path = Path(folder)
        study = study_of(path) if STUDY in files else None
        if STUDY in files and study is None:
            log.warning("%s is damaged: jobs that have not begun are not shown", path / STUDY)
        if _is_run(path):
            subfolders.clear()  # runs do not nest
            yield _read_run(path)
        elif study is not None and study["jobs"] is not None:
            subfolders.clear()
            yield from _jobs_of(path, study)


def _jobs_of(directory: Path, study: Mapping[str, Any]) -> Iterator[Run]:
    waiting = will_start(directory, study)
    for name, overrides in zip(study["folders"], study["jobs"], strict=True):
        run = _read_run(directory / name) if _is_run(directory / name) else None
        if run is None or (run.overrides and run.overrides != overrides):  # nothing, or an earlier study's
            status = "queued" if waiting else "interrupted"
            yield Run(name, directory / name, status, "", overrides, None, begun=False)
        else:
            yield replace(run, overrides=overrides)


def any_left(directory: Path) -> bool:
    """Whether a job of a study has left neither a result nor a reason; unknown jobs of a search count as left."""
    study = study_of(directory)
    if study is None or study["folders"] is None:
        return True
    folders = (directory / name for name in study["folders"])
    return not all(
        os.path.exists(folder / "summary.json") or os.path.exists(folder / "failure.json") for folder in folders
    )


def _is_run(path: Path) -> bool:
    return any(os.path.lexists(path / name) for name in (".hydra", "summary.json", "failure.json"))


def _read_run(path: Path) -> Run:
    status, reason, summary = "", "", None
    try:
        if (summary := read_json(path / "summary.json", SUMMARY)) is not None:
            status = "done"
        elif (failure := read_json(path / "failure.json", FAILURE)) is not None:
            status, reason = "FAILED", printable(failure["error"])
        elif is_running(path):
            status = "running"
        else:
            status = "queued" if os.path.lexists(path / REQUEUED) else "interrupted"
    except Damaged as damage:
        status, reason = "unreadable", printable(str(damage))
    try:
        overrides = read_yaml(path / ".hydra" / "overrides.yaml", [text]) or []  # empty while Hydra writes it
    except Damaged as damage:
        log.warning("%s: %s", path, damage)
        overrides = []
    return Run(path.name, path, status, reason, overrides, summary)


def _named(run: Run, base: Path) -> Run:
    path, root = Path(os.path.realpath(run.path)), Path(os.path.realpath(base))
    job = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(run.path)
    return replace(run, job=path.name if path == root else job)


def _in_numbers(path: Path) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else -1, part) for part in path.parts]


def text_of(value: Value | None) -> str:
    """An option's value for a table."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


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
