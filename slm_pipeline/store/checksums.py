"""Sizes and checksums of files, so that what was cut off, flipped or lost is not believed. Imports no torch.

What is known of a file is ``{"size": bytes, "sha256": hex}``. Files that are appended to after their folder is finished
(``.jsonl``) and lock files are left out. A README.md is for people, who edit it: it is listed and never checked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMALL = 1 << 20  # bytes; smaller files are read whole wherever the sizes of all are checked
Files = dict[str, dict[str, Any]]  # path from the folder -> size and sha256


def digest(value: Any) -> str:
    """16 hexadecimal digits of the sha256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with a checksum of itself, for `read_sealed`."""
    as_read = json.loads(json.dumps(value, allow_nan=False))
    return {**as_read, "checksum": digest(as_read)}


def read_json(path: Path) -> Any:
    """A JSON file's content. Never waits, as reading a named pipe would.

    Raises:
        ValueError: it is not a regular file of JSON.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed` gave, without the checksum. Without one it is of an earlier version and read as it is.

    Raises:
        ValueError: it is not a JSON object, or was changed.
        OSError: it cannot be read.
    """
    try:
        value = read_json(path)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if value.pop("checksum", None) not in (None, digest(value)):
            raise ValueError("its content does not fit its checksum")
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    return value


def describe(folder: Path, *names: str) -> Files:
    """Size and checksum of every file in these files and folders of ``folder``, of all there if none is named."""
    tops = [folder / name for name in names] if names else [folder]
    paths = {file for top in tops for file in ([top] if not top.is_dir() else top.rglob("*")) if file.is_file()}
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(paths)
        if file.suffix not in (".jsonl", ".lock")
    }


def fault(folder: Path, files: Mapping[str, Any], *, whole: bool) -> str | None:
    """What is wrong with the files of ``folder``, in words; None if nothing is.

    Args:
        files: of `describe`; a number in place of size and checksum is a size, as earlier versions kept it.
        whole: read every file. Else the sizes of all are compared, and the checksums of small files and of those that
            this process has read before.
    """
    for name, known in files.items():
        path = folder / name
        if path.name == "README.md":
            continue
        size, expected = (known["size"], known["sha256"]) if isinstance(known, dict) else (known, None)
        try:
            state = path.stat()
            if not stat.S_ISREG(state.st_mode):
                return f"{name} is not a file"
            if state.st_size != size:
                return f"{name} has {state.st_size} bytes, not {size}"
            if expected and (whole or size <= SMALL or _identity(state) in _read) and sha256(path) != expected:
                return f"{name} does not fit its checksum"
        except FileNotFoundError:
            return f"{name} is not there"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


_read: dict[tuple[int, ...], str] = {}  # what a file is to the kernel -> its checksum, read once in a process


def _identity(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content; some 2 GB/s. A file that did not change is read once in a process."""
    identity = _identity(path.stat())
    if identity not in _read:
        content = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(functools.partial(file.read, 1 << 20), b""):
                content.update(block)
        _read[identity] = content.hexdigest()
    return _read[identity]


def unreadable(folder: Path) -> str | None:
    """Which JSON or safetensors file of a folder without checksums cannot be whole, in words; None if all may be."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        try:
            if path.suffix == ".json" and path.stat().st_size <= SMALL:
                read_json(path)
            elif path.suffix == ".safetensors" and path.is_file() and not _ends_where_it_says(path):
                return f"{name} is cut off"
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            return f"{name} is damaged: {error}"
    return None


def _ends_where_it_says(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size:
            return False
        tensors = json.loads(file.read(length))
    ends = [about["data_offsets"][1] for name, about in tensors.items() if name != "__metadata__"]
    return bool(8 + length + max(ends, default=0) == size)
