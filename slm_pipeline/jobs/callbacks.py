"""What Hydra calls around each job, as ``hydra.callbacks`` in conf/config.yaml tells it."""

from __future__ import annotations

import traceback
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from slm_pipeline.errors import portable
from slm_pipeline.jobs import study
from slm_pipeline.machine import memory
from slm_pipeline.store import run_folder


class MarkRun(Callback):
    """Marks the folder of a single run before Hydra writes to it; those of a study are known by its study.json."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        run_folder.mark(study.folder(config, "hydra.run.dir"))


class WriteStudy(Callback):
    """Leaves study.json in the folder of a multirun before its first job."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        study.begin(config)


class ForgetJob(Callback):
    """Keeps a study's memory flat: what Hydra holds of each job until the last one ends is small.

    Two copies of its whole configuration go (they lie in the job's ``.hydra`` folder), and of a failed job the model
    and whatever else its functions had in hand; the error and its traceback stay. An error that cannot travel from a
    worker process would take the worker with it: its message goes instead.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        job_return.cfg = job_return.hydra_cfg = None
        if job_return.status == JobStatus.FAILED:
            _clear_frames(job_return._return_value)
            memory.free()
            job_return._return_value = portable(job_return._return_value)


def _clear_frames(error: BaseException) -> None:
    """Let go of the frames of the error, and of all errors that led to it."""
    seen, waiting = set(), [error]
    while waiting:
        error = waiting.pop()
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        waiting += [cause for cause in (error.__cause__, error.__context__) if cause and id(cause) not in seen]
