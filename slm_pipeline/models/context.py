"""What a group of options is checked in: the job around it, as far as it is known before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slm_pipeline.config import Config
from slm_pipeline.models.source import ModelSource


@dataclass(frozen=True)
class Context:
    """The job around a group of options.

    Attributes:
        config: the whole configuration.
        source: the dense model.
        command: the command line that gave this configuration.
    """

    config: Config
    source: ModelSource
    command: str

    @property
    def data_dir(self) -> Path | None:
        """Where relative data paths are looked up; None: the working directory."""
        return Path(self.config.data_dir).expanduser().absolute() if self.config.data_dir else None


class OptionGroup(Protocol):
    """The one object that a group of options becomes."""

    def check(self, context: Context) -> None:
        """Raise `UserError` for what the user can get wrong and can be known without loading the model."""

    def identity(self) -> dict[str, Any]:
        """What results depend on of these options and of what they name, as JSON for the artefacts' keys."""
