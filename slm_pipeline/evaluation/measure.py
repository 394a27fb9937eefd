"""What a measure is: a dataclass of options that scores a model and says what numbers came of it.

A new measure is one file beside this one and one YAML in conf/measure/ that names its class; nothing else. Measures are
imported for ``slm dry_run=true``, so they import torch, and lm-eval, inside ``run`` and ``preflight``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from slm_pipeline.config import TARGETS, ranges
from slm_pipeline.models.context import Context
from slm_pipeline.results.number import Number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pipeline.models.sizes import Sizes


class Scored(Protocol):
    """The model that is scored, loaded when it is first asked for."""

    @property
    def model(self) -> PreTrainedModel:
        """On its device, in evaluation mode; a measure leaves it as it is."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own."""

    @property
    def dense(self) -> PreTrainedModel:
        """The dense model, for those that compare; see `Measure.reads_dense`."""


@dataclass(kw_only=True)
class Measure(ABC):
    """Base of all measures.

    What can be measured on its own, such as a task or a text, is a *part*: a result in the store that every job shares
    which asks for it. Parts are names; a measure without any is off.

    Attributes:
        name: as in conf/measure/<name>.yaml.
        of: the models that it can score.
        shares_samples: whether processes that a launcher started share out its text or its requests, each with the
            models in its own memory; else the first measures alone, while the others wait.
        version: raise it when the numbers of equal settings change.
    """

    name: ClassVar[str]
    of: ClassVar[Sequence[str]] = TARGETS
    version: ClassVar[int] = 1
    shares_samples: ClassVar[bool] = False

    def __post_init__(self) -> None:
        ranges.check(self, f"evaluation.{self.name}.")

    @property
    def reads_dense(self) -> bool:
        """Whether the dense model is loaded beside the one that is scored."""
        return False

    def parts(self) -> list[str]:
        """What is measured, one by one; ``[""]`` for a measure of a single part."""
        return [""]

    def label(self, part: str) -> str:
        """What stands before the names of a part's numbers, after the model's: ``perplexity/bundled``."""
        return f"{self.name}/{part}" if part else self.name

    def names(self, part: str) -> list[str] | None:
        """The names of a part's numbers, as far as they are known before they are measured; None if they are not."""
        return None

    def check(self, context: Context) -> None:  # noqa: B027  # most have no more to say than their ranges
        """Raise `UserError` for what is wrong and can be known without a tokenizer or a model."""

    def warnings(self, context: Context) -> list[str]:
        """What may not be as meant although it can be measured."""
        return []

    def lengths(self) -> dict[str, int]:
        """Option -> tokens in a row that it gives the model, for those that have to fit its positions."""
        return {}

    @abstractmethod
    def identity(self, part: str, context: Context) -> dict[str, Any]:
        """What the part's numbers depend on besides the model, as JSON: settings, and what the data hold, not where
        they lie. Cheap; it goes into the key of the result.

        Raises:
            UserError: the data are missing or malformed.
        """

    def settings(self, *aside: str) -> dict[str, Any]:
        """The options, as JSON, but for some: the start of many an `identity`."""
        return {name: value for name, value in asdict(self).items() if name not in aside}

    def preflight(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> None:  # noqa: B027
        """Raise `UserError` for what the tokenizer tells; called before the first stage runs."""

    @abstractmethod
    def run(self, part: str, scored: Scored, context: Context) -> dict[str, Any]:
        """Measure; what came of it and how, as JSON. Of processes that share it what the first returns counts.

        Raises:
            UserError: it cannot be measured; says why.
        """

    @abstractmethod
    def numbers(self, part: str, found: Mapping[str, Any]) -> list[Number]:
        """The numbers in what `run` returned. Keys are names within the part, empty for its only one; their
        ``measured`` needs no ``measure``, that is added."""

    def totals(self, found: Mapping[str, Mapping[str, Any]]) -> list[Number]:
        """Numbers over all parts, given what `run` returned for each; keys are those after the model's."""
        return []

    def names_of_totals(self) -> list[str]:
        """The keys of `totals`."""
        return []

    def memory(self, part: str, sizes: Sizes) -> int | None:
        """Bytes at the most beside the models' weights; None where it is not known."""
        return None

    def smaller(self, part: str) -> Iterator[tuple[str, Measure, str]]:
        """What takes less, the largest first: in words, and the measure and its part then. Smaller batches."""
        other: Any = self
        size = getattr(other, "batch_size", 1)
        while size > 1:
            size //= 2
            other = replace(other, batch_size=size)
            yield f"evaluation.{self.name}.batch_size={size}", other, part

    def texts(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> list[str]:
        """The documents that the part reads, to be looked for in a recovery's training data."""
        return []
