"""Base of the recoveries that train on examples: data, schedule and budget, the same for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
from slm_pipeline.machine import ranks
from slm_pipeline.recovery.base import Recovery, RecoveryProblem, RecoveryResult
from slm_pipeline.recovery.freezing import freeze_all_but

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.source import ModelSource

LARGE = 1_000_000_000  # parameters of the dense model from which on published learning rates are the default


@dataclass(kw_only=True)
class FineTuning(Recovery):
    """Base of the recoveries that train on examples (`slm_pipeline.data.examples`).

    The defaults are the settings of the SLM authors (LLM-Pruner's Alpaca recipe), for one GPU: AdamW, linear decay
    after the warm-up, gradients clipped to norm 1, loss on the output only, the checkpoint with the lowest validation
    loss kept (where layers learn states: the last). Their data set is ``source=hub``. Their learning rate, 1e-4, is
    that of models of their size.

    Attributes:
        learning_rates: of dense models below `LARGE` parameters, chosen in docs/recovery.md on one of 135 million, and
            of larger ones, published.
    """

    learning_rates: ClassVar[tuple[float, float]] = (2e-3, 1e-4)

    source: str = "bundled"  # bundled | hub | file
    path: FilePath | None = None  # file: .json, .jsonl or .txt, or a folder of them: instructions, chats or texts
    repo: str = "yahma/alpaca-cleaned"  # hub: a data set of the same, or a local folder in the hub's layout
    revision: str = "main"  # hub: commit, tag or branch
    num_examples: Count | None = None  # examples to train on; None: all that validation leaves
    validation_size: Count = 2000  # examples held out
    split_seed: Seed = 42
    learning_rate: Positive | None = None  # null: by the size of the dense model, see `learning_rates`
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
    warmup_steps: CountOrZero = 100  # see `warmup`
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
        super().__post_init__()
        for name, allowed in (
            ("source", examples.SOURCES),
            ("dtype", ("bfloat16", "float32")),
            ("schedule", ("linear", "cosine", "constant")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"recovery.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        self.refuse_unless("path", source="file")
        self.refuse_unless("repo", "revision", source="hub")
        if self.final_learning_rate and self.schedule != "cosine":
            raise UserError(
                f"recovery.final_learning_rate={self.final_learning_rate} needs recovery.schedule=cosine,"
                f" not {self.schedule}"
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
        if self.sharding and self.num_processes == 1 and ranks.launched() is None:
            raise UserError("recovery.sharding=true spreads the model over recovery.num_processes, which is 1")

    @property
    def places_blocks(self) -> bool:
        return self.sharding

    def refuse_unless(self, *names: str, **needed: str) -> None:
        """Raise `UserError` if one of ``names`` is set although an option that it ``needed`` has another value."""
        ((option, value),) = needed.items()
        for name in names:
            given = getattr(self, name)
            if getattr(self, option) != value and given != type(self).__dataclass_fields__[name].default:
                raise UserError(f"recovery.{name}={given} needs recovery.{option}={value}, not {getattr(self, option)}")

    def check(self, source: ModelSource, num_layers: int | None) -> None:
        """Raise `UserError` if the model's architecture or device does not go with packing or several processes."""
        self._check_launched()
        if self.packing and not source.architecture.packs:
            raise UserError(
                f"recovery.packing=true: a {source.model_type} model in transformers lets packed examples see each"
                " other; use recovery.packing=false"
            )
        allowed = ["auto", "cuda", "cpu", *(["balanced"] if self.places_blocks else [])]
        if self.num_processes > 1 and source.config.device not in allowed:
            raise UserError(
                f"recovery.num_processes={self.num_processes}: each process takes a GPU of its own, so model.device="
                f"{source.config.device} cannot be; use model.device={', '.join(allowed[:-1])} or {allowed[-1]}"
            )

    def _check_launched(self) -> None:
        """Raise `UserError` if the processes of a launcher cannot share out what an optimizer step is made of."""
        place = ranks.launched()
        if place is None:
            return
        if self.num_processes > 1:
            raise UserError(
                f"recovery.num_processes={self.num_processes}: {place.launcher} has started {place.count} processes,"
                " which train together; leave it at 1"
            )
        if self.batch_size % (self.micro_batch_size * place.count):
            raise UserError(
                f"recovery.micro_batch_size={self.micro_batch_size} for each of the {place.count} processes of"
                f" {place.launcher} must divide recovery.batch_size={self.batch_size}"
            )

    def preflight(self, source: ModelSource, data_dir: Path | None) -> None:
        """Raise `UserError` unless examples of each split bear a loss, and the GPUs are those that training can use."""
        from slm_pipeline.models.loading import load_dense_tokenizer, resolve_device

        if source.config.device.startswith("cuda:") and source.config.device != "cuda:0":
            raise UserError(
                f"model.device={source.config.device}: a recovery trains on the first GPU in sight; let"
                " CUDA_VISIBLE_DEVICES show that one alone, and use model.device=cuda"
            )
        if self.num_processes > 1 and resolve_device(source.config.device) != "cpu":
            from torch.cuda import device_count

            if self.num_processes > device_count():
                raise UserError(
                    f"recovery.num_processes={self.num_processes}: each process needs a GPU of its own, and this"
                    f" machine has {device_count()}"
                )
        self.check_tokens(load_dense_tokenizer(source), data_dir)

    def options(self) -> dict[str, Any]:
        """Without the place of the file: what is in it stands in `identity`."""
        return {**super().options(), "path": None}

    def activations(self, sizes: Sizes, *, layers: int | None = None, adapters: bool = False) -> int:
        """Bytes that a micro batch of full rows keeps for the way back, roughly: in each block the states around its
        norms, queries, keys and values, the hidden neurons, and what enters each projection, with ``adapters`` also
        what dropout leaves out; then logits, in float32 as well, and their gradient.

        Args:
            layers: from the top, that a gradient goes through; None: all.
        """
        tokens, wide = self.micro_batch_size * self.cutoff_len, 4 if self.dtype == "float32" else 2
        inner = (sizes.inputs + 2) * sizes.neurons + 2 * (sizes.queries + sizes.keys)
        entering = (3 + sizes.inputs) * sizes.hidden + sizes.queries + sizes.neurons
        block = tokens * (4 * 4 * sizes.hidden + wide * inner + (wide + adapters) * entering)
        number = sizes.layers if layers is None else min(layers, sizes.layers)
        blocks = number * block
        if self.gradient_checkpointing:
            blocks = sizes.states(tokens, number) + block
        return blocks + tokens * sizes.vocabulary * (2 * wide + 8)

    def training(self, sizes: Sizes, trained: int, *, frozen: int | None = None) -> int:
        """Bytes of weights, gradients and moments of a training of ``trained`` parameters, in one of the processes.

        What trains is float32, with a gradient and AdamW's two moments; under autocast a copy in 16 bits is kept for
        the way back. Spread over processes each has its part, two blocks whole in the type that is computed with, the
        gradients of one, and what lies outside the blocks; not spread, a second gradient that is being averaged.

        Args:
            frozen: bytes of the weights that do not train; None: all others of the model.
        """
        if frozen is None:
            frozen = sizes.weights - sizes.item_bytes * trained
        place = ranks.launched()
        processes = self.num_processes if place is None else place.count
        wide = 4 if self.dtype == "float32" else 2
        held = max(0, frozen) + 16 * trained
        if self.sharding:
            whole = 2 * sizes.block_parameters + sizes.outer_parameters
            return held // processes + wide * (whole + sizes.block_parameters)
        copies = 0 if self.dtype == "float32" else wide * trained
        return held + copies + (4 * trained if processes > 1 else 0)

    def identity(self, data_dir: Path | None) -> dict[str, Any]:
        fingerprint = examples.examples_fingerprint(
            self.source, path=self.path, repo=self.repo, revision=self.revision, data_dir=data_dir
        )
        if self.source == "file":
            self.examples(data_dir)  # too few examples are found now, not after the merge
        return {**super().identity(data_dir), "data": {"source": self.source, "fingerprint": fingerprint}}

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
        """Find out whether there is anything to train on, without tokenizing more than it takes.

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

    def choose_learning_rate(self, num_parameters: int | None) -> None:
        """Settle on the usual learning rate for a dense model of so many parameters, if none was asked for. A model of
        unknown size counts as large: too low a rate wastes time, too high a one the model."""
        if self.learning_rate is None:
            small, large = self.learning_rates
            self.learning_rate = small if num_parameters is not None and num_parameters < LARGE else large

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up; that for small models where nobody has settled on one."""
        return self.learning_rates[0] if self.learning_rate is None else self.learning_rate

    def warmup(self, num_steps: int) -> int:
        """Steps until the learning rate is whole: ``warmup_steps``; of a training with no more than these, a tenth."""
        return self.warmup_steps if self.warmup_steps < num_steps else num_steps // 10

    def train_modules(self, problem: RecoveryProblem, modules: Iterable[nn.Module]) -> RecoveryResult:
        """Train these parts of the pruned model, and nothing else, on the language-model loss."""
        from slm_pipeline.recovery.training_loop import fit

        train, validation = self.tokenized_split(problem.tokenizer, problem.data_dir)
        freeze_all_but(problem, modules)
        trained = fit(problem.model, train, validation, self, problem)
        problem.model.requires_grad_(True)
        return RecoveryResult(problem.model, trained.metrics, trained.curve)
