"""Data sets of the Hugging Face hub, and folders in a hub's layout that stand for them: what they are, and their rows.

datasets looks for a folder of the repository's name in the working directory first, then on the hub, then among what it
has prepared before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError
from slm_pipeline.machine import network
from slm_pipeline.store.checksums import digest

MAX_HASHED = 1 << 26  # bytes of a folder that are read to tell it from another; below that: all
_BLOCK = 1 << 16
_TIMEOUT = 20.0  # seconds


def identity(repo: str, option: str, instead: str, *, files: str = "**/*", revision: str = "main") -> str:
    """What identifies a data set: "REPO@COMMIT", or of a local folder "folder:" and a hash of its files.

    Args:
        repo: owner/name, or a folder.
        option: what named it, for messages.
        instead: what else there is, for the message that neither hub nor cache has it.
        files: pattern of the files that are read from a folder.
        revision: on the hub: commit, tag or branch.

    Raises:
        UserError: neither the hub nor the local cache has it.
    """
    folder = Path(repo)
    if folder.is_dir():
        return f"folder:{files_digest(folder, sorted(file for file in folder.glob(files) if file.is_file()))}"
    return f"{repo}@{commit(repo, option, instead, revision=revision)}"


def files_digest(folder: Path, files: Iterable[Path]) -> str:
    """Names, sizes and content of files below ``folder``: whole, or of more than `MAX_HASHED` bytes evenly spaced
    blocks, among them the first and the last of every file."""
    files = list(files)
    total = sum(file.stat().st_size for file in files)
    share = MAX_HASHED // max(1, len(files)) if total > MAX_HASHED else None
    return digest({file.relative_to(folder).as_posix(): _content(file, share) for file in files})


def _content(file: Path, share: int | None) -> list[Any]:
    size = file.stat().st_size
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        if share is None or size <= max(share, 2 * _BLOCK):
            while block := stream.read(1 << 20):
                found.update(block)
        else:
            count = max(2, share // _BLOCK)
            for number in range(count):
                stream.seek(number * (size - _BLOCK) // (count - 1))
                found.update(stream.read(_BLOCK))
    return [size, found.hexdigest()]


def commit(repo: str, option: str, instead: str, *, revision: str = "main") -> str:
    """The commit of a data set on the hub; where that cannot be reached, of what datasets would take from its cache.

    Raises:
        UserError: neither has it.
    """
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        if not network.hub_answers():
            raise OSError(f"{network.hub()} does not answer")
        found = HfApi().dataset_info(repo, revision=revision, timeout=_TIMEOUT, expand=["sha"]).sha
        assert found is not None
        return found
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and not _of_the_network(error):
            raise
        if cached := _prepared(repo) or _reference(repo, revision):
            return cached
        raise _unreachable(repo, option, instead, error) from error


def load(repo: str, option: str, instead: str, **options: Any) -> Any:
    """``datasets.load_dataset``.

    Raises:
        UserError: it cannot be had or read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(repo, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _unreachable(repo, option, instead, error.__cause__ or error) from error


def column(rows: Any, name: str, option: str) -> Any:
    """A column of a loaded split, read as it is asked for.

    Raises:
        UserError: there is no such column.
    """
    if name not in rows.column_names:
        raise UserError(f"{option} has no column {name}; it has {', '.join(rows.column_names)}")
    return rows[name]


def _of_the_network(error: Exception) -> bool:
    """Whether it is one of httpx, under whichever name huggingface_hub has that; not all are an `OSError`."""
    return type(error).__module__.startswith(("httpx", "httpcore"))


def _prepared(repo: str) -> str | None:
    """The commit of what datasets has prepared last and falls back to: CACHE/owner___name/config/version/COMMIT."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = repo.rpartition("/")
    names = filter(None, [owner, camelcase_to_snakecase(name)])
    folder = Path(config.HF_DATASETS_CACHE).expanduser() / "___".join(names)
    prepared = [path for path in folder.glob("*/*/*") if path.is_dir() and not path.name.endswith(".incomplete")]
    return max(prepared, key=lambda path: path.stat().st_mtime).name if prepared else None


def _reference(repo: str, revision: str) -> str | None:
    """The commit that a revision had when a file of it was last downloaded."""
    from huggingface_hub import constants

    file = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "refs" / revision
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _unreachable(repo: str, option: str, instead: str, error: BaseException) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if Path(repo).is_dir():
        return UserError(f"{option}: {repo} cannot be read: {reason}")
    return UserError(
        f"{option}: {repo} is no local folder and cannot be had from the hub or its cache ({reason}); without a hub"
        f" use {instead}"
    )
