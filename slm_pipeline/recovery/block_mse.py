"""LLM-Streamline's replacement layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_pipeline.config.ranges import NotNegative, Positive, Share
from slm_pipeline.errors import UserError
from slm_pipeline.recovery.base import RecoveryProblem, RecoveryResult
from slm_pipeline.recovery.distill import Distill
from slm_pipeline.recovery.spans import changed_spans

OBJECTIVES = ("states", "language_model")


@dataclass(kw_only=True)
class BlockMse(Distill):
    """Layer replacement of LLM-Streamline, arXiv 2403.19135: one layer learns to stand for a block of removed ones.

    The layer is the first of the block, kept in its place (``method=streamline method.replacement=true`` makes that
    plan; in any other plan it is the kept layer below a gap, or a merged layer). Trained with the mean squared error
    between its output and the dense model's state that leaves the block (``objective=states``), or with the pruned
    model's own language-model loss (``objective=language_model``, the code's ``llm_loss``).

    Departures from the published code: the dense model's states are made batch by batch and never stored (theirs needs
    some 2 TB for a 7B model); the best weights are a copy, and the last ones are kept where the states train; any
    architecture. Its settings: AdamW, learning rate 2e-4 to 5e-5 by cosine, weight decay 1e-3, gradients clipped to 5,
    128 sequences of 2,048 tokens a step, one epoch of 100,000 documents; the schedule, weight decay and clipping are
    the defaults here.
    """

    loss: str = "mse"
    objective: str = "states"  # states | language_model (the pruned model's own loss)
    schedule: str = "cosine"
    final_learning_rate: Share = 0.25  # as a share of learning_rate
    weight_decay: NotNegative = 1e-3
    max_grad_norm: Positive = 5.0

    gap: ClassVar[str] = "below"
    name: ClassVar[str] = "block_mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise UserError(f"recovery.objective={self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        self.refuse_unless("loss", "order", "logit_share", objective="states")

    @property
    def trains_states(self) -> bool:
        return self.objective == "states"

    @property
    def has_teacher(self) -> bool:
        return self.trains_states

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        """Train; leaves nothing in ``out`` but checkpoints."""
        changed = changed_spans(problem.plan, self.gap)
        if self.trains_states or not changed:
            return super().run(problem)
        from slm_pipeline.models.view import ModelView

        layers = ModelView(problem.model).layers
        return self.train_modules(problem, [layers[span.position] for span in changed])
