"""How alike a pruned model's final states are to the dense model's: what ``method.similarity`` chooses from.

A plugin adds one when it is imported: ``SIMILARITIES["mine"] = Similarity(my_measure)``. No torch in this module, which
checks options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.view import ModelView


@dataclass(frozen=True)
class Similarity:
    """How alike two models' final-normed states are.

    Attributes:
        measure: (view, dense, pruned), both [batch, length, d] -> [batch] float32.
        of_mean: turns the mean of the measure over all samples into the similarity, at most 1.
    """

    measure: Callable[[ModelView, Tensor, Tensor], Tensor]
    of_mean: Callable[[float], float] = float


def flattened_cosine(view: ModelView, dense: Tensor, pruned: Tensor) -> Tensor:
    """Cosine of all of a sample's states as one vector, as published."""
    import torch

    return torch.cosine_similarity(dense.float().flatten(1), pruned.float().flatten(1), dim=-1)


def last_token_cosine(view: ModelView, dense: Tensor, pruned: Tensor) -> Tensor:
    """Cosine of the last token's state."""
    import torch

    return torch.cosine_similarity(dense[:, -1].float(), pruned[:, -1].float(), dim=-1)


def per_token_cosine(view: ModelView, dense: Tensor, pruned: Tensor) -> Tensor:
    """Mean over tokens of the cosine of each token's state."""
    import torch

    return torch.cosine_similarity(dense.float(), pruned.float(), dim=-1).mean(dim=1)


def kl_divergence(view: ModelView, dense: Tensor, pruned: Tensor) -> Tensor:
    """KL(dense || pruned) of the next-token distributions in nats, averaged over tokens."""
    import torch

    values = []
    for dense_row, pruned_row in zip(dense, pruned, strict=True):  # one sample's logits at a time bounds the memory
        reference = view.logits(dense_row).float().log_softmax(dim=-1)
        candidate = view.logits(pruned_row).float().log_softmax(dim=-1)
        values.append((reference.exp() * (reference - candidate)).sum(dim=-1).mean())
    return torch.stack(values)


SIMILARITIES: dict[str, Similarity] = {
    "final_hidden": Similarity(flattened_cosine),
    "last_token": Similarity(last_token_cosine),
    "per_token": Similarity(per_token_cosine),
    "logits_kl": Similarity(kl_divergence, of_mean=lambda divergence: math.exp(-divergence)),
}
