"""SIGINT and SIGTERM, heard even where Python swallows what their handler raises."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slm_pipeline.errors import Terminated

_ERRORS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_UNTOUCHED = (signal.SIG_DFL, signal.default_int_handler)

_heard: list[int] = []
_replaced: dict[int, Any] = {}  # signal -> the handler in whose place ours stands
_forking = threading.local()


@contextmanager
def raised() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at SIGINT and `Terminated` at SIGTERM.

    Unless somebody else takes care of the signal, as submitit does. A process that is forked inside ends by a signal as
    any other does: it has nothing to keep, and whoever forked it may wait for its end, as multiprocessing's pools do.
    """
    _heard.clear()
    before = {number: signal.getsignal(number) for number in _ERRORS}
    ours = {number: handler for number, handler in before.items() if handler in _UNTOUCHED}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    _replaced.update(ours)
    for number in ours:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
            _replaced.pop(number, None)  # a forked process has none any more
        _heard.clear()  # it has been dealt with: what this process does next does not end for it


def raise_if_heard() -> None:
    """Raise again for a signal that came while the garbage collector called something: there, errors are dropped."""
    if _heard:
        raise _ERRORS[_heard[-1]]


def _raise(number: int, _: Any) -> None:
    _heard.append(number)
    raise_if_heard()


def _hold() -> None:
    """Before a fork: what comes now waits. The child's first steps are callbacks such as `_as_before`; an error that a
    handler raises there is dropped, and the signal with it."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _replaced)


def _go_on() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _as_before() -> None:
    """In the child: the handlers that ours replaced, and whatever has come since the fork."""
    for number, handler in _replaced.items():
        if signal.getsignal(number) is _raise:
            signal.signal(number, handler)
    _replaced.clear()
    _heard.clear()
    _go_on()


os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_as_before)
