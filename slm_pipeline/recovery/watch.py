"""What goes on around every optimizer step of a training: counting, clipping, saving, stopping."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slm_pipeline.errors import UserError
from slm_pipeline.recovery import collective, sharding
from slm_pipeline.recovery.base import Log
from slm_pipeline.recovery.checkpoints import Progress, mark_complete
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.recovery.loss_module import LossModule
from slm_pipeline.recovery.phase import Phase
from slm_pipeline.show.numerals import duration
from slm_pipeline.show.progress import ProgressBar

logger = logging.getLogger(__name__)


class Watch(TrainerCallback):
    """Counts, clips gradients, decides when to save and to stop, marks checkpoints as complete, passes losses on."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | LossModule,
        folder: Path,
        progress: Progress,
        options: FineTuning,
        phase: Phase,
        log: Log,
    ) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.groups = model.clipping_groups() if isinstance(model, LossModule) else [trained]
        self.folder = folder
        self.progress = progress
        self.options = options
        self.phase = phase
        self.max_seconds = math.inf if options.max_minutes is None else 60 * options.max_minutes * phase.minutes
        self.log = log
        self.counted: list[Tensor] = []

    def count(self, loss: Tensor, num_tokens: Tensor, num_labels: Tensor) -> None:
        """Note a micro-batch; the numbers stay on the device until its step is made, so as not to wait for it."""
        self.counted.append(torch.stack([value.to(loss.device).double() for value in (loss, num_tokens, num_labels)]))

    def require_finite(self, value: float, what: str, step: int) -> None:
        """Raise `UserError` unless ``value`` is finite."""
        if not math.isfinite(value):
            raise UserError(
                f"recovery: the {what} is {value} at step {self.phase.steps_before + step}; lower"
                f" recovery.learning_rate ({self.options.peak_learning_rate:g} now), or use bfloat16 or float32 for"
                " model.dtype if it is float16"
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.monotonic() - self.progress.seconds
        self.first_step = state.global_step
        self.first_second = self.progress.seconds
        self.bar = ProgressBar(
            desc="training",
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            disable=collective.rank() > 0,
        )
        for row in state.log_history:  # of an earlier attempt: this one's curve begins where that one's did
            self._pass_on(row, int(row["step"]))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["train_dataloader"].batch_sampler.epoch = int(state.epoch or 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step's tokens, stop at a loss or gradient gone bad, and clip."""
        norms = [
            sharding.whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])).to(args.device)
            for group in self.groups
        ]
        counts = collective.summed(torch.stack(self.counted).sum(dim=0))
        self.counted.clear()
        loss, num_tokens, num_labels, norm = [*counts.tolist(), float(torch.stack(norms).sum())]
        self.require_finite(loss, "training loss", state.global_step + 1)
        self.require_finite(norm, "gradient", state.global_step + 1)
        for group, group_norm in zip(self.groups, norms, strict=True):
            nn.utils.clip_grads_with_norm_(group, self.options.max_grad_norm, group_norm)
        self.progress.num_tokens += int(num_tokens)
        self.progress.num_label_tokens += int(num_labels)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update()
        self.progress.seconds = collective.of_first(time.monotonic() - self.start)
        if self.progress.seconds >= self.max_seconds:
            logger.info(
                "%.3g of recovery.max_minutes=%g are over at step %d",
                self.max_seconds / 60, self.options.max_minutes, self._step(state),
            )  # fmt: skip
            control.should_training_stop = control.should_evaluate = control.should_save = True
        if control.should_save or control.should_evaluate:
            control.should_log = True  # else a resumed training would not know the losses since the last line

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["metrics"]["eval_loss"]
        if state.global_step and (state.best_metric is None or loss < state.best_metric):
            control.should_save = True
        logger.info(
            "step %d of %d: validation loss %.4f%s",
            self._step(state), self.phase.steps_before + state.max_steps, loss, self._time_left(state),
        )  # fmt: skip
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        patience = self.options.early_stopping
        if patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]):
            logger.info("no better validation loss in the last %d: stopped at step %d", patience, self._step(state))
            control.should_training_stop = control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pass_on(kwargs["logs"], state.global_step)

    def _pass_on(self, logged: Mapping[str, float], step: int) -> None:
        row = self.phase.row(logged, step)
        step = int(row.pop("step"))
        if row:  # the Trainer's last line, a summary of this attempt alone, has nothing of it
            self.log(row, step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.seconds = time.monotonic() - self.start
        self.progress.finished = control.should_training_stop
        collective.wait()  # until each process has written its part
        if collective.rank() == 0:
            mark_complete(self.folder / f"checkpoint-{state.global_step}", self.progress)

    def _step(self, state: TrainerState) -> int:
        """The step, counted over all phases of the recovery."""
        return self.phase.steps_before + state.global_step

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done or state.global_step >= state.max_steps:
            return ""
        seconds = (self.progress.seconds - self.first_second) / done * (state.max_steps - state.global_step)
        return f", {duration(seconds)} left"
