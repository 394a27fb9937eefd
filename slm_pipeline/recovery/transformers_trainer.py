"""The transformers Trainer as recoveries use it: exact in its numbers, watched, one of several processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments

from slm_pipeline.data.batches import blank, num_tokens
from slm_pipeline.data.tokens import IGNORED, Row
from slm_pipeline.recovery import collective, sharding
from slm_pipeline.recovery.checkpoints import load_trained, save_trained
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.recovery.watch import Watch
from slm_pipeline.show.progress import ProgressBar

SCHEDULER = "scheduler.pt"
_SCHEDULES = {"linear": "linear", "cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}


def training_arguments(
    options: FineTuning, folder: Path, num_steps: int, seed: int, *, use_cpu: bool
) -> TrainingArguments:
    """The Trainer's arguments for ``num_steps`` optimizer steps; ``folder`` gets the checkpoints."""
    floor = {"min_lr_rate": options.final_learning_rate} if options.schedule == "cosine" else None
    arguments = TrainingArguments(
        output_dir=str(folder.absolute()),
        max_steps=num_steps,
        learning_rate=options.peak_learning_rate,
        warmup_steps=options.warmup(num_steps),
        lr_scheduler_type=_SCHEDULES[options.schedule],
        lr_scheduler_kwargs=floor,
        weight_decay=options.weight_decay,
        max_grad_norm=0,  # Watch clips, each group by itself
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
        disable_tqdm=True,  # Watch has a bar of ours
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
        """Save what trains: of a large model with a small adapter the rest would be written again and again."""
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
        for batch in ProgressBar(batches, desc="validation", disable=collective.rank() > 0, leave=False):
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
