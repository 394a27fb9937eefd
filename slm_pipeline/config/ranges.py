"""What the value of an option may be, declared with its type: ``seed: Seed = 1234``. `check` walks over all of them.

A range belongs to the type of a dataclass's field, as in ``Annotated[int, Range(at_least=1, below=5)]``; those that
recur have names here. A number without a range is a defect that a test finds. What holds between options is checked
where they are used.
"""

from __future__ import annotations

import math
import re
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from slm_pipeline.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers between two bounds; never NaN and never infinite."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))  # an int may be too large to ask
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def requirement(self, value: float) -> str:
        """What a value outside should have been, as in ``be at least 1``."""
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if isinstance(value, float) and low is not None and high is not None:
            return f"lie in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        bounds = " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)
        finite = isinstance(value, int) or math.isfinite(value)
        return f"be {bounds}" if finite else f"be a finite number {bounds}".rstrip()


@dataclass(frozen=True)
class Text:
    """One line of UTF-8 text: no control characters.

    Attributes:
        at_most: bytes.
        lines: several lines are allowed.
        empty: no character at all is allowed.
    """

    at_most: int = 10_000
    lines: bool = False
    empty: bool = True

    def fault(self, value: str) -> str | None:
        """What is wrong with ``value``; None if nothing is."""
        if not value and not self.empty:
            return "must not be empty"
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            return f"is not text: {value[error.start]!r} is half a character"
        if size > self.at_most:
            return f"has {size} bytes; at most {self.at_most} are allowed"
        if found := re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]" if self.lines else r"[\0-\x1f\x7f-\x9f]", value):
            return f"must not have the control character {found[0]!r}"
        return None


@dataclass(frozen=True)
class PathText(Text):
    """What Linux takes for a path: names of at most 255 bytes, 4095 in all."""

    at_most: int = 4095
    empty: bool = False

    def fault(self, value: str) -> str | None:
        if fault := super().fault(value):
            return fault
        longest = max(len(part.encode()) for part in value.split("/"))
        return f"has a name of {longest} bytes; at most 255 are allowed" if longest > 255 else None


@dataclass(frozen=True)
class NameText(Text):
    """The name of one folder, that no shell or program takes for something else."""

    at_most: int = 200  # what a W&B run or a file beside it adds has room
    empty: bool = False

    def fault(self, value: str) -> str | None:
        if fault := super().fault(value):
            return fault
        if "/" in value or value[0] in ".-~" or value != value.strip():
            return "must be a folder name without a slash, and neither begin with . - ~ nor begin or end with a blank"
        return None


Seed = Annotated[int, Range(at_least=0, below=2**32)]  # what every random generator here takes
Count = Annotated[int, Range(at_least=1, below=2**31)]
CountOrZero = Annotated[int, Range(at_least=0, below=2**31)]
Tokens = Annotated[int, Range(at_least=1, at_most=2**20)]  # in a row: the longest context that a model has
TotalTokens = Annotated[int, Range(at_least=1, below=2**63)]
BatchSize = Annotated[int, Range(at_least=1, at_most=2**16)]
NumLayers = Annotated[int, Range(at_least=1, at_most=10_000)]  # ten times as many as any model has
NumLayersOrZero = Annotated[int, Range(at_least=0, at_most=10_000)]
NumProcesses = Annotated[int, Range(at_least=1, at_most=256)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, below=1)]
UpToOne = Annotated[float, Range(at_least=0, at_most=1)]
FilePath = Annotated[str, PathText()]
FolderName = Annotated[str, NameText()]


def check(options: Any, prefix: str = "") -> None:
    """Check every value of a dataclass of options, those inside it too, against what its field's type declares.

    Beside the declared ranges: texts without a declaration are `Text`, and nothing stands twice in a list.

    Args:
        options: an instance; its values have the types that it declares.
        prefix: what the options' names begin with, such as ``recovery.``.

    Raises:
        UserError: a value that is not allowed, with the option's whole name.
    """
    for name, hint in declared(type(options)).items():
        _check(getattr(options, name), hint, prefix + name)


def declared(options: Any) -> Mapping[str, Any]:
    """The type of each field, with the ranges in it."""
    hints = get_type_hints(options, include_extras=True)
    return {option.name: hints[option.name] for option in fields(options)}


def numbers_without_a_range(options: Any, prefix: str = "") -> Iterator[str]:
    """Names of the fields, those inside others too, that hold a number of which no range is declared."""
    for name, hint in declared(options).items():
        for kind, allowed in _kinds(hint):
            if is_dataclass(kind):
                yield from numbers_without_a_range(kind, f"{prefix}{name}.")
            elif kind in (int, float) and not isinstance(allowed, Range):
                yield prefix + name


def _kinds(hint: Any, allowed: Any = None) -> Iterator[tuple[Any, Any]]:
    """The types that a hint is made of, each with what it is annotated with."""
    if get_origin(hint) is Annotated:
        yield from _kinds(hint.__origin__, hint.__metadata__[0])
    elif inner := get_args(hint):
        for part in inner:
            yield from _kinds(part)
    else:
        yield hint, allowed


def split(hint: Any) -> tuple[Any, Any]:
    """A declared type, without None, and what it is annotated with."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return (hint.__origin__, hint.__metadata__[0]) if get_origin(hint) is Annotated else (hint, None)


def _check(value: Any, hint: Any, option: str) -> None:
    if value is None:
        return
    hint, allowed = split(hint)
    if isinstance(value, (list, dict)) and get_origin(hint) is not type(value) and hint is not Any:
        raise UserError(f"{option}={short(value)} is not one value")  # OmegaConf lets lists stand in lists of texts
    if is_dataclass(hint):
        check(value, f"{option}.")
    elif isinstance(value, list) and get_args(hint):
        for item in value:
            _check(item, get_args(hint)[0], option)
        for item, count in Counter(value).items():
            if count > 1:
                raise UserError(f"{option}={short(value)} has {item!r} twice")
    elif isinstance(value, dict) and get_args(hint):
        for key, item in value.items():
            _check(key, get_args(hint)[0], option)
            _check(item, get_args(hint)[1], f"{option}.{key}")
    elif isinstance(value, (int, float)) and value not in (allowed := allowed or Range()):
        raise UserError(f"{option}={short(value)} must {allowed.requirement(value)}")
    elif isinstance(value, str) and (fault := (allowed or Text()).fault(value)):
        raise UserError(f"{option}={short(value)} {fault}")


def short(value: Any) -> str:
    """A value in a message of one line: as Python writes it, the middle of a long one left out."""
    if isinstance(value, int) and abs(value) >= 10**50:  # Python refuses to write some of them
        return f"about {'-' if value < 0 else ''}10**{math.floor(math.log10(abs(value)))}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}"
