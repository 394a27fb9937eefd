"""What ``slm-analyze similarity`` can compare two layers by, beside CKA: a number for each token, averaged.

A plugin adds one when it is imported: ``TOKEN_METRICS["mine"] = TokenMetric("mine", "what it is, in words", measure)``.
No torch in this module, which checks options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenMetric:
    """A similarity of every two of a token's states.

    Attributes:
        label: its name in tables and at the colours of a map.
        words: what its numbers are.
        measure: L + 1 states, [batch, length, d] each, perhaps on several devices -> [batch, length, L + 1, L + 1], at
            most 1.
    """

    label: str
    words: str
    measure: Callable[[Sequence[Tensor]], Tensor]


def cosines(states: Sequence[Tensor]) -> Tensor:
    """See `slm_pipeline.engine.statistics.token_cosines`."""
    from slm_pipeline.engine.statistics import token_cosines

    return token_cosines(states)


TOKEN_METRICS: dict[str, TokenMetric] = {
    "cosine": TokenMetric("cosine similarity", "cosine similarity of a token's states, mean over tokens", cosines)
}
