"""What Hydra calls around each job; see ``hydra.callbacks`` in conf/config.yaml."""

from __future__ import annotations

import traceback
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from slm_pipeline import study


class WriteStudy(Callback):
    """Leaves study.json in the folder of a multirun before its first job."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        study.begin(config)


class ForgetJob(Callback):
    """Keeps a study's memory flat: what Hydra holds of each job until the last one ends is small.

    Two copies of its whole configuration go (they lie in the job's ``.hydra`` folder), and of a failed job the model
    and whatever else its functions had in hand; the error and its traceback stay.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        job_return.cfg = job_return.hydra_cfg = None
        if job_return.status == JobStatus.FAILED:
            from slm_pipeline.runner import free_memory

            traceback.clear_frames(job_return._return_value.__traceback__)
            free_memory()
