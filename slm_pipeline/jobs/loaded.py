"""The models that evaluations have in memory: the one that is scored and, where a measure compares, the dense one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slm_pipeline.machine import memory, together

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Load = Callable[[], tuple[Any, Any]]  # a model and its tokenizer


@dataclass
class LoadedModels:
    """Loads a model when it is first asked for and keeps it for the measures to come, until another one is scored.

    Sent to another process it is that one's own: each has its models in its own memory.
    """

    _kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def get(self, target: str, load: Load, beside: str | None = None) -> tuple[Any, Any]:
        """The model and its tokenizer; of the others at most ``beside`` stays in memory."""
        for other in [name for name in self._kept if name not in (target, beside)]:
            del self._kept[other]
            memory.free()
        if target not in self._kept:
            self._kept[target] = load()
        return self._kept[target]

    def release(self) -> None:
        """Let go of all, in all processes: what comes needs the memory."""
        if self._kept:
            together.run(_let_go, self)

    def __reduce__(self) -> tuple[Callable[[], LoadedModels], tuple[()]]:
        return _of_this_process, ()


def _let_go(models: LoadedModels) -> None:
    models._kept.clear()
    memory.free()


@functools.cache
def _of_this_process() -> LoadedModels:
    return LoadedModels()


@dataclass(frozen=True)
class ScoredModel:
    """What a measure gets; see `slm_pipeline.evaluation.measure.Scored`."""

    target: str
    loaded: LoadedModels
    load: Load
    load_dense: Load
    reads_dense: bool

    @property
    def model(self) -> PreTrainedModel:
        return self._both()[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._both()[1]

    @property
    def dense(self) -> PreTrainedModel:
        return self.loaded.get("dense", self.load_dense, beside=self.target)[0]

    def _both(self) -> tuple[Any, Any]:
        return self.loaded.get(self.target, self.load, beside="dense" if self.reads_dense else None)
