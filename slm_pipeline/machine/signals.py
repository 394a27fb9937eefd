"""SIGINT and SIGTERM, heard even where Python swallows what their handler raises."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slm_pipeline.errors import Terminated

_ERRORS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_UNTOUCHED = (signal.SIG_DFL, signal.default_int_handler)

_heard: list[int] = []


@contextmanager
def raised() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at SIGINT and `Terminated` at SIGTERM.

    Unless somebody else takes care of the signal, as submitit does.
    """
    _heard.clear()
    before = {number: signal.getsignal(number) for number in _ERRORS}
    ours = [number for number, handler in before.items() if handler in _UNTOUCHED]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        _heard.clear()  # it has been dealt with: what this process does next does not end for it


def raise_if_heard() -> None:
    """Raise again for a signal that came while the garbage collector called something: there, errors are dropped."""
    if _heard:
        raise _ERRORS[_heard[-1]]


def _raise(number: int, _: Any) -> None:
    _heard.append(number)
    raise_if_heard()
