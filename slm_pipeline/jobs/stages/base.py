"""What every stage is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.store.artifact import Artifact


class Stage(ABC):
    """A step of the pipeline whose result is an artefact.

    Attributes:
        name: unique within a job (evaluate_dense, evaluate_pruned, ...).
        stage: which of `config.STAGES` it belongs to; its folder in the store.
        needs: names of the stages whose results it reads.
        leaves: files and folders that every finished result has.
        folder: the link to its result, from the run's folder.
        looks_at: what `preflight` looks at; of several stages that look at the same, the first does it for all.
    """

    name: str
    stage: str
    needs: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return self.name

    @property
    def looks_at(self) -> str:
        return self.name

    @abstractmethod
    def identity(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any] | None:
        """What the result depends on; None while that is not known before an earlier stage has run."""

    def memory(self, job: Job, sizes: Sizes) -> int | None:
        """Bytes at the most of all that lies where the model does; None where that cannot be told beforehand."""
        return None

    def host_memory(self, job: Job, sizes: Sizes) -> int:
        """Bytes at the most in main memory, wherever the model lies, beside what the process itself takes; of each
        process there the same."""
        return 0

    def smaller(self, job: Job) -> Iterator[tuple[str, Stage, Job]]:
        """What makes the stage alone smaller, its batches, the largest first: in words, and the stage and job then."""
        return iter(())

    def preflight(self, job: Job) -> None:  # noqa: B027
        """Raise `UserError` for what is cheap to know and would end the stage; called before the first stage runs."""

    @abstractmethod
    def run(self, job: Job, results: Mapping[str, Artifact], out: Path, tracker: Tracker) -> dict[str, Any]:
        """Fill ``out``, which may hold what an earlier attempt noted as complete; returns what stage.json keeps as the
        result."""

    @abstractmethod
    def publish(self, artifact: Artifact, tracker: Tracker, *, reused: bool) -> None:
        """Log the finished result's numbers."""

    def is_whole(self, job: Job, artifact: Artifact) -> bool:
        """Whether the result is finished and has all that this job wants of it."""
        return artifact.done and all((artifact.path / name).exists() for name in self.leaves)
