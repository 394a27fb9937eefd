"""JSON files of a model folder, which anybody may have written."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """The content of a JSON file as transformers reads it.

    Raises:
        ValueError: what is wrong with it, in words that follow its name.
    """
    if problem := file_problem(file):
        raise ValueError(problem)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is UTF-16; transformers reads UTF-8")
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("begins with a byte order mark, which transformers does not read: save it without one")
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error


def file_problem(file: Path) -> str | None:
    """Why ``file`` cannot be read, in words that follow its name; None if it can."""
    if file.is_symlink() and not file.exists():
        return f"is a link to {os.readlink(file)}, which is not there"
    if not file.exists():
        return "is not there"
    if file.is_dir():
        return "is a folder"
    if not file.is_file():
        return "is not a regular file"
    if not os.access(file, os.R_OK):
        return "may not be read by you"
    return None if file.stat().st_size else "is empty"
