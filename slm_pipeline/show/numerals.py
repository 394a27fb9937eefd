"""How numbers are written for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A stretch of time, as people say it: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def count(number: int) -> str:
    """A number of parameters or tokens: 6.74B, 134.5M, or in full below a million."""
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else str(number)


def counts(one: int, other: int) -> tuple[str, str]:
    """Two that are compared, as `count` says them; in full where the reader could not tell them apart."""
    shown = count(one), count(other)
    return (str(one), str(other)) if shown[0] == shown[1] and one != other else shown
