"""This package's warnings, kept with what they are about: of a run, of a stage's result, of work that goes on later."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

FILE = "warnings.jsonl"  # of unfinished work: a line for each, which a later attempt reads
_PACKAGE = "slm_pipeline"


class Heard(logging.Handler):
    """A context in which this package's warnings are kept, each once, in the order in which they are said.

    Attributes:
        messages: what was said.
    """

    def __init__(self, file: Path | None = None):
        """``file``: where they are also written, line by line; what is there already counts as said."""
        super().__init__(logging.WARNING)
        self.messages = _read(file) if file is not None else []
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            return  # the other handlers say so
        if record.levelno == logging.WARNING and message not in self.messages:
            self.messages.append(message)
            if self._file is not None:
                with suppress(OSError):  # a full disk has an error of its own
                    note(self._file, [message])

    def __enter__(self) -> Heard:
        logging.getLogger(_PACKAGE).addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger(_PACKAGE).removeHandler(self)


def note(file: Path, messages: Iterable[str]) -> None:
    """Add lines to a file of warnings."""
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(f"{json.dumps(message)}\n" for message in messages)


def _read(file: Path) -> list[str]:
    """The warnings in a file, as far as its lines are whole."""
    found: list[str] = []
    with suppress(OSError, UnicodeDecodeError):
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(str(json.loads(line)))
    return list(dict.fromkeys(found))
