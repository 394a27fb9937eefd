"""Files of lm-eval's tasks, its own and those of a folder of one's own: which names there are, and what identifies one.

Neither torch is imported here nor a data set loaded, so that a plan can be made of tasks.
"""

from __future__ import annotations

import difflib
import functools
import glob
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_pipeline.data import hub
from slm_pipeline.data.files import read_bytes
from slm_pipeline.errors import UserError
from slm_pipeline.store.checksums import digest

log = logging.getLogger(__name__)

INSTEAD = "evaluation.tasks, whose data is bundled, or tasks of your own on local files"  # of a hub


def folder(include_path: str | None, data_dir: Path | None, option: str) -> Path | None:
    """A folder of task files; None of None.

    Args:
        include_path: the folder.
        data_dir: where a relative one is looked up; None: the working directory.
        option: what named it, for messages.

    Raises:
        UserError: it has no YAML file.
    """
    if include_path is None:
        return None
    found = ((data_dir or Path.cwd()) / Path(include_path).expanduser()).resolve()
    if not any(found.rglob("*.yaml")):
        raise UserError(f"{option}={include_path}: {found} is no folder with task files (.yaml) in it")
    return found


def manager(tasks: Sequence[str], own: Path | None, option: str) -> Any:
    """lm-eval's ``TaskManager`` that knows all of the names.

    Args:
        tasks: names of tasks, groups and tags.
        own: a folder of task files; where it has a name that lm-eval has too, its own counts. If it has all that the
            names reach, lm-eval's own 14,000 files are not read, which takes seconds.
        option: what named the tasks, for messages.

    Raises:
        UserError: there is no task of a name.
    """
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_defaults=False, include_path=str(own) if own else None)
    index = found.task_index
    read = {entry.yaml_path for entry in index.values()}
    if _reached(tasks, index)[1]:
        for name, entry in _built_in().items():
            index.setdefault(name, entry)
    for name in tasks:
        if name not in index:
            near = difflib.get_close_matches(name, index, n=3)
            unread = sorted(file.name for file in own.rglob("*.yaml") if file not in read) if own else []
            raise UserError(
                f"{option}: lm-eval has no task {name!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
                + (f"; no task of its own is in {', '.join(unread)}" if unread else "")
            )
    return found


def contents(task: str, own: Path | None, option: str) -> dict[str, Any]:
    """What a task is, apart from the settings that it is scored with: JSON in which no path is.

    Args:
        task: a name.
        own: as of `manager`.
        option: what named the task, for messages.

    Returns:
        version (None if it has none), configs (hash of the settings of all tasks it reaches), code (hash of all Python
        files in ``own``, if a task is from there) and data: data set of the hub -> its commit, task -> what is in its
        local files. Where a Python class or function makes the data, lm-eval's version or the code stands for it.

    Raises:
        UserError: unknown name, a data file that is not there, or neither the hub nor its cache has the data.
    """
    index = manager([task], own, option).task_index
    reached, _ = _reached([task], index)
    data: dict[str, Any] = {}
    for name, entry in sorted(reached.items()):
        for number, settings in enumerate(_settings(entry.cfg or {})):
            _add_data(data, settings, f"{name}[{number}]" if number else name, f"{option}: {name}")
    code = {}
    if own and any(own in entry.yaml_path.parents for entry in reached.values() if entry.yaml_path):
        code = {file.relative_to(own).as_posix(): _sha256(file) for file in sorted(own.rglob("*.py"))}
    configs = {name: _plain(entry.cfg or sorted(entry.tags), own) for name, entry in reached.items()}
    metadata = (reached[task].cfg or {}).get("metadata")
    return {
        "version": metadata.get("version") if isinstance(metadata, Mapping) else None,
        "configs": digest(configs),
        "code": digest(code),
        "data": data,
    }


@functools.cache
def _built_in() -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    log.info("reading the names of lm-eval's tasks")
    index: Mapping[str, Any] = TaskManager().task_index
    return index


def _reached(tasks: Sequence[str], index: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries of tasks and of all that is below them, and the names that no file has."""
    reached: dict[str, Any] = {}
    missing = []
    names = list(tasks)
    while names:
        name = names.pop()
        if name not in index:  # unknown, or a task that is written out within its group
            missing.append(name)
        elif name not in reached:
            entry = reached[name] = index[name]
            names += entry.tags if entry.kind.name == "TAG" else _members(entry.cfg or {})
    return reached, missing


def _listed_in(config: Mapping[str, Any]) -> list[Any]:
    """What a group has under ``task``: names, or settings with a name. A task has its own name there."""
    members = config.get("task")
    return members if isinstance(members, list) else []


def _members(config: Mapping[str, Any]) -> Iterator[str]:
    """The names in a group, also in groups that are written out in it."""
    for member in _listed_in(config):
        if isinstance(member, str):
            yield member
        elif isinstance(member.get("task"), list):
            yield from _members(member)
        else:
            yield member.get("task") or member["group"]


def _settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A task's or a group's settings, and those that a group has for its members."""
    yield config
    for member in _listed_in(config):
        if isinstance(member, Mapping):
            yield from _settings(member)


def _add_data(data: dict[str, Any], settings: Mapping[str, Any], name: str, where: str) -> None:
    path, options = settings.get("dataset_path"), settings.get("dataset_kwargs") or {}
    files, base = options.get("data_files"), options.get("data_dir")
    if _on_disk(settings) or path is None:  # None: of members whose own settings have it
        if files is not None:
            splits = files if isinstance(files, Mapping) else {"train": files}
            needed = where if path is not None else None
            data[name] = {split: _hashed(patterns, Path(base or ""), needed) for split, patterns in splits.items()}
        elif base is not None:
            data[name] = hub.files_digest(Path(base), sorted(file for file in Path(base).rglob("*") if file.is_file()))
    elif path is not None:
        revision = options.get("revision") or "main"
        key = name if Path(path).is_dir() else path if revision == "main" else f"{path} {revision}"
        if key not in data:
            data[key] = hub.identity(path, where, INSTEAD, revision=revision)


def _on_disk(settings: Mapping[str, Any]) -> bool:
    """Whether the data is files that one of datasets' readers takes, such as json."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as readers

    return settings.get("dataset_path") in readers


def _hashed(patterns: Any, base: Path, needed: str | None) -> list[str]:
    """The content of the files that names or patterns mean; an address stands for itself.

    ``needed``: what named them, for messages; None: they may be missing.
    """
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if "://" in pattern:
            found.append(pattern)
            continue
        place = base / pattern
        files = [place] if place.is_file() else [Path(file) for file in sorted(glob.glob(str(place), recursive=True))]
        if not files and needed:
            raise UserError(f"{needed}: there is no data file {place.absolute()}")
        found += [_sha256(file) for file in files if file.is_file()]
    return found


def _sha256(file: Path) -> str:
    return hashlib.sha256(read_bytes(file)).hexdigest()[:16]


def _plain(value: Any, own: Path | None) -> Any:
    """Settings as JSON without the places of files whose content is looked at elsewhere."""
    if isinstance(value, Mapping):
        left_out = []
        if "dataset_path" in value and Path(str(value["dataset_path"])).is_dir():
            left_out = ["dataset_path"]
        elif _on_disk(value):
            options = value.get("dataset_kwargs") or {}
            kept = {key: item for key, item in options.items() if key not in ("data_files", "data_dir")}
            value = {**value, "dataset_kwargs": kept}
        return {str(key): _plain(item, own) for key, item in value.items() if key not in left_out}
    if isinstance(value, (list, tuple)):
        return [_plain(item, own) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    text = str(value)
    for root in (own, _root()) if text.startswith("/") else ():  # a function: its file and its name
        if root and text.startswith(f"{root}/"):
            return text.removeprefix(f"{root}/")
    return text


def _root() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).resolve().parent
