"""The transformers Trainer as recoveries use it: resumable, exact in its numbers, stopped by a loss gone bad.

This module imports torch, so option classes import it only when they run.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from slm_pipeline.artifacts import write_json
from slm_pipeline.data.batches import Collator, num_tokens
from slm_pipeline.data.examples import IGNORED
from slm_pipeline.errors import UserError
from slm_pipeline.recovery.base import RecoveryProblem, TrainingOptions

logger = logging.getLogger(__name__)

MARKER = "complete.json"
TRAINED = "trained.safetensors"


@dataclass
class Progress:
    """What the Trainer does not count itself, kept with every checkpoint.

    Attributes:
        num_tokens: input tokens trained on, without padding.
        num_label_tokens: those among them that bore loss.
        seconds: training and validation time of all attempts.
        finished: whether nothing remains to be trained.
    """

    num_tokens: int = 0
    num_label_tokens: int = 0
    seconds: float = 0.0
    finished: bool = False


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        curve: as in `RecoveryResult`.
        metrics: what a recovery reports of it.
    """

    curve: list[dict[str, float]]
    metrics: dict[str, Any]


def fit(
    model: PreTrainedModel | PeftModel,
    train: Sequence[dict[str, list[int]]],
    validation: Sequence[dict[str, list[int]]],
    options: TrainingOptions,
    problem: RecoveryProblem,
) -> Fit:
    """Train whatever in ``model`` requires gradients, from the last complete checkpoint if there is one.

    Data order, dropout and learning rate go on where that checkpoint stood, so that an interrupted training ends with
    the weights of an uninterrupted one. Checkpoints, in ``problem.out/checkpoints``, hold what trains and nothing else.

    Args:
        model: a transformers model or a peft wrapper around one. It ends on the device where it began, in evaluation
            mode, with the weights of the lowest validation loss.
        train, validation: rows of `tokenize_example` or of `pack`.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    folder = problem.out / "checkpoints"
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    logger.info("training %d of %d parameters on %d examples", trainable, total, len(train))
    pad_token_id = problem.tokenizer.pad_token_id
    num_steps = options.num_steps(train)
    if options.warmup_steps >= num_steps:
        logger.warning(
            "recovery.warmup_steps=%d is not below the %d steps of training: the learning rate never reaches %g",
            options.warmup_steps, num_steps, options.learning_rate,
        )  # fmt: skip
    checkpoint = last_complete_checkpoint(folder)
    progress = Progress()
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        logger.info("recovery goes on from %s", checkpoint)
    if not progress.finished:
        device = model.device
        use_cache = model.config.use_cache  # the Trainer turns it off, for good
        arguments = _arguments(options, folder, num_steps, problem.seed, use_cpu=device.type == "cpu")
        arguments.eval_on_start = checkpoint is None
        trainer = _Trainer(
            progress,
            options,
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=Collator(0 if pad_token_id is None else pad_token_id),  # masked: any token will do
            callbacks=[_Watch(folder, progress, options, problem.log)],
        )
        trainer.remove_callback(PrinterCallback)  # our own log lines instead
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            model.config.use_cache = use_cache
        if options.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        if model.device != device:
            logger.warning("trained on %s, the first GPU in sight; CUDA_VISIBLE_DEVICES chooses another", model.device)
            model.to(device)  # type: ignore[arg-type]
        checkpoint = last_complete_checkpoint(folder)
    assert checkpoint is not None
    best, curve, metrics = _summarize(checkpoint, progress)
    load_trained(model, best)
    model.eval()
    sizes = {"trainable_parameters": trainable, "num_examples": len(train), "num_validation_examples": len(validation)}
    return Fit(curve, {**metrics, **sizes})


def save_trained(model: nn.Module, folder: Path) -> None:
    """Keep the parameters that require gradients."""
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / TRAINED)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the parameters of `save_trained` back in their places."""
    kept = load_file(folder / TRAINED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(kept[name])


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; those that were not are deleted."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if _is_complete(checkpoint):
            complete.append(checkpoint)
        else:
            logger.warning("%s is incomplete, an earlier attempt was stopped while writing it: deleted", checkpoint)
            shutil.rmtree(checkpoint)
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def mark_complete(checkpoint: Path, progress: Progress) -> None:
    """Say that a checkpoint is whole by listing its files, so that one half deleted is not taken for whole either."""
    write_json(checkpoint / MARKER, {**asdict(progress), "files": _file_sizes(checkpoint)})


def read_progress(checkpoint: Path) -> Progress:
    """The progress stored with a complete checkpoint."""
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    del marker["files"]
    return Progress(**marker)


def _is_complete(checkpoint: Path) -> bool:
    if not (checkpoint / MARKER).is_file():
        return False
    listed: dict[str, int] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    return listed == _file_sizes(checkpoint)


def _file_sizes(checkpoint: Path) -> dict[str, int]:
    files = sorted(file for file in checkpoint.iterdir() if file.is_file() and file.name != MARKER)
    return {file.name: file.stat().st_size for file in files}


def _arguments(
    options: TrainingOptions, folder: Path, num_steps: int, seed: int, *, use_cpu: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder.absolute()),
        max_steps=num_steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.batch_size // options.micro_batch_size,
        bf16=options.dtype == "bfloat16",
        use_cpu=use_cpu,
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,  # the best and the last
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # it would hide what _Trainer stops at
        remove_unused_columns=False,
        dataloader_pin_memory=not use_cpu,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )
    if not use_cpu:
        arguments._n_gpu = 1  # with several GPUs in sight the Trainer would wrap the model in DataParallel
    return arguments


def _summarize(checkpoint: Path, progress: Progress) -> tuple[Path, list[dict[str, float]], dict[str, Any]]:
    """The checkpoint of the lowest validation loss, the curve, and the metrics, of a training that is over."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    assert state.best_model_checkpoint is not None  # the last step is always evaluated
    kept = ("step", "loss", "learning_rate", "eval_loss")
    curve = [{name: row[name] for name in kept if name in row} for row in state.log_history]
    logged = [row for row in curve if "loss" in row]
    previous = [0.0] + [row["step"] for row in logged[:-1]]
    total = sum(row["loss"] * (row["step"] - before) for row, before in zip(logged, previous, strict=True))
    metrics = {
        "train_loss": total / state.global_step,
        "initial_eval_loss": curve[0]["eval_loss"],
        "eval_loss": state.best_metric,
        "best_step": state.best_global_step,
        "num_steps": state.global_step,
        "num_tokens": progress.num_tokens,
        "num_label_tokens": progress.num_label_tokens,
        "seconds": round(progress.seconds, 3),
    }
    return checkpoint.parent / Path(state.best_model_checkpoint).name, curve, metrics


def _require_finite(value: Tensor | float, what: str, step: int, options: TrainingOptions) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"recovery: the {what} is {float(value)} at step {step}; lower recovery.learning_rate"
            f" ({options.learning_rate:g} now), or use bfloat16 or float32 for model.dtype if it is float16"
        )


class _Trainer(Trainer):
    """Counts what it trains on, stops at a loss that is not finite, and validates per token."""

    def __init__(self, progress: Progress, options: TrainingOptions, **arguments: Any) -> None:
        self.progress = progress
        self.options = options
        super().__init__(**arguments)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Only what trains: of a large model with a small adapter the rest would be written again and again."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.model is not None
        load_trained(self.model, Path(resume_from_checkpoint))

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.progress.num_tokens += num_tokens(inputs)
        self.progress.num_label_tokens += int((inputs["labels"] != IGNORED).sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        _require_finite(loss, "training loss", self.state.global_step + 1, self.options)
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss in nats per answer token; the Trainer's own average over batches depends on how they are cut."""
        assert self.model is not None
        self.model.eval()
        total, num_labels = 0.0, 0
        for batch in tqdm(self.get_eval_dataloader(), desc="validation", disable=None, leave=False):
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.model(**batch).loss
            num_batch_labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(loss) * num_batch_labels
            num_labels += num_batch_labels
        metrics = {"eval_loss": total / num_labels}
        _require_finite(metrics["eval_loss"], "validation loss", self.state.global_step, self.options)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Watch(TrainerCallback):
    """Decides when to save and to stop, marks checkpoints as complete, and passes on the losses."""

    def __init__(
        self, folder: Path, progress: Progress, options: TrainingOptions, log: Callable[[dict[str, float], int], None]
    ) -> None:
        self.folder = folder
        self.progress = progress
        self.options = options
        self.log = log

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.monotonic() - self.progress.seconds
        self.first_step = state.global_step
        self.first_second = self.progress.seconds

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        _require_finite(nn.utils.get_total_norm(gradients), "gradient", state.global_step + 1, self.options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.seconds = time.monotonic() - self.start
        if self.options.max_minutes is not None and self.progress.seconds >= 60 * self.options.max_minutes:
            logger.info("recovery.max_minutes=%g is over at step %d", self.options.max_minutes, state.global_step)
            control.should_training_stop = control.should_evaluate = control.should_save = True
        if control.should_save or control.should_evaluate:
            control.should_log = True  # else a resumed training would not know the losses since the last line

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["metrics"]["eval_loss"]
        if state.global_step and (state.best_metric is None or loss < state.best_metric):
            control.should_save = True
        logger.info(
            "step %d of %d: validation loss %.4f%s", state.global_step, state.max_steps, loss, self._time_left(state)
        )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        names = ("loss", "learning_rate", "eval_loss")  # not the Trainer's last line, a summary of this attempt alone
        if losses := {name: value for name, value in kwargs["logs"].items() if name in names}:
            self.log(losses, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.seconds = time.monotonic() - self.start
        self.progress.finished = control.should_training_stop
        mark_complete(self.folder / f"checkpoint-{state.global_step}", self.progress)

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done:
            return ""
        seconds = (self.progress.seconds - self.first_second) / done * (state.max_steps - state.global_step)
        return f", {seconds / 60:.1f} minutes left"
