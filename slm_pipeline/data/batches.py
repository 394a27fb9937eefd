"""Rows of tokens as batches: packed, padded, counted."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from slm_pipeline.data.tokens import IGNORED, Row

if TYPE_CHECKING:
    from torch import Tensor


def pack(rows: Sequence[Row], cutoff_len: int) -> list[Row]:
    """Put whole rows together into fewer, longer ones, so that a batch has hardly any padding.

    Best fit decreasing: the longest first, each into the fullest row that has room for it. Nothing is random.

    Args:
        rows: of `tokens.tokenize_example`, each of 2 to ``cutoff_len`` tokens.
        cutoff_len: tokens that a packed row may have.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids`` of each packed row: equally long lists. Positions start at 0 with
        every row that was put in, from which transformers sees that none may attend to another; it looks at them only
        where there is no attention mask and no cache. The label of a first token is `IGNORED`: the token before it
        belongs to another row.

    Raises:
        ValueError: a row is too long or too short.
    """
    packed: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the packed row), sorted
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        if not 2 <= length <= cutoff_len:
            raise ValueError(f"a row of {length} tokens cannot be packed; 2 to {cutoff_len} are allowed")
        fullest = bisect_left(room, (length, 0))
        if fullest < len(room):
            left, number = room.pop(fullest)
        else:
            left, number = cutoff_len, len(packed)
            packed.append([])
        packed[number].append(row)
        insort(room, (left - length, number))
    positions = list(range(cutoff_len))  # shared: millions of tokens would each have an integer of their own
    return [
        {
            "input_ids": list(chain.from_iterable(row["input_ids"] for row in group)),
            "labels": list(chain.from_iterable([IGNORED, *row["labels"][1:]] for row in group)),
            "position_ids": list(chain.from_iterable(positions[: len(row["input_ids"])] for row in group)),
        }
        for group in packed
    ]


@dataclass(frozen=True)
class Collator:
    """Rows as a batch, padded on the right to the longest.

    The published recipe pads on the left, which changes no loss and no gradient: padding is masked, and positions are
    relative. But there the padding's own queries see nothing at all, which attention kernels may answer with NaN.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """``input_ids``, ``labels`` and ``attention_mask`` or ``position_ids``, each [rows, longest] int64.

        Padding of packed rows is at position 0 throughout, each token by itself. ``use_cache`` is False with them:
        given a cache, transformers would let every token attend to all before it.
        """
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        packed = "position_ids" in rows[0]
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED}
        padding["position_ids" if packed else "attention_mask"] = 0
        batch: dict[str, Any] = {}
        for name, value in padding.items():
            fill = [[value] * (longest - len(row[name])) for row in rows]
            pairs = zip(rows, fill, strict=True)
            batch[name] = torch.tensor([row[name] + more for row, more in pairs])
        return {**batch, "use_cache": False} if packed else batch


def blank(like: Row) -> Row:
    """A row without loss that counts no token, packed if ``like`` is.

    Unpacked it has one token in sight: a row without any would be queries that see nothing, see `Collator`.
    """
    values = {"input_ids": [0, 0], "labels": [IGNORED] * 2, "attention_mask": [1, 0], "position_ids": [0, 0]}
    return {name: values[name] for name in like}


def num_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Tokens of a batch of `Collator` without its padding: a number on the batch's device.

    A row of one token is blank: nothing can be learnt from one.
    """
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(dim=1)
        return cast("Tensor", (lengths * (lengths > 1)).sum())
    positions = batch["position_ids"]  # a row that was packed has one token at 1 and so one at 0; padding only has 0
    return cast("Tensor", (positions > 0).sum() + (positions == 1).sum())
