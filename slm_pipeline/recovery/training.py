"""The transformers Trainer as recoveries use it: resumable, exact in its numbers, stopped by a loss gone bad.

This module imports torch, so option classes import it only when they run.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from slm_pipeline.artifacts import write_json
from slm_pipeline.data.batches import Collator, blank, num_tokens
from slm_pipeline.data.examples import IGNORED, Row
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.recovery import collective, sharding
from slm_pipeline.recovery.base import RecoveryProblem, RecoveryResult, TrainingOptions
from slm_pipeline.recovery.trainable import train_only

logger = logging.getLogger(__name__)

MARKER = "complete.json"
TRAINED = "trained.safetensors"
SCHEDULER = "scheduler.pt"
_SCHEDULES = {"linear": "linear", "cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}


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


def tune(options: TrainingOptions, problem: RecoveryProblem, modules: Iterable[nn.Module]) -> RecoveryResult:
    """Train these parts of the pruned model, and nothing else, on the language-model loss."""
    train, validation = options.tokenized_split(problem.tokenizer, problem.data_dir)
    train_only(problem, modules)
    result = fit(problem.model, train, validation, options, problem)
    problem.model.requires_grad_(True)
    return RecoveryResult(problem.model, result.metrics, result.curve)


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        curve: as in `RecoveryResult`.
        metrics: what a recovery reports of it.
    """

    curve: list[dict[str, float]]
    metrics: dict[str, Any]


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


def fit(
    model: PreTrainedModel | PeftModel | Objective,
    train: Sequence[dict[str, list[int]]],
    validation: Sequence[dict[str, list[int]]],
    options: TrainingOptions,
    problem: RecoveryProblem,
    *,
    folder: str = "checkpoints",
    share: float = 1.0,
    keep: str = "best",
) -> Fit:
    """Train whatever in ``model`` requires gradients, from the last complete checkpoint if there is one.

    Data order, dropout and learning rate go on where that checkpoint stood, so that an interrupted training ends with
    the weights of an uninterrupted one. What trains does so in float32, whatever its dtype before and after: bfloat16
    would round small updates away. Checkpoints hold what trains and nothing else.

    In a process of `workers.train`, every process trains on its part of each step's examples. Which examples a step
    has does not depend on how many processes there are; what dropout leaves out does. With ``options.sharding`` the
    model is of no use there afterwards, and `collective.Trained` is raised: the checkpoints are what is left.

    Args:
        model: it ends on the device where it began, in evaluation mode.
        train, validation: rows of `tokenize_examples` or of `pack`.
        folder: where in ``problem.out`` the checkpoints go; its own for each of several trainings.
        share: of the steps and minutes that ``options`` allow.
        keep: the weights of the ``best`` validation loss, or the ``last``.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    logger.info("training %d of %d parameters on %d examples", trainable, total, len(train))
    with _in_float32(model, everything=options.dtype == "float32"):
        sharded = options.sharding and collective.count() > 1
        if sharded:
            sharding.shard(model, ModelView(problem.model).layers)
        last, progress = _train(model, train, validation, options, problem, problem.out / folder, share)
        if sharded:
            raise collective.Trained
        kept, curve, metrics = _summarize(last, progress, keep)
        load_trained(model, kept)
    model.eval()
    sizes = {"trainable_parameters": trainable, "num_examples": len(train), "num_validation_examples": len(validation)}
    return Fit(curve, {**metrics, **sizes})


def _train(
    model: PreTrainedModel | PeftModel | Objective,
    train: Sequence[dict[str, list[int]]],
    validation: Sequence[dict[str, list[int]]],
    options: TrainingOptions,
    problem: RecoveryProblem,
    folder: Path,
    share: float,
) -> tuple[Path, Progress]:
    """Train to the end; the last checkpoint and what was counted."""
    checkpoint = last_complete_checkpoint(folder)
    progress = Progress() if checkpoint is None else read_progress(checkpoint)
    if checkpoint is not None:
        logger.info("recovery goes on from %s", checkpoint)
        if progress.finished:
            return checkpoint, progress
    num_steps = max(1, round(share * options.num_steps(train)))
    if options.warmup_steps >= num_steps:
        logger.warning(
            "recovery.warmup_steps=%d is not below the %d steps of training: the learning rate never reaches %g",
            options.warmup_steps, num_steps, options.learning_rate,
        )  # fmt: skip
    device = model.device
    use_cache = model.config.use_cache  # the Trainer turns it off, for good
    arguments = _arguments(options, folder, num_steps, problem.seed, use_cpu=device.type == "cpu")
    arguments.eval_on_start = checkpoint is None
    pad_token_id = problem.tokenizer.pad_token_id
    watch = _Watch(model, folder, progress, options, share, problem.log)
    trainer = _Trainer(
        watch,
        options.sharding and collective.count() > 1,
        model=model,
        args=arguments,
        train_dataset=[*train, blank(train[0])],
        eval_dataset=_share(validation),
        data_collator=Collator(0 if pad_token_id is None else pad_token_id),  # masked: any token will do
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # our own log lines instead
    if collective.rank():  # each its own dropout; the Trainer has just given all the same seed
        set_seed(problem.seed + collective.rank())
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        model.config.use_cache = use_cache
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else its forward pass stays under autocast
    if options.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if model.device != device:
        logger.warning("trained on %s, the first GPU in sight; CUDA_VISIBLE_DEVICES chooses another", model.device)
        model.to(device)  # type: ignore[arg-type]
    checkpoint = last_complete_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint, progress


@contextmanager
def _in_float32(model: nn.Module, *, everything: bool) -> Iterator[None]:
    """What trains in float32 for a while, or every parameter."""
    dtypes = {name: p.dtype for name, p in model.named_parameters() if everything or p.requires_grad}
    _cast(model, dict.fromkeys(dtypes, torch.float32))
    yield  # a model whose training failed stays as it is
    _cast(model, dtypes)


def _cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, dtype in dtypes.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)


def save_trained(model: nn.Module, folder: Path) -> None:
    """Keep the parameters that require gradients. All processes take part, the first one writes."""
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = sharding.whole(parameter.detach())
            if collective.rank() == 0:
                trained[name] = value.cpu().contiguous()
    if collective.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained, folder / TRAINED)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the parameters of `save_trained` back in their places."""
    kept = load_file(folder / TRAINED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(sharding.spread_like(kept[name], parameter))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; those that were not are deleted."""
    if collective.rank() == 0:
        _delete_incomplete(folder)
    collective.wait()
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _delete_incomplete(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        if not _is_complete(checkpoint):
            logger.warning("%s is incomplete, an earlier attempt was stopped while writing it: deleted", checkpoint)
            shutil.rmtree(checkpoint)


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
    floor = {"min_lr_rate": options.final_learning_rate} if options.schedule == "cosine" else None
    arguments = TrainingArguments(
        output_dir=str(folder.absolute()),
        max_steps=num_steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type=_SCHEDULES[options.schedule],
        lr_scheduler_kwargs=floor,
        weight_decay=options.weight_decay,
        max_grad_norm=0,  # _Watch clips, each part by itself
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
        save_total_limit=2,  # the best and the last
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # it would hide what _Watch stops at
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )
    if not use_cpu:
        arguments._n_gpu = 1  # with several GPUs in sight the Trainer would wrap the model in DataParallel
    return arguments


def _summarize(last: Path, progress: Progress, keep: str) -> tuple[Path, list[dict[str, float]], dict[str, Any]]:
    """The checkpoint to keep, the curve, and the metrics, of a training that is over."""
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    assert state.best_model_checkpoint is not None  # the last step is always evaluated
    kept = ("step", "loss", "learning_rate", "eval_loss")
    curve = [{name: row[name] for name in kept if name in row} for row in state.log_history]
    logged = [row for row in curve if "loss" in row]
    validated = [row for row in curve if "eval_loss" in row]
    previous = [0.0] + [row["step"] for row in logged[:-1]]
    total = sum(row["loss"] * (row["step"] - before) for row, before in zip(logged, previous, strict=True))
    metrics = {
        "loss": "nats per answer token",
        "train_loss": total / state.global_step,
        "initial_eval_loss": validated[0]["eval_loss"],
        "eval_loss": state.best_metric if keep == "best" else validated[-1]["eval_loss"],
        "best_step": state.best_global_step if keep == "best" else state.global_step,
        "num_steps": state.global_step,
        "num_tokens": progress.num_tokens,
        "num_label_tokens": progress.num_label_tokens,
        "seconds": round(progress.seconds, 3),
    }
    return last.parent / Path(state.best_model_checkpoint).name if keep == "best" else last, curve, metrics


def _share(rows: Sequence[Row]) -> list[Row]:
    """This process's part of the rows, as many as every other process has: blank ones may be among them."""
    n = collective.count()
    return [*rows, *[blank(rows[0])] * (-len(rows) % n)][collective.rank() :: n]


class _MicroBatches(Sampler[list[int]]):
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


class _Trainer(Trainer):
    """Has its ``watch`` count what it trains on, keeps what trains alone, and validates per token."""

    def __init__(self, watch: _Watch, sharded: bool, **arguments: Any) -> None:
        self.watch = watch
        self.sharded = sharded
        super().__init__(**arguments)
        if (
            sharded
        ):  # accelerate may set up autocast; the model is spread already, and is no copy that could be averaged
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader:
        rows: Any = self.train_dataset
        order = _MicroBatches(len(rows) - 1, self.args.per_device_train_batch_size, self.args.seed)
        return DataLoader(rows, batch_sampler=order, collate_fn=self.data_collator)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what trains: of a large model with a small adapter the rest would be written again and again."""
        assert self.model is not None
        save_trained(self.model, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.model is not None
        load_trained(self.model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        model, optimizer, scheduler = self._prepared()
        sharding.save_optimizer(model, optimizer, Path(output_dir))
        if collective.rank() == 0:
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        model, optimizer, scheduler = self._prepared()
        sharding.load_optimizer(model, optimizer, Path(checkpoint))
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        return None

    def _prepared(self) -> tuple[Any, Any, Any]:
        """Model, optimizer and scheduler; the optimizer without what accelerate put around it."""
        optimizer: Any = self.optimizer
        return self.model, optimizer.optimizer, self.lr_scheduler

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


class _Watch(TrainerCallback):
    """Counts, clips gradients, decides when to save and to stop, marks checkpoints as complete, passes losses on."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | Objective,
        folder: Path,
        progress: Progress,
        options: TrainingOptions,
        share: float,
        log: Callable[[dict[str, float], int], None],
    ) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parts = model.parts() if isinstance(model, Objective) else [trained]
        self.folder = folder
        self.progress = progress
        self.options = options
        self.max_seconds = math.inf if options.max_minutes is None else 60 * options.max_minutes * share
        self.log = log
        self.counted: list[Tensor] = []

    def count(self, loss: Tensor, num_tokens: Tensor, num_labels: Tensor) -> None:
        """Note a micro-batch; the numbers stay on the device until its step is made, so as not to wait for it."""
        self.counted.append(torch.stack([value.to(loss.device).double() for value in (loss, num_tokens, num_labels)]))

    def require_finite(self, value: float, what: str, step: int) -> None:
        """Raise `UserError` unless ``value`` is finite."""
        if not math.isfinite(value):
            raise UserError(
                f"recovery: the {what} is {value} at step {step}; lower recovery.learning_rate"
                f" ({self.options.learning_rate:g} now), or use bfloat16 or float32 for model.dtype if it is float16"
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.monotonic() - self.progress.seconds
        self.first_step = state.global_step
        self.first_second = self.progress.seconds

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["train_dataloader"].batch_sampler.epoch = int(state.epoch or 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step's tokens, stop at a loss or gradient gone bad, and clip."""
        norms = [
            sharding.whole(nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])) for part in self.parts
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
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        patience = self.options.early_stopping
        if patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]):
            logger.info("no better validation loss in the last %d: stopped at step %d", patience, state.global_step)
            control.should_training_stop = control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        names = ("loss", "learning_rate", "eval_loss")  # not the Trainer's last line, a summary of this attempt alone
        if losses := {name: value for name, value in kwargs["logs"].items() if name in names}:
            self.log(losses, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.seconds = time.monotonic() - self.start
        self.progress.finished = control.should_training_stop
        collective.wait()  # until each process has written its part
        if collective.rank() == 0:
            mark_complete(self.folder / f"checkpoint-{state.global_step}", self.progress)

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done:
            return ""
        seconds = (self.progress.seconds - self.first_second) / done * (state.max_steps - state.global_step)
        return f", {seconds / 60:.1f} minutes left"
