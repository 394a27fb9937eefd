"""What Hydra calls around each job; see ``hydra.callbacks`` in conf/config.yaml."""

from __future__ import annotations

from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig


class SmallJobReturn(Callback):
    """Keeps a study's memory flat: Hydra would hold two copies of each job's whole configuration until the last ends.

    They are in the job's ``.hydra`` folder, and what is left says how the job went and what it returned.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            job_return.cfg = job_return.hydra_cfg = None
