"""CoMe's hierarchical distillation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config.ranges import Share
from slm_pipeline.errors import UserError
from slm_pipeline.recovery.base import RecoveryProblem, RecoveryResult
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.recovery.freezing import freeze_all_but
from slm_pipeline.recovery.phase import Phase
from slm_pipeline.recovery.spans import Span, changed_spans

if TYPE_CHECKING:
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.recovery.training_loop import Fit

log = logging.getLogger(__name__)

STATE_LOSSES = ("mse", "cosine", "kl", "mse_cosine")
ORDERS = ("joint", "blocks")


@dataclass(kw_only=True)
class Distill(FineTuning):
    """Hierarchical distillation of CoMe, arXiv 2510.15304: a merged layer learns to do what its originals did.

    The layer that stands for the originals l .. l + m gets the dense model's state that enters l, and its output is
    compared with the dense model's state that leaves l + m. Only such layers train. The plan alone says which they
    are, so any method's plan will do: a dropped layer belongs to the next kept one towards the output, a layer that
    lost a sublayer stands for its whole self, and a plan that changes nothing trains nothing.

    The paper's code has no distillation; its figure fixes states, layers and a KL loss. Ours are: KL of the softmax
    over the features of each token, from teacher to student, temperature 1; the other losses; the states of all
    tokens (``completion_only=false``); learning rate, budget and data; the last stage on logits.

    ``order=joint`` (CoMe-sp) trains all layers at once on one forward pass of the teacher, their losses summed and
    their gradients clipped each by itself; ``order=blocks`` (CoMe-mp) trains one after the other on the same data.
    Both give the same weights for models without dropout. With ``logit_share`` the last share of the budget goes to
    the same layers once more, on the KL divergence of the whole model's next-token distribution.

    The last weights are kept, not the best, so that both orders end alike; of the last phase, on logits, the best. A
    validation loss above the first one is a warning. Metrics are those of the layers' losses, summed over the layers;
    tokens are those that each layer was trained on. The curve of ``order=blocks`` has one layer's losses after the
    other's; the losses of the phase on logits are called ``logit_loss`` and ``logit_eval_loss``, in nats per counted
    token.
    """

    completion_only: bool = False  # True: the states of the output's tokens alone
    loss: str = "kl"  # mse | cosine | kl (of the softmax over features) | mse_cosine
    order: str = "joint"  # joint (all layers on one forward pass of the teacher) | blocks (one after the other)
    logit_share: Share = 0.0  # of the budget, at the end, for the whole model's next-token distribution

    learning_rates: ClassVar[tuple[float, float]] = (2e-3, 2e-4)  # the latter is LLM-Streamline's; none is published
    gap: ClassVar[str] = "above"  # in `spans`: which kept layer stands for dropped ones
    name: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("loss", STATE_LOSSES), ("order", ORDERS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"recovery.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.sharding and self.trains_states:
            raise UserError(
                f"recovery.sharding=true: recovery={self.name} needs every layer whole; use recovery.sharding=false"
            )
        if self.early_stopping is not None and self.trains_states:
            raise UserError(
                f"recovery.early_stopping={self.early_stopping}: recovery={self.name} keeps the last weights of every"
                " layer, so that layers trained jointly and one by one end alike; use null, and a smaller budget"
            )

    @property
    def trains_states(self) -> bool:
        """Whether the losses are those of single layers' states."""
        return True

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model is there."""
        return True

    def memory(self, sizes: Sizes) -> int:
        """Where each removed layer has a kept one that stands for it, the most there can be. Of each layer its states,
        the teacher's and its own, and in float32 what the loss is made of; of the whole model what `logit_share` and
        other losses on its predictions take."""
        spans = min(sizes.removed or sizes.layers, sizes.layers)
        together = spans if self.order == "joint" else 1
        tokens = self.micro_batch_size * self.cutoff_len
        kept = self.activations(replace(sizes, vocabulary=0), layers=together)
        kept += tokens * sizes.hidden * (2 * sizes.item_bytes + 6 * 4) * together + sizes.running(tokens)
        if not self.trains_states or self.logit_share:
            kept = max(kept, self.activations(sizes) + tokens * sizes.vocabulary * (4 + sizes.item_bytes))
        teacher = sizes.dense.weights if self.has_teacher else 0
        return teacher + self.training(sizes, together * sizes.block_parameters) + kept

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        """Train; leaves nothing in ``out`` but checkpoints."""
        changed = changed_spans(problem.plan, self.gap)
        if not changed:
            log.warning("recovery=%s: the plan leaves every layer as it was, so nothing is trained", self.name)
            return RecoveryResult(problem.model, {"num_steps": 0, "num_tokens": 0, "seconds": 0.0}, [])
        log.info("layers to train: %s", ", ".join(f"{s.position} (for {s.first}..{s.last})" for s in changed))
        metrics, curve = self._distill(problem, changed)
        problem.model.requires_grad_(True)
        return RecoveryResult(problem.model, metrics, curve)

    def _distill(
        self, problem: RecoveryProblem, changed: Sequence[Span]
    ) -> tuple[dict[str, Any], list[dict[str, float]]]:
        from slm_pipeline.models.view import ModelView
        from slm_pipeline.recovery.teacher_losses import LogitLoss, StateLoss
        from slm_pipeline.recovery.training_loop import fit
        from slm_pipeline.surgery.apply import PlannedBlocks

        train, validation = self.tokenized_split(problem.tokenizer, problem.data_dir)
        teacher = problem.teacher().requires_grad_(False)
        bodies = [block.body for block in PlannedBlocks(problem.plan, ModelView(teacher))]
        layers = ModelView(problem.model).layers
        together = [list(changed)] if self.order == "joint" else [[span] for span in changed]
        share = 1 - self.logit_share
        fits: list[Fit] = []
        for spans in together:
            freeze_all_but(problem, [layers[span.position] for span in spans])
            loss = StateLoss(teacher, problem.model, spans, bodies, self.loss)
            folder = "checkpoints/" + "_".join(str(span.position) for span in spans)
            minutes = share / len(together)
            phase = Phase(folder=folder, end=share, minutes=minutes, steps_before=_steps(fits), keep="last")
            fits.append(fit(loss, train, validation, self, problem, phase))
        metrics = {**_sum_of_layers(fits), "loss": f"{self.loss} of states, {len(changed)} layers"}
        if self.logit_share:
            freeze_all_but(problem, [layers[span.position] for span in changed])
            phase = Phase(
                folder="checkpoints/logits", begin=share, minutes=self.logit_share, steps_before=_steps(fits),
                prefix="logit_",
            )  # fmt: skip
            last = fit(LogitLoss(teacher, problem.model), train, validation, self, problem, phase)
            del metrics["best_step"]  # of which phase?
            metrics |= {
                "initial_logit_eval_loss": last.metrics["initial_eval_loss"],
                "logit_eval_loss": last.metrics["eval_loss"],
            }
            spent = ("num_steps", "num_tokens", "num_label_tokens", "seconds")
            metrics |= {name: metrics[name] + last.metrics[name] for name in spent}
            fits.append(last)
        return metrics, [row for fit in fits for row in fit.curve]


def _steps(fits: Sequence[Fit]) -> int:
    return sum(fit.metrics["num_steps"] for fit in fits)


def _sum_of_layers(fits: Sequence[Fit]) -> dict[str, Any]:
    """The metrics of trainings of different layers on the same data, as if they had been one training."""
    summed = ("train_loss", "initial_eval_loss", "eval_loss", "trainable_parameters", "seconds")
    return fits[0].metrics | {name: sum(fit.metrics[name] for fit in fits) for name in summed}
