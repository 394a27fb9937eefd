"""The one error type that is shown to people without a traceback, how errors leave a process, and what is none."""

from __future__ import annotations

import difflib
import logging
import pickle
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_BREAKS = re.compile(r"\s*[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*")


class UserError(Exception):
    """Something the user can put right.

    The message is one line that says what is wrong, the value, and what is allowed. The console entry points
    print it as ``error: <message>`` and exit with status 2; in a multirun the job becomes a FAILED row.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean slm?)`` with those of ``known`` that a name is nearly; empty if it is none."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def portable(error: BaseException) -> BaseException:
    """The error if it can be sent to another process, else one that can and says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is rebuilt
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    return error


class Terminated(KeyboardInterrupt):
    """SIGTERM, which clusters and containers send: everything ends as after Ctrl-C."""


@contextmanager
def only_warned_about(what: str, said: set[str] | None = None) -> Iterator[None]:
    """Make an error inside a warning that begins with ``what``: for all that must not undo a finished result.

    Args:
        said: what was warned about before, and is not again.
    """
    try:
        yield
    except Exception as error:
        if said is None or what not in said:
            log.warning("%s: %s", what, printable(f"{type(error).__name__}: {error}"))
        if said is not None:
            said.add(what)


@contextmanager
def refused_in_one_line(what: str) -> Iterator[None]:
    """Turn whatever a library says against something of the user's into a `UserError` that begins with ``what``.

    Memory that ran out, and a wish to end, stay what they are.
    """
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        words = " ".join(str(error).split())
        if "can't allocate memory" in words or type(error).__name__ == "OutOfMemoryError":  # torch's, here unknown
            raise
        words = f"{words[:400]}..." if len(words) > 400 else words
        hint = "; model.trust_remote_code=true runs the code that it asks for" if "trust_remote_code" in words else ""
        raise UserError(f"{what}: {type(error).__name__}: {words}{hint}") from error


def printable(text: str) -> str:
    """One line that is safe on a terminal and in a file: a blank for each break, control characters spelt out.

    Among the latter are escape sequences, marks that turn the direction of writing, and what is no character at all
    (a file name that is not UTF-8 has such).
    """
    line = _BREAKS.sub(" ", text).strip()
    if line.isprintable():  # so that nearly all text is left alone
        return line
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c
        for c in line
    )
