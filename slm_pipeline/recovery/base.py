"""What a recovery is: a dataclass of options whose ``run`` changes the pruned model for the better and gives it back.

A new recovery is one file beside this one and one YAML in conf/recovery/ that names its class; nothing else. It is a
`Recovery` with a ``name`` and a ``run``; one that trains on examples is a `FineTuning`, which brings data, schedule and
budget, and whose ``run`` may be a line (see full.py). Recoveries are imported for ``slm dry_run=true``, so they import
torch, and what needs it, inside ``run``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config import plugins, ranges

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.source import ModelSource
    from slm_pipeline.surgery.plan import Plan

Log = Callable[[dict[str, float], int], None]  # metrics, and the optimizer step after which they were taken


@dataclass
class RecoveryResult:
    """A recovered model and how it got there.

    Attributes:
        model: of the same class and dtype as the pruned one, and on the same device, or in main memory.
        metrics: what ``stage.json`` and the tables show, JSON values: at least ``num_tokens`` and ``seconds``, what was
            spent, and with a curve ``loss``, which says what its losses are.
        curve: ``{"step", "loss", "learning_rate"}`` and ``{"step", "eval_loss"}`` in the order logged; with
            ``logit_`` before the names of losses where `Distill` trains on logits. Empty where nothing was trained.
    """

    model: PreTrainedModel
    metrics: dict[str, Any]
    curve: list[dict[str, float]]

    def __post_init__(self) -> None:
        if lacking := {"num_tokens", "seconds", *(["loss"] if self.curve else [])}.difference(self.metrics):
            raise ValueError(f"the metrics of a recovery lack {', '.join(sorted(lacking))}")


@dataclass(frozen=True)
class RecoveryProblem:
    """All that a recovery gets.

    Attributes:
        teacher: loads the dense model.
        model: the pruned model on its device, in evaluation mode; the recovery may change it. Of a recovery that
            `places_blocks` the blocks may lie in mapped files instead (`loading.load_mapped`).
        plan: how the pruned model came out of the dense one.
        out: where checkpoints and results go. It survives a kill: called again with the same ``out``, the training
            goes on from its last complete checkpoint and ends as if it had not been interrupted. What lies in
            ``out/checkpoints`` is deleted when the recovered model is safe.
        base_path: where the pruned model will be found, if it is kept (``keep=model``); adapters record it.
        seed: of everything random.
        data_dir: where relative data paths are looked up; None: the working directory.
        log: called for every training and validation loss.
    """

    teacher: Callable[[], PreTrainedModel]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    out: Path
    base_path: str
    seed: int
    data_dir: Path | None
    log: Log


@dataclass(kw_only=True)
class Recovery(ABC):
    """Base of all recoveries.

    Attributes:
        name: as in conf/recovery/<name>.yaml.
        num_processes: that run it together; more than one are started by `workers.train`.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        ranges.check(self, "recovery.")

    @property
    def num_processes(self) -> int:
        return 1

    @property
    def places_blocks(self) -> bool:
        """Whether it takes a model whose blocks lie in mapped files, where that is to be had, and brings each to where
        it trains. The recovered model then lies in main memory."""
        return False

    def options(self) -> dict[str, Any]:
        """What the recovered model depends on, as JSON; it goes into the artefact's key."""
        return asdict(self)

    def identity(self, data_dir: Path | None) -> dict[str, Any]:
        """The recovery's part of the artefact's key, as JSON: which it is, its options, its data; cheap, without torch.

        Raises:
            UserError: the data are missing or malformed.
        """
        code = plugins.code_of(type(self))
        return {"recovery": self.name, "options": self.options(), **({"plugins": code} if code else {})}

    def memory(self, sizes: Sizes) -> int | None:
        """Bytes at the most, the model's weights among them, of a model of these sizes; None where it is not known."""
        return None

    def host_memory(self, sizes: Sizes) -> int:
        """Bytes at the most in main memory, wherever the model lies."""
        return 0

    def check(self, source: ModelSource, num_layers: int | None) -> None:  # noqa: B027  # most work on any model
        """Raise `UserError` if it cannot work on this model; called before anything expensive, without torch.

        Args:
            num_layers: of the pruned model; None when that is not known before the merge.
        """

    def preflight(self, source: ModelSource, data_dir: Path | None) -> None:  # noqa: B027  # some need nothing
        """Raise `UserError` for what tokenizer and model configuration tell; called before the first stage runs."""

    @abstractmethod
    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        """Recover; what is to be kept beside the model goes into ``problem.out``.

        Raises:
            UserError: too little data, or a loss that is not finite.
        """
