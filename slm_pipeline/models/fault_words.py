"""What is wrong with a model's tensors and tokens, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def lacking(names: Iterable[str]) -> str:
    """Words for tensors that are missing."""
    names = list(names)
    return f"its files lack {_count(names)} of the model that config.json describes: {tensor_names(names)}"


def unequal(shapes: Mapping[str, tuple[Iterable[int], Iterable[int | None]]]) -> list[str]:
    """Words for tensors of another shape; ``shapes``: in the files, and as config.json has it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (found, expected) in shapes.items():
        groups.setdefault((_shape(found), _shape(expected)), []).append(name)
    return [
        f"its files hold {tensor_names(names)} as {found}, config.json says {expected}"
        for (found, expected), names in groups.items()
    ]


def _shape(sizes: Iterable[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"


def not_finite(names: Iterable[str], dtype: str) -> str:
    """Words for tensors with a value that is NaN or infinite."""
    return f"not every value of {tensor_names(names)} is a finite number in {dtype.removeprefix('torch.')}"


def not_used(place: str, names: Iterable[str]) -> str:
    """Words for tensors of the files that are not part of the model."""
    names = list(names)
    return f"{place}: the model has no place for {_count(names)} of its files, not used: {tensor_names(names)}"


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def more_tokens(num_tokens: int, rows: int) -> str:
    """Words for token ids that have no embedding."""
    return f"its tokenizer has token ids up to {num_tokens - 1}, its embedding only {rows} rows"


def tensor_names(names: Iterable[str]) -> str:
    """Tensor names in short, those of several layers as one: ``model.layers.8-11.mlp.up_proj.weight``."""
    layers: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        first, number, rest = (*re.split(r"\.([0-9]{1,9})\.", name, maxsplit=1), "", "")[:3]
        layers.setdefault((first, rest) if number else (first,), set()).update([int(number)] if number else [])
    shown = [
        f"{parts[0]}.{_ranges(sorted(numbers))}.{parts[1]}" if numbers else parts[0]
        for parts, numbers in layers.items()
    ]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3,7``."""
    starts = [n for index, n in enumerate(numbers) if index == 0 or numbers[index - 1] != n - 1]
    ends = [n for index, n in enumerate(numbers) if index == len(numbers) - 1 or numbers[index + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
