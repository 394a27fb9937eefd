"""Packing: against a naive search, and on every architecture the loss of packed rows against that of each example."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import random_source

from slm_pipeline.data.batches import Collator, blank, num_tokens, pack
from slm_pipeline.errors import UserError
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.recovery.lora import Lora


def rows_of(lengths, seed=0):
    """Random tokens; about half of them bear loss, the first never."""
    draw = random.Random(seed)
    rows = []
    for length in lengths:
        ids = [draw.randrange(256) for _ in range(length)]
        labels = [-100, ids[1], *(token if draw.random() < 0.5 else -100 for token in ids[2:])]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length})
    return rows


def test_pack_by_hand():
    """Capacity 7: 5 opens a row, 4 another, 3 fits behind 4 alone, 2 behind 5."""
    rows = [
        {"input_ids": list(range(first, first + length)), "labels": list(range(first, first + length))}
        for first, length in ((20, 2), (50, 5), (30, 3), (40, 4))
    ]
    assert pack(rows, 7) == [
        {
            "input_ids": [50, 51, 52, 53, 54, 20, 21],
            "labels": [-100, 51, 52, 53, 54, -100, 21],
            "position_ids": [0, 1, 2, 3, 4, 0, 1],
        },
        {
            "input_ids": [40, 41, 42, 43, 30, 31, 32],
            "labels": [-100, 41, 42, 43, -100, 31, 32],
            "position_ids": [0, 1, 2, 3, 0, 1, 2],
        },
    ]


def test_pack_is_best_fit_decreasing():
    """The plain search over all rows with room finds the same."""
    draw = random.Random(0)
    rows = rows_of([draw.randint(2, 60) for _ in range(300)])
    groups = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True):
        sizes = [sum(len(other["input_ids"]) for other in group) for group in groups]
        fitting = [i for i, size in enumerate(sizes) if size + len(row["input_ids"]) <= 64]
        if fitting:
            groups[max(fitting, key=lambda i: (sizes[i], -i))].append(row)
        else:
            groups.append([row])
    packed = pack(rows, 64)
    assert [row["input_ids"] for row in packed] == [sum((row["input_ids"] for row in group), []) for group in groups]
    assert sum(len(row["input_ids"]) for row in packed) == sum(len(row["input_ids"]) for row in rows)
    assert max(len(row["input_ids"]) for row in packed) == 64


@pytest.mark.parametrize("length", [1, 8])
def test_rows_that_cannot_be_packed(length):
    with pytest.raises(ValueError, match=f"a row of {length} tokens cannot be packed; 2 to 7 are allowed"):
        pack(rows_of([3]) + [{"input_ids": [0] * length, "labels": [0] * length}], 7)


def test_padding_on_the_right():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [8, 9], "labels": [8, 9], "attention_mask": [1, 1]},
    ]
    batch = Collator(pad_token_id=3)([*rows, blank(rows[0])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3], [0, 0, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]  # the first token always sees itself
    assert num_tokens(batch) == 5
    assert len(batch) == 3


def test_padding_of_packed_rows():
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [9, 3], "labels": [-100, 3], "position_ids": [0, 1]},
    ]
    batch = Collator(pad_token_id=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 3, 3]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 3, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert batch["use_cache"] is False
    assert num_tokens(batch) == 6
    assert len(batch) == 4


def summed_loss(model, batch):
    count = int((batch["labels"][:, 1:] != -100).sum())
    return float(model(**batch).loss) * count, count


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_rows_cost_what_the_examples_cost(any_model, architecture, use_cache):
    """Lengths 9, 7, 5, 4, 3, 3 in rows of at most 12, in training mode; sliding windows are set to 3 tokens.

    OPT's packed examples see each other, which is why packing is refused for it.
    """
    model = any_model.train()
    model.config.use_cache = use_cache
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 3
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 4  # so that what is attended to matters
    rows = rows_of([3, 9, 4, 7, 3, 5])
    packed = pack(rows, 12)
    assert [len(row["input_ids"]) for row in packed] == [12, 12, 7]
    collate = Collator(pad_token_id=0)
    with torch.no_grad():
        expected = [summed_loss(model, collate([row])) for row in rows]
        batch = collate(packed)
        assert num_tokens(batch) == 31 < batch["input_ids"].numel()
        loss, count = summed_loss(model, batch)
        del batch["position_ids"]
        blind, _ = summed_loss(model, batch)
    assert count == sum(number for _, number in expected)
    total = sum(part for part, _ in expected)
    assert abs(blind - total) > 1e-3
    assert (abs(loss - total) < 1e-4) == ARCHITECTURES[architecture].packs


@pytest.mark.parametrize("packed", [False, True])
def test_blank_rows_teach_nothing(any_model, packed):
    """Not even that a number is none: nothing may be attended to, which is where NaN would come from."""
    rows = rows_of([5, 7])
    batch = Collator(0)([blank(row) for row in (pack(rows, 12) if packed else rows)])
    assert int(num_tokens(batch)) == 0
    loss = any_model.train()(**batch, num_items_in_batch=torch.tensor(3)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in any_model.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in any_model.parameters())


def test_packing_is_refused_where_the_mask_would_be_wrong():
    with pytest.raises(UserError, match="recovery.packing=true: a opt model .* use recovery.packing=false"):
        Lora(packing=True).check(random_source("opt"), 4)
    Lora().check(random_source("opt"), 4)
    Lora(packing=True).check(random_source("gpt_neox"), 4)
