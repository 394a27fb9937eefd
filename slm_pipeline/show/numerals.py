"""How numbers are written for people."""

from __future__ import annotations


def count(number: int) -> str:
    """A number of parameters or tokens: 6.74B, 134.5M, or in full below a million."""
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else str(number)
