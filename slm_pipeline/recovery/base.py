"""What every recovery is: a dataclass of options that trains a pruned model and gives it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from slm_pipeline.config import ranges
from slm_pipeline.config.ranges import (
    BatchSize,
    Count,
    CountOrZero,
    FilePath,
    NotNegative,
    NumProcesses,
    Positive,
    Seed,
    Share,
    Tokens,
    TotalTokens,
)
from slm_pipeline.data import batches, examples, tokens
from slm_pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pipeline.models.source import ModelSource
    from slm_pipeline.surgery.plan import Plan


@dataclass
class RecoveryResult:
    """A recovered model and how it got there.

    Attributes:
        model: of the same class, dtype and device as the pruned one.
        metrics: what ``stage.json`` and the tables show, JSON values; ``loss`` says what the losses are,
            ``num_tokens`` and ``seconds`` what was spent.
        curve: ``{"step", "loss", "learning_rate"}`` and ``{"step", "eval_loss"}`` in the order logged; with
            ``logit_`` before the names of losses where `Distill` trains on logits.
    """

    model: PreTrainedModel
    metrics: dict[str, Any]
    curve: list[dict[str, float]]


@dataclass(frozen=True)
class RecoveryProblem:
    """All that a recovery gets.

    Attributes:
        teacher: loads the dense model.
        model: the pruned model on its device, in evaluation mode; the recovery may change it.
        plan: how the pruned model came out of the dense one.
        out: where checkpoints and results go. It survives a kill: called again with the same ``out``, the training
            goes on from its last complete checkpoint and ends as if it had not been interrupted. What lies in
            ``out/checkpoints`` is deleted when the recovered model is safe.
        base_path: where the pruned model will be found, if it is kept (``keep=model``); adapters record it.
        seed: of everything random.
        data_dir: where relative data paths are looked up; None: the working directory.
        log: called with metrics and the optimizer step for every training and validation loss.
    """

    teacher: Callable[[], PreTrainedModel]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    out: Path
    base_path: str
    seed: int
    data_dir: Path | None
    log: Callable[[dict[str, float], int], None]


class Recovery(Protocol):
    """What the recover stage asks of an option of ``conf/recovery``."""

    name: ClassVar[str]
    num_processes: int  # that train together; more than one: started by `workers.train`

    def check(self, source: ModelSource, num_layers: int | None) -> None:
        """Raise `UserError` if it cannot work on this model; called before anything expensive.

        Args:
            num_layers: of the pruned model; None when that is not known before the merge.
        """
        ...

    def data_identity(self, data_dir: Path | None) -> dict[str, str]:
        """What the training data are, as JSON for the stage's key; cheap, without torch.

        Raises:
            UserError: the data are missing or malformed.
        """
        ...

    def preflight(self, source: ModelSource, data_dir: Path | None) -> None:
        """Raise `UserError` for what tokenizer and model configuration tell; called before the first stage runs."""
        ...

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        """Train.

        Raises:
            UserError: too little data, or a loss that is not finite.
        """
        ...


@dataclass
class TrainingOptions:
    """Data (see `examples`), schedule and budget, the same for every recovery.

    The defaults are the settings of the SLM authors (LLM-Pruner's Alpaca recipe), for one GPU: AdamW, linear decay
    after the warm-up, gradients clipped to norm 1, loss on the output only, the checkpoint with the lowest validation
    loss kept (where layers learn states: the last). Their data set is ``source=hub``. The learning rate is not theirs,
    1e-4, but chosen in docs/recovery.md, on a small model.
    """

    source: str = "bundled"  # bundled | hub | file
    path: FilePath | None = None  # file: .json, .jsonl or .txt, or a folder of them: instructions, chats or texts
    repo: str = "yahma/alpaca-cleaned"  # hub: a data set of the same, or a local folder in the hub's layout
    revision: str = "main"  # hub: commit, tag or branch
    num_examples: Count | None = None  # examples to train on; None: all that validation leaves
    validation_size: Count = 2000  # examples held out
    split_seed: Seed = 42
    learning_rate: Positive = 2e-3
    schedule: str = "linear"  # linear | cosine | constant, all after a linear warm-up
    final_learning_rate: Share = 0.0  # cosine: where it ends, as a share of learning_rate
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    num_epochs: Positive = 2.0  # training ends at the first of this and the next four
    max_steps: Count | None = None  # optimizer steps
    budget_tokens: TotalTokens | None = None  # input tokens without padding, turned into steps by their mean per step
    max_minutes: Positive | None = None  # of training and validating, over all attempts; cuts the schedule off
    early_stopping: Count | None = None  # validations in a row without a better loss that end the training
    batch_size: BatchSize = 64  # examples per optimizer step
    micro_batch_size: BatchSize = 4  # examples at a time in each process
    warmup_steps: CountOrZero = 100
    cutoff_len: Tokens = 256
    packing: bool = False  # several examples in a row, none sees another; a packed row then counts as one example
    completion_only: bool = True  # loss on outputs and on the assistant's turns only; else on prompts too
    eval_steps: Count = 100
    save_steps: Count = 200  # each new best is saved besides
    logging_steps: Count = 10
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"  # bfloat16 (autocast) | float32
    num_processes: NumProcesses = 1  # that train, each on a GPU of its own, on equal parts of every batch
    sharding: bool = False  # FSDP: each holds a part of weights, gradients and moments; not where layers learn states

    def __post_init__(self) -> None:
        ranges.check(self, "recovery.")
        for name, allowed in (
            ("source", examples.SOURCES),
            ("dtype", ("bfloat16", "float32")),
            ("schedule", ("linear", "cosine", "constant")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"recovery.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        self._refuse_idle("path", source="file")
        self._refuse_idle("repo", "revision", source="hub")
        if self.final_learning_rate and self.schedule != "cosine":
            raise UserError(
                f"recovery.final_learning_rate={self.final_learning_rate} needs recovery.schedule=cosine,"
                f" not {self.schedule}"
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise UserError(
                f"recovery.warmup_steps={self.warmup_steps} is not below recovery.max_steps={self.max_steps}"
            )
        if self.batch_size % self.micro_batch_size:
            raise UserError(
                f"recovery.micro_batch_size={self.micro_batch_size} must divide recovery.batch_size={self.batch_size}"
            )
        if self.batch_size % (self.micro_batch_size * self.num_processes):
            raise UserError(
                f"recovery.micro_batch_size={self.micro_batch_size} for each of"
                f" recovery.num_processes={self.num_processes} must divide recovery.batch_size={self.batch_size}"
            )
        if self.sharding and self.num_processes == 1:
            raise UserError("recovery.sharding=true spreads the model over recovery.num_processes, which is 1")

    def _refuse_idle(self, *names: str, **needed: str) -> None:
        """Raise `UserError` if one of the options is set, but not the one with the value that it needs."""
        ((option, value),) = needed.items()
        for name in names:
            given = getattr(self, name)
            if getattr(self, option) != value and given != type(self).__dataclass_fields__[name].default:
                raise UserError(f"recovery.{name}={given} needs recovery.{option}={value}, not {getattr(self, option)}")

    def check(self, source: ModelSource, num_layers: int | None) -> None:
        """Whether the model can be trained with these options; see `Recovery`."""
        if self.packing and not source.architecture.packs:
            raise UserError(
                f"recovery.packing=true: a {source.model_type} model in transformers lets packed examples see each"
                " other; use recovery.packing=false"
            )
        if self.num_processes > 1 and source.config.device not in ("auto", "cuda", "cpu"):
            raise UserError(
                f"recovery.num_processes={self.num_processes}: each process takes a GPU of its own, so model.device="
                f"{source.config.device} cannot be; use model.device=auto, cuda or cpu"
            )

    def preflight(self, source: ModelSource, data_dir: Path | None) -> None:
        """Some example of each split bears a loss, and the GPUs are those that training can use; see `Recovery`."""
        from slm_pipeline.models.loading import load_dense_tokenizer, resolve_device

        if source.config.device.startswith("cuda:") and source.config.device != "cuda:0":
            raise UserError(
                f"model.device={source.config.device}: a recovery trains on the first GPU in sight; let"
                " CUDA_VISIBLE_DEVICES show that one alone, and use model.device=cuda"
            )
        if self.num_processes > 1 and resolve_device(source.config.device) == "cuda":
            from torch.cuda import device_count

            if self.num_processes > device_count():
                raise UserError(
                    f"recovery.num_processes={self.num_processes}: each process needs a GPU of its own, and this"
                    f" machine has {device_count()}"
                )
        self.check_tokens(load_dense_tokenizer(source), data_dir)

    def data_identity(self, data_dir: Path | None) -> dict[str, str]:
        """What the training data are; see `Recovery`."""
        fingerprint = examples.examples_fingerprint(
            self.source, path=self.path, repo=self.repo, revision=self.revision, data_dir=data_dir
        )
        if self.source == "file":
            self.examples(data_dir)  # too few examples are found now, not after the merge
        return {"source": self.source, "fingerprint": fingerprint}

    def tokenized_split(
        self, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None
    ) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
        """Training and validation rows of `tokens.tokenize_example`, or of `batches.pack`."""
        train, validation = (
            tokens.tokenize_examples(tokenizer, part, self.cutoff_len, completion_only=self.completion_only)
            for part in self.examples(data_dir)
        )
        if self.packing:
            return batches.pack(train, self.cutoff_len), batches.pack(validation, self.cutoff_len)
        return train, validation

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None) -> None:
        """Find out whether there is anything to train on; see `tokens.check_tokens`.

        Raises:
            UserError: no training example, or no validation example, bears loss within ``cutoff_len``; or no data.
        """
        for part in self.examples(data_dir):
            tokens.check_tokens(tokenizer, part, self.cutoff_len, completion_only=self.completion_only)

    def examples(self, data_dir: Path | None) -> tuple[list[examples.Example], list[examples.Example]]:
        """Training and validation examples, which share nothing.

        Raises:
            UserError: the data are missing, malformed or too few.
        """
        everything = examples.load_examples(
            self.source, path=self.path, repo=self.repo, revision=self.revision, data_dir=data_dir
        )
        return examples.split_examples(
            everything, validation_size=self.validation_size, num_examples=self.num_examples, seed=self.split_seed
        )

    def num_steps(self, train: Sequence[dict[str, list[int]]]) -> int:
        """Optimizer steps, unless ``max_minutes`` ends them earlier; the learning rate reaches 0 after the last."""
        steps_per_epoch = math.ceil(len(train) / self.batch_size)
        limits = [math.ceil(self.num_epochs * steps_per_epoch)]
        if self.max_steps is not None:
            limits.append(self.max_steps)
        if self.budget_tokens is not None:
            tokens_per_epoch = sum(len(row["input_ids"]) for row in train)
            limits.append(max(1, round(self.budget_tokens * steps_per_epoch / tokens_per_epoch)))
        return min(limits)
