"""What a repair is: a dataclass of options whose ``repair`` looks at both models and extends the plan.

A new repair is one file beside this one and one YAML in conf/repair/ that names its class; nothing else. No gradients:
what trains is a recovery. Repairs are imported for ``slm dry_run=true``, so they import torch, and the engine, inside
``repair``.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config import CalibrationConfig, plugins, ranges
from slm_pipeline.data.calibration import Calibration, Samples
from slm_pipeline.errors import UserError
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.view import ModelView


@dataclass(frozen=True)
class RepairProblem:
    """All that a repair gets.

    Attributes:
        view: the dense model, which must be left as it is.
        plan: any method's.
        input_ids: [num_samples, seq_len] int64 tokens of the repair's own calibration text.
        out: where finished pieces may be kept, so that a killed repair goes on.
        note_complete: to be called with the names of files in ``out`` that are whole.
        places: for each sample what it is cut from, as in `Samples.ids`; empty: each from a text of its own.
    """

    view: ModelView
    plan: Plan
    input_ids: Tensor
    out: Path
    note_complete: Callable[..., None]
    places: Sequence[Mapping[str, int]] = ()


@dataclass(kw_only=True)
class Repair(ABC):
    """Base of all repairs.

    Attributes:
        name: as in conf/repair/<name>.yaml.
        streams: whether it works on a model whose layers stay on disk, see `slm_pipeline.methods.base.Method`.
        calibration: the text that it looks at; that of the method, unless something else is said, but more of it, and
            where samples are random another draw: what a plan was found on is not all that it is repaired on.
    """

    name: ClassVar[str]
    streams: ClassVar[bool] = False
    shares_samples: ClassVar[bool] = False

    calibration: CalibrationConfig

    def __post_init__(self) -> None:
        ranges.check(self, "repair.")

    def options(self) -> dict[str, Any]:
        """What the repaired plan depends on beside the text, as JSON; it goes into the artefact's key."""
        values = asdict(self)
        del values["calibration"]
        return values

    def samples(self, tokenizer: Any, data_dir: Path | None) -> Samples:
        """What it looks at.

        Raises:
            UserError: the text is shorter than the samples need.
        """
        with _said_of_the_repair():
            return self._text(data_dir).sample(tokenizer)

    def identity(self, data_dir: Path | None) -> dict[str, Any]:
        """The repair's part of the artefact's key, as JSON; cheap, without torch.

        Raises:
            UserError: the text is missing or too short.
        """
        code = plugins.code_of(type(self))
        with _said_of_the_repair():
            text = self._text(data_dir).identity()
        return {
            "repair": self.name,
            "options": self.options(),
            "calibration": text,
            **({"plugins": code} if code else {}),
        }

    def _text(self, data_dir: Path | None) -> Calibration:
        return Calibration(self.calibration, data_dir, draw="repair")

    def memory(self, sizes: Sizes) -> int | None:
        """Bytes at the most beside the weights; None where that is not known. ``sizes`` has the repair's own text."""
        return None

    def host_memory(self, sizes: Sizes) -> int:
        """Bytes at the most in main memory, wherever the model lies."""
        return 0

    def check(self, context: Context) -> None:
        """Raise `UserError` if it cannot work on this model, or its text is missing; called before anything
        expensive."""
        self.identity(context.data_dir)

    @abstractmethod
    def repair(self, problem: RepairProblem) -> Plan:
        """The plan with operations that repair what it left, or the same plan where nothing helps; what was measured
        stands in its ``scores["repair"]``.

        Raises:
            UserError: the model's numbers are not finite.
        """


@contextmanager
def _said_of_the_repair() -> Iterator[None]:
    """A calibration's errors and log lines name the options of the job's own; here they are the repair's."""

    def renamed(record: logging.LogRecord) -> bool:
        record.msg, record.args = _of_the_repair(record.getMessage()), ()
        return True

    spoken = logging.getLogger(Calibration.__module__)
    spoken.addFilter(renamed)
    try:
        yield
    except UserError as error:
        raise UserError(_of_the_repair(str(error))) from error
    finally:
        spoken.removeFilter(renamed)


def _of_the_repair(words: str) -> str:
    names = "source|path|num_samples|seq_len|sampling|bos"
    said = re.sub(rf"(?<!\.)\bcalibration\.(?=(?:{names})=)", "repair.calibration.", words)
    return re.sub(r"\bcalibration=", "repair.calibration.source=", said)


def extended(plan: Plan, **changes: Any) -> Plan:
    """The plan with other ``ops``, ``tensors`` or ``scores``, checked."""
    found = Plan(**{**vars(plan), **changes})
    found.check("the repaired plan")
    return found
