"""Train what may train in a model, from where an earlier attempt stood, and keep the best."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PrinterCallback, TrainerState, set_seed

from slm_pipeline.data.batches import Collator, blank
from slm_pipeline.models.view import ModelView
from slm_pipeline.recovery import collective, sharding
from slm_pipeline.recovery.base import RecoveryProblem
from slm_pipeline.recovery.checkpoints import Progress, last_complete_checkpoint, load_trained, read_progress
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.recovery.loss_module import LossModule
from slm_pipeline.recovery.phase import WHOLE, Phase
from slm_pipeline.recovery.transformers_trainer import RecoveryTrainer, share_of_process, training_arguments
from slm_pipeline.recovery.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        curve: as in `RecoveryResult`, the losses named with the phase's prefix.
        metrics: what a recovery reports of it.
    """

    curve: list[dict[str, float]]
    metrics: dict[str, Any]


def fit(
    model: PreTrainedModel | PeftModel | LossModule,
    train: Sequence[dict[str, list[int]]],
    validation: Sequence[dict[str, list[int]]],
    options: FineTuning,
    problem: RecoveryProblem,
    phase: Phase = WHOLE,
) -> Fit:
    """Train whatever in ``model`` requires gradients, from the last complete checkpoint if there is one.

    Data order, dropout and learning rate go on where that checkpoint stood, so that an interrupted training ends with
    the weights of an uninterrupted one. What trains does so in float32, whatever its dtype before and after: bfloat16
    would round small updates away. Checkpoints hold what trains and nothing else.

    In a process of `workers.train`, every process trains on its part of each step's examples. Which examples a step
    has does not depend on how many processes there are; what dropout leaves out does. With ``options.sharding`` the
    model is of no use there afterwards, and `collective.Trained` is raised: the checkpoints are what is left. Who has
    nothing to train but a finished checkpoint to take over needs no room beside the weights.

    Args:
        model: it ends on the device where it began, in evaluation mode. Its blocks may lie in mapped files if they are
            to be spread.
        train, validation: rows of `tokenize_examples` or of `pack`.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    logger.info("training %s of %s parameters on %d examples", f"{trainable:,}", f"{total:,}", len(train))
    everything = options.dtype == "float32"
    last = last_complete_checkpoint(problem.out / phase.folder)
    progress = Progress() if last is None else read_progress(last)
    if last is not None:
        logger.info("recovery goes on from %s", last)
    if options.sharding and collective.count() > 1:
        if not progress.finished:
            prepare = functools.partial(_to_float32, everything=everything)
            sharding.shard(model, ModelView(problem.model).layers, prepare, getattr(torch, options.dtype))
            _train(model, train, validation, options, problem, phase, last, progress)
        raise collective.Trained
    if last is None or not progress.finished:
        dtypes = _to_float32(model, everything=everything)
        last = _train(model, train, validation, options, problem, phase, last, progress)
        _cast(model, dtypes)
    kept, curve, metrics = _summarize(last, progress, phase)
    load_trained(model, kept)
    model.eval()
    metrics["loss"] = "nats per answer token" if options.completion_only else "nats per token"
    if metrics["eval_loss"] > metrics["initial_eval_loss"] and collective.count() == 1:  # else the parent says it
        logger.warning(
            "the recovery made the validation loss worse, from %.4f to %.4f: try a lower recovery.learning_rate than"
            " %g, or more data", metrics["initial_eval_loss"], metrics["eval_loss"], options.peak_learning_rate,
        )  # fmt: skip
    sizes = {"trainable_parameters": trainable, "num_examples": len(train), "num_validation_examples": len(validation)}
    return Fit(curve, {**metrics, **sizes})


def _train(
    model: PreTrainedModel | PeftModel | LossModule,
    train: Sequence[dict[str, list[int]]],
    validation: Sequence[dict[str, list[int]]],
    options: FineTuning,
    problem: RecoveryProblem,
    phase: Phase,
    checkpoint: Path | None,
    progress: Progress,
) -> Path:
    """Train to the end, from a checkpoint if there is one; the last checkpoint. ``progress`` counts on."""
    folder = problem.out / phase.folder
    begin, end = (round(share * options.num_steps(train)) for share in (phase.begin, phase.end))
    num_steps = max(1, end - begin)
    if (warmup := options.warmup(num_steps)) != options.warmup_steps:
        logger.warning(
            "recovery.warmup_steps=%d is cut to %d: the training has %d steps",
            options.warmup_steps, warmup, num_steps,
        )  # fmt: skip
    use_cache = model.config.use_cache  # the Trainer turns it off, for good
    arguments = training_arguments(options, folder, num_steps, problem.seed, use_cpu=model.device.type == "cpu")
    arguments.eval_on_start = checkpoint is None
    pad_token_id = problem.tokenizer.pad_token_id
    watch = Watch(model, folder, progress, options, phase, problem.log)
    trainer = RecoveryTrainer(
        watch,
        options.sharding and collective.count() > 1,
        model=model,
        args=arguments,
        train_dataset=[*train, blank(train[0])],
        eval_dataset=share_of_process(validation),
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
    checkpoint = last_complete_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def _to_float32(module: nn.Module, *, everything: bool) -> dict[str, torch.dtype]:
    """Cast what trains, or every parameter but quantised and spread ones; what they were, by name."""
    dtypes = {
        name: parameter.dtype
        for name, parameter in module.named_parameters()
        if (everything or parameter.requires_grad)
        and parameter.is_floating_point()
        and not isinstance(parameter, DTensor)
    }
    _cast(module, dict.fromkeys(dtypes, torch.float32))
    return dtypes


def _cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, dtype in dtypes.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)


def _summarize(last: Path, progress: Progress, phase: Phase) -> tuple[Path, list[dict[str, float]], dict[str, Any]]:
    """The checkpoint to keep, the curve, and the metrics, of a training that is over."""
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    logged = [row for row in state.log_history if "loss" in row]
    validated = [row for row in state.log_history if "eval_loss" in row]
    previous = [0.0] + [row["step"] for row in logged[:-1]]
    total = sum(row["loss"] * (row["step"] - before) for row, before in zip(logged, previous, strict=True))
    metrics = {
        "train_loss": total / state.global_step,
        "initial_eval_loss": validated[0]["eval_loss"],
        "eval_loss": state.best_metric if phase.keep == "best" else validated[-1]["eval_loss"],
        "best_step": state.best_global_step if phase.keep == "best" else state.global_step,
        "num_steps": state.global_step,
        "num_tokens": progress.num_tokens,
        "num_label_tokens": progress.num_label_tokens,
        "seconds": round(progress.seconds, 3),
    }
    curve = [phase.row(row, row["step"]) for row in state.log_history]
    curve = [row for row in curve if len(row) > 1]
    if phase.keep == "last":
        return last, curve, metrics
    assert state.best_model_checkpoint is not None  # the last step is always evaluated
    return last.parent / Path(state.best_model_checkpoint).name, curve, metrics
