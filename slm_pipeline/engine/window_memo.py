"""What searches have measured, on disk: a window that one job of a study has evaluated, no other evaluates again.

A file belongs to one dense model, one set of calibration samples, one merge rule and one similarity: it lies in the
calibration's folder, and is lost and removed with it. Whoever searches holds the file's lock. Jobs that search at the
same time take turns, and the later ones find most of what they need. Every line has a checksum of its own.
"""

from __future__ import annotations

import errno
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from slm_pipeline.store.checksums import digest
from slm_pipeline.store.files import write_text

log = logging.getLogger(__name__)

VERSION = 2  # raised when a window's similarity changes, or a line; 2: lines have checksums

Stack = tuple[Any, ...]  # of groups, see `slm_pipeline.engine.windows.Group`


class WindowMemo:
    """Stack -> similarity, read with ``in`` and ``[]``; what `add` is given is on disk when it returns.

    Args:
        file: open for appending a line ``[stack, similarity, checksum]`` for each; None keeps them in memory alone.
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
            self._file.write(json.dumps([stack, similarity, digest([stack, similarity])], allow_nan=False) + "\n")
            self._file.flush()


@dataclass(frozen=True)
class WindowMemos:
    """The memos of all searches on one model and one set of samples.

    Attributes:
        folder: where their files lie; None: each is in memory, and lost with its search.
        afresh: forget what is known.
    """

    folder: Path | None = None
    afresh: bool = False

    @contextmanager
    def open(self, rule: str, similarity: str) -> Iterator[WindowMemo]:
        """The memo of all searches with this rule and similarity, for this one alone until the block ends."""
        if self.folder is None:
            yield WindowMemo()
            return
        path = self.folder / f"windows_v{VERSION}_{rule}_{similarity}.jsonl"
        try:
            lock, file, known = _open(path, afresh=self.afresh)
        except OSError as error:
            log.warning("%s cannot be used (%s): this search evaluates every window itself", path, error.strerror)
            yield WindowMemo()
            return
        with lock, file:
            yield WindowMemo(known, file)


def _open(path: Path, *, afresh: bool) -> tuple[Any, TextIO, dict[Stack, float]]:
    """The lock, held, the file, open for appending, and what it knows."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.info("another job searches with the same samples and rule: waiting for what it finds")
        held = lock.acquire()
    try:
        if afresh:
            path.unlink(missing_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a file")
        known = _read(path)
        return held, open(path, "a", encoding="utf-8"), known
    except OSError:
        lock.release()
        raise


def _read(path: Path) -> dict[Stack, float]:
    """What all good lines say; the others are cut out: half of the last one, left by a job that was killed while
    writing it, without a word, damaged ones with a warning."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    lines = text.split(b"\n")
    rows = {line: row for line in lines[:-1] if (row := _parse(line)) is not None}
    if damaged := len(lines) - 1 - sum(line in rows for line in lines[:-1]):
        log.warning("%s: %d damaged lines are not believed; their windows are evaluated again", path, damaged)
    if damaged or lines[-1]:
        write_text(path, "".join(line.decode() + "\n" for line in rows))
    return dict(rows.values())


def _parse(line: bytes) -> tuple[Stack, float] | None:
    """None for a line whose checksum does not fit."""
    try:
        stack, similarity, checksum = json.loads(line)
        if checksum == digest([stack, similarity]) and math.isfinite(similarity):
            return _tuples(stack), similarity
    except (ValueError, TypeError, RecursionError):
        pass
    return None


def _tuples(stack: Any) -> Any:
    return tuple(_tuples(member) for member in stack) if isinstance(stack, list) else stack
