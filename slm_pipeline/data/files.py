"""Files that people bring: text, and rows of JSON and parquet. What is wrong in one is said with its file and row."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError, printable

_FORMATS = {b"\x1f\x8b": "compressed with gzip", b"PAR1": "a parquet file", b"PK\x03\x04": "a zip archive"}
_BOM = "\ufeff"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, printable, and cut short."""
    return _short.repr(value)


def listed(names: Iterable[Any]) -> str:
    """Names of columns as a message lists them; of very many the first ones."""
    names = [name if isinstance(name, str) and name.isprintable() else shown(name) for name in names]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def read_bytes(file: Path, option: str = "") -> bytes:
    """The whole file. ``option``: what named it, for messages.

    Raises:
        UserError: it is no regular file, or cannot be read.
    """
    where = f"{option}: {file}" if option else str(file)
    if file.is_dir():
        raise UserError(f"{where} is a folder, not a file")
    if file.exists() and not file.is_file():  # a pipe or a device may never end
        raise UserError(f"{where} is not a regular file")
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from error


def read_text(file: Path, option: str = "") -> str:
    """The file as it is, newlines and a byte order mark too.

    Raises:
        UserError: as `read_bytes`, or it is not UTF-8.
    """
    content = read_bytes(file, option)
    where = f"{option}: {file}" if option else str(file)
    for magic, name in _FORMATS.items():
        if content.startswith(magic):
            raise UserError(f"{where} is {name}, not UTF-8 text")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text: {error.reason} at byte {error.start} ({error.object[error.start]:#04x})"
        ) from error


def with_plain_newlines(text: str) -> str:
    """A text whose lines end with \\n, whatever ended them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_rows(file: Path) -> list[tuple[str, Any]]:
    """The rows of a .json (a list; also rows of a line each) or .jsonl (a row a line) file.

    Blank lines and a byte order mark are passed over.

    Returns:
        For each row where it stands ("FILE, line 3", "FILE, row 3" in a list) and what it is: any JSON value, NaN
        included.

    Raises:
        UserError: as `read_text`, or it is not JSON.
    """
    text = with_plain_newlines(read_text(file).removeprefix(_BOM))
    if file.suffix == ".json" and text.strip():
        try:
            rows = _parse(text)
        except ValueError as error:
            if not str(error).startswith("Extra data"):
                raise UserError(f"{file} is not valid JSON: {error}") from error
        else:
            if not isinstance(rows, list):
                raise UserError(f"{file} holds a JSON {type(rows).__name__}, not a list of rows")
            return [(f"{file}, row {number}", row) for number, row in enumerate(rows, start=1)]
    found = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a string may have other line ends
        if line.strip():
            try:
                found.append((f"{file}, line {number}", _parse(line)))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{file}, line {number} is not valid JSON: {error.msg} at column {error.colno}"
                ) from error
            except ValueError as error:
                raise UserError(f"{file}, line {number} is not valid JSON: {error}") from error
    return found


def parquet_rows(file: Path, columns: Sequence[str]) -> list[tuple[str, Any]]:
    """The rows of a parquet file, each with where it stands ("FILE, row 3"): dicts of those of ``columns`` it has.

    Raises:
        UserError: as `read_bytes`, it cannot be read as parquet, or has one of the columns twice.
    """
    import pyarrow
    import pyarrow.parquet

    content = read_bytes(file)
    try:
        parquet = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = parquet.schema_arrow.names
        if twice := [column for column in columns if names.count(column) > 1]:
            raise UserError(f"{file} has the column {twice[0]} twice")
        rows = parquet.read(columns=[column for column in columns if column in names]).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read as parquet: {printable(reason)}") from error
    return [(f"{file}, row {number}", row) for number, row in enumerate(rows, start=1)]


def check_text(value: Any, where: str, *, empty: bool = False) -> None:
    """Raise `UserError` unless ``value`` is a string that a tokenizer takes. ``empty``: it may be blank."""
    if not isinstance(value, str):
        raise UserError(f"{where} must be a string, got {shown(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} has {value[error.start]!r} at character {error.start}, half of a surrogate pair, which is no"
                " text"
            ) from error
    if not (empty or value.strip()):
        raise UserError(f"{where} is {shown(value)}; it must not be empty")


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {shown(twice)} twice")
    return found
