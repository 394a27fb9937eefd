"""The transformers Trainer as recoveries use it: exact in its numbers, stopped by a loss gone bad, one of several."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slm_pipeline.data.batches import blank, num_tokens
from slm_pipeline.data.tokens import IGNORED, Row
from slm_pipeline.errors import UserError
from slm_pipeline.recovery import collective, sharding
from slm_pipeline.recovery.base import TrainingOptions
from slm_pipeline.recovery.checkpoints import Progress, load_trained, mark_complete, save_trained

logger = logging.getLogger(__name__)

SCHEDULER = "scheduler.pt"
_SCHEDULES = {"linear": "linear", "cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}


class Objective(nn.Module):
    """A loss of our own in the form that the Trainer takes: a module whose output has ``loss``.

    Its forward takes a batch of `Collator` and ``num_items_in_batch``, the number of labelled tokens in the whole
    optimizer step, to which the losses of its batches add up as a mean. The token that a state predicts decides
    whether the state counts: ``labels[:, t + 1]`` is about the state at t, as in a language model's own loss.

    Args:
        student: the model of which something trains.
    """

    accepts_loss_kwargs = True

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student
        if device_map := getattr(student, "hf_device_map", None):
            self.hf_device_map = device_map  # tells the Trainer to leave a model alone that lies on several devices

    def parts(self) -> list[list[nn.Parameter]]:
        """The trained parameters in groups whose losses do not depend on one another: each is clipped by itself."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def config(self) -> Any:
        return self.student.config

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.student.gradient_checkpointing_enable(**options)

    def gradient_checkpointing_disable(self) -> None:
        self.student.gradient_checkpointing_disable()


def training_arguments(
    options: TrainingOptions, folder: Path, num_steps: int, seed: int, *, use_cpu: bool
) -> TrainingArguments:
    """The Trainer's arguments for ``num_steps`` optimizer steps; ``folder`` gets the checkpoints."""
    floor = {"min_lr_rate": options.final_learning_rate} if options.schedule == "cosine" else None
    arguments = TrainingArguments(
        output_dir=str(folder.absolute()),
        max_steps=num_steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type=_SCHEDULES[options.schedule],
        lr_scheduler_kwargs=floor,
        weight_decay=options.weight_decay,
        max_grad_norm=0,  # Watch clips, each part by itself
        optim="adamw_torch",
        per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.batch_size // (options.micro_batch_size * collective.count()),
        bf16=options.dtype == "bfloat16",
        use_cpu=use_cpu,
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # it would hide what Watch stops at
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )
    if not use_cpu:
        arguments._n_gpu = 1  # with several GPUs in sight the Trainer would wrap the model in DataParallel
    return arguments


def share_of_process(rows: Sequence[Row]) -> list[Row]:
    """This process's part of the rows, as many as every other process has: blank ones may be among them."""
    n = collective.count()
    return [*rows, *[blank(rows[0])] * (-len(rows) % n)][collective.rank() :: n]


class MicroBatches(Sampler[list[int]]):
    """What this process trains on in an epoch: every n-th of the micro-batches that the shuffled rows are cut into.

    So a step has the same rows however many processes there are. If the micro-batches do not go round, the last ones
    are blank rows, of which there is one behind the others.
    """

    def __init__(self, num_rows: int, size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.num_rows / self.size) / collective.count())

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        parts = [order[start : start + self.size] for start in range(0, self.num_rows, self.size)]
        parts += [[self.num_rows]] * (len(self) * collective.count() - len(parts))
        yield from parts[collective.rank() :: collective.count()]


class RecoveryTrainer(Trainer):
    """Has its ``watch`` count what it trains on, keeps what trains alone, and validates per token."""

    def __init__(self, watch: Watch, sharded: bool, **arguments: Any) -> None:
        self.watch = watch
        self.sharded = sharded
        super().__init__(**arguments)
        if sharded:  # accelerate may set up autocast; the model is spread already, no copy that could be averaged
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader:
        rows: Any = self.train_dataset
        order = MicroBatches(len(rows) - 1, self.args.per_device_train_batch_size, self.args.seed)
        return DataLoader(rows, batch_sampler=order, collate_fn=self.data_collator)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what trains: of a large model with a small adapter the rest would be written again and again."""
        assert self.model is not None
        save_trained(self.model, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.model is not None
        load_trained(self.model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.control.should_training_stop:
            return None  # twice the size of what trains, and nobody goes on from here
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer, scheduler = self._prepared()
        sharding.save_optimizer(optimizer, Path(output_dir))
        if collective.rank() == 0:
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, scheduler = self._prepared()
        sharding.load_optimizer(optimizer, Path(checkpoint))
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        return None

    def _prepared(self) -> tuple[Any, Any]:
        """Optimizer and scheduler; the optimizer without what accelerate put around it."""
        optimizer: Any = self.optimizer
        return optimizer.optimizer, self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        tokens, labels = num_tokens(inputs), (inputs["labels"] != IGNORED).sum()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.watch.count(loss, tokens, labels)
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over the labelled tokens; the Trainer's own average over batches depends on how they are cut."""
        assert self.model is not None
        self.model.eval()
        rows: Any = self.eval_dataset
        batches = DataLoader(rows, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        total, num_labels = 0.0, 0
        for batch in tqdm(batches, desc="validation", disable=True if collective.rank() else None, leave=False):
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.model(**batch)["loss"]
            if num_batch_labels := int((batch["labels"][:, 1:] != IGNORED).sum()):  # else they are all blank
                total += float(loss) * num_batch_labels
                num_labels += num_batch_labels
        counts = torch.tensor([total, num_labels], dtype=torch.float64, device=self.args.device)
        total, num_labels = collective.summed(counts).tolist()
        metrics = {"eval_loss": total / num_labels}
        self.watch.require_finite(metrics["eval_loss"], "validation loss", self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@dataclass(frozen=True)
class Part:
    """Where one training stands among the several that a recovery may make, one after the other.

    Attributes:
        folder: where in ``problem.out`` its checkpoints go, and no other's.
        begin, end: between which shares of the steps that the options allow: 0.8 and 1 are the last fifth.
        minutes: its share of ``max_minutes``.
        steps_before: optimizer steps of the trainings before; its own are counted on from there.
        prefix: of the names of its losses.
        keep: the weights of the ``best`` validation loss, or the ``last``.
    """

    folder: str = "checkpoints"
    begin: float = 0.0
    end: float = 1.0
    minutes: float = 1.0
    steps_before: int = 0
    prefix: str = ""
    keep: str = "best"

    def row(self, logged: Mapping[str, float], step: int) -> dict[str, float]:
        """A row of the recovery's curve from what was logged at a step of this part."""
        named = {self.prefix + name: logged[name] for name in ("loss", "eval_loss") if name in logged}
        if "learning_rate" in logged:
            named["learning_rate"] = logged["learning_rate"]
        return {"step": step + self.steps_before, **named}


WHOLE = Part()  # the only training of its recovery


class Watch(TrainerCallback):
    """Counts, clips gradients, decides when to save and to stop, marks checkpoints as complete, passes losses on."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | Objective,
        folder: Path,
        progress: Progress,
        options: TrainingOptions,
        part: Part,
        log: Callable[[dict[str, float], int], None],
    ) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parts = model.parts() if isinstance(model, Objective) else [trained]
        self.folder = folder
        self.progress = progress
        self.options = options
        self.part = part
        self.max_seconds = math.inf if options.max_minutes is None else 60 * options.max_minutes * part.minutes
        self.log = log
        self.counted: list[Tensor] = []

    def count(self, loss: Tensor, num_tokens: Tensor, num_labels: Tensor) -> None:
        """Note a micro-batch; the numbers stay on the device until its step is made, so as not to wait for it."""
        self.counted.append(torch.stack([value.to(loss.device).double() for value in (loss, num_tokens, num_labels)]))

    def require_finite(self, value: float, what: str, step: int) -> None:
        """Raise `UserError` unless ``value`` is finite."""
        if not math.isfinite(value):
            raise UserError(
                f"recovery: the {what} is {value} at step {self.part.steps_before + step}; lower recovery.learning_rate"
                f" ({self.options.learning_rate:g} now), or use bfloat16 or float32 for model.dtype if it is float16"
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.monotonic() - self.progress.seconds
        self.first_step = state.global_step
        self.first_second = self.progress.seconds
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
            sharding.whole(nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])).to(args.device)
            for part in self.parts
        ]
        counts = collective.summed(torch.stack(self.counted).sum(dim=0))
        self.counted.clear()
        loss, num_tokens, num_labels, norm = [*counts.tolist(), float(torch.stack(norms).sum())]
        self.require_finite(loss, "training loss", state.global_step + 1)
        self.require_finite(norm, "gradient", state.global_step + 1)
        for part, part_norm in zip(self.parts, norms, strict=True):
            nn.utils.clip_grads_with_norm_(part, self.options.max_grad_norm, part_norm)
        self.progress.num_tokens += int(num_tokens)
        self.progress.num_label_tokens += int(num_labels)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.seconds = collective.of_first(time.monotonic() - self.start, args.device)
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
            self._step(state), self.part.steps_before + state.max_steps, loss, self._time_left(state),
        )  # fmt: skip
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        patience = self.options.early_stopping
        if patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]):
            logger.info("no better validation loss in the last %d: stopped at step %d", patience, self._step(state))
            control.should_training_stop = control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pass_on(kwargs["logs"], state.global_step)

    def _pass_on(self, logged: Mapping[str, float], step: int) -> None:
        row = self.part.row(logged, step)
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
        """Of the whole recovery."""
        return self.part.steps_before + state.global_step

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done:
            return ""
        seconds = (self.progress.seconds - self.first_second) / done * (state.max_steps - state.global_step)
        return f", {seconds / 60:.1f} minutes left"
