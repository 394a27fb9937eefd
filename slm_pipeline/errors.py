"""The one error type that is shown to people without a traceback, and how errors leave a process."""

from __future__ import annotations

import pickle


class UserError(Exception):
    """Something the user can put right.

    The message is one line that says what is wrong, the value, and what is allowed. The console entry points
    print it as ``error: <message>`` and exit with status 2; in a multirun the job becomes a FAILED row.
    """


def portable(error: BaseException) -> BaseException:
    """The error if it can be sent to another process, else one that can and says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is rebuilt
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    return error
