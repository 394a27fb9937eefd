"""Recovery by training every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.recovery.base import RecoveryProblem, RecoveryResult
from slm_pipeline.recovery.fine_tuning import FineTuning

if TYPE_CHECKING:
    from slm_pipeline.models.sizes import Sizes


@dataclass(kw_only=True)
class Full(FineTuning):
    """Every parameter of the pruned model trains on the language-model loss, embedding and head among them.

    Weights, gradients and AdamW's two moments are float32, and autocast keeps a copy in 16 bits: 18 bytes a parameter,
    beside the activations.
    """

    learning_rates: ClassVar[tuple[float, float]] = (5e-4, 2e-5)  # the latter is Stanford Alpaca's
    name: ClassVar[str] = "full"

    def memory(self, sizes: Sizes) -> int:
        return self.training(sizes, sizes.parameters) + self.activations(sizes)

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        """Train; leaves nothing in ``out`` but checkpoints."""
        return self.train_modules(problem, [problem.model])
