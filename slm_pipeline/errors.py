"""The one error type that is shown to people without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right.

    The message is one line that says what is wrong, the value, and what is allowed. The console entry points
    print it as ``error: <message>`` and exit with status 2; in a multirun the job becomes a FAILED row.
    """
