"""What searches have measured, on disk: a window that one job of a study has evaluated, no other evaluates again.

A file belongs to one dense model, one set of calibration samples, one merge rule and one similarity: it lies in the
calibration's folder, and is lost and removed with it. Whoever searches holds the file's lock. Jobs that search at the
same time take turns, and the later ones find most of what they need.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

VERSION = 1  # raised when a window's similarity changes

Stack = tuple[Any, ...]  # of groups, see `slm_pipeline.engine.windows.Group`


class WindowMemo:
    """Stack -> similarity, read with ``in`` and ``[]``; what `add` is given is on disk when it returns.

    Args:
        file: open for appending a line ``[stack, similarity]`` for each; None keeps them in memory alone.
    """

    def __init__(self, known: dict[Stack, float] | None = None, file: TextIO | None = None):
        self._known = {} if known is None else known
        self._file = file

    def __contains__(self, stack: Stack) -> bool:
        return stack in self._known

    def __getitem__(self, stack: Stack) -> float:
        return self._known[stack]

    def __len__(self) -> int:
        return len(self._known)

    def add(self, stack: Stack, similarity: float) -> None:
        """Keep a finite similarity."""
        self._known[stack] = similarity
        if self._file is not None:
            self._file.write(json.dumps([stack, similarity], allow_nan=False) + "\n")
            self._file.flush()


@contextmanager
def open_memo(folder: Path | None, rule: str, similarity: str, *, afresh: bool = False) -> Iterator[WindowMemo]:
    """The memo of all searches with this rule and similarity, for this one alone until the block ends.

    Args:
        folder: where the files of this model and these samples lie; None for a memo in memory.
        afresh: forget what is known.
    """
    if folder is None:
        yield WindowMemo()
        return
    path = folder / f"windows_v{VERSION}_{rule}_{similarity}.jsonl"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another job searches with the same samples and rule: waiting for what it finds")
        lock.acquire()
    try:
        if afresh:
            path.unlink(missing_ok=True)
        known = _read(path)
        with open(path, "a", encoding="utf-8") as file:
            yield WindowMemo(known, file)
    finally:
        lock.release()


def _read(path: Path) -> dict[Stack, float]:
    """All whole lines; half of one, left by a job that was killed while writing it, is cut off."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    rows = [json.loads(line) for line in whole.splitlines()]
    return {_tuples(stack): similarity for stack, similarity in rows}


def _tuples(stack: Any) -> Any:
    return tuple(_tuples(member) for member in stack) if isinstance(stack, list) else stack
