"""How far something is that takes its time: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from slm_pipeline.machine import ranks
from slm_pipeline.show.numerals import duration

AFTER = 10.0  # seconds before the first line in a log; what is done by then needs none
EVERY = 30.0  # seconds between two
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}, {remaining} left{postfix}"

log = logging.getLogger(__name__)


class ProgressBar(tqdm):
    """A `tqdm` that says what is done, k of n, and the time left, whoever reads it.

    On a terminal it is a bar that is gone when it is done, and log lines stand above it (see `TerminalHandler`). Where
    standard error is no terminal, it is a line in the log every `EVERY` seconds, of what lasts longer than `AFTER`; the
    log file of a run on a terminal gets these lines too.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, desc: str | None = None, **options: Any) -> None:
        """As `tqdm`. ``disable`` is for who is not to say anything, as all processes are but the first of several."""
        self._on_terminal = sys.stderr.isatty()
        self._next_line = time.monotonic() + AFTER
        options["disable"] = bool(options.get("disable")) or not ranks.is_first()
        # the time left goes by all that is done: steps that were quick or slow for once would make it jump
        options |= {"leave": False, "file": sys.stderr, "smoothing": 0}
        if self._on_terminal:
            options |= {
                "bar_format": _BAR if _has_length(iterable, options) else None,
                "dynamic_ncols": True,
            }
        else:  # looked at every second, and shown by `display`
            options |= {"mininterval": 1.0, "delay": AFTER}
        super().__init__(iterable, desc, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm whenever there may be something new; ``msg`` is empty when the bar is taken away."""
        if msg is None and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + EVERY
            log.log(logging.DEBUG if self._on_terminal else logging.INFO, "%s", self.words())
        if self._on_terminal:
            super().display(msg, pos)

    def close(self) -> None:
        shown = self._on_terminal and not self.disable
        super().close()
        if shown:
            sys.stderr.write("\r")  # tqdm leaves the cursor behind a bar that it took away from under another

    def words(self) -> str:
        """``slm search: 120 of 800 windows, 3 min left``."""
        known = self.format_dict
        done, total, elapsed = known["n"], known["total"], known["elapsed"]
        unit = "" if known["unit"] == "it" else f" {known['unit']}s"
        if not total:
            return f"{self.desc or 'working'}: {done}{unit} in {duration(elapsed)}"
        fresh = done - known["initial"]
        left = f", {duration(elapsed / fresh * (total - done))} left" if fresh else ""
        return f"{self.desc or 'working'}: {done} of {total}{unit}{left}"


class TerminalHandler(logging.StreamHandler):
    """Writes log lines above whatever bars there are."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _has_length(iterable: Any, options: dict[str, Any]) -> bool:
    return options.get("total") is not None or hasattr(iterable, "__len__")
