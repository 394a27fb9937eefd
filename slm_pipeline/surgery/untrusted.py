"""What plans and mergekit files may hold: they come from anywhere, and whatever is wrong in them is one line."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError

MAX_LAYERS = 10_000  # more than any model has; a file that names more is no plan


def is_layers(value: Any) -> bool:
    """Whether it is a list of layers, ascending; may be empty."""
    return (
        isinstance(value, list)
        and all(type(layer) is int and 0 <= layer < MAX_LAYERS for layer in value)
        and all(low < high for low, high in pairwise(value))
    )


def is_share(value: Any) -> bool:
    """Whether it is a number in [0, 1]."""
    return type(value) in (int, float) and 0 <= value <= 1


def is_word(value: Any) -> bool:
    """Whether it is a text of one line, maybe empty, that can be written anywhere."""
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


def short(value: Any) -> str:
    """The value in an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of so many digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and mappings are nested more than ``depth`` deep."""
    level = [value]
    for _ in range(depth):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a small file.

    Raises:
        UserError: it is missing, no file, larger, or not UTF-8.
    """
    try:
        if not path.is_file():
            problem = "it is not a file" if path.exists() else os.strerror(errno.ENOENT)
            raise UserError(f"cannot read {path}: {problem}")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise UserError(f"cannot read {path}: it has more than {max_bytes} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
