"""What Hydra keeps of a study's jobs."""

from __future__ import annotations

import gc
import weakref

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from slm_pipeline.callbacks import ForgetJob


class Model:
    """Stands for gigabytes."""


def failed_job(model: Model) -> JobReturn:
    try:
        raise ValueError("out of memory")
    except ValueError as error:
        return JobReturn(status=JobStatus.FAILED, _return_value=error, cfg=OmegaConf.create({"seed": 1}))


def test_a_failed_job_of_a_study_lets_go_of_its_model():
    config = OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN}})
    model = Model()
    alive = weakref.ref(model)
    job_return = failed_job(model)
    del model
    gc.collect()
    assert alive() is not None  # the traceback holds it
    ForgetJob().on_job_end(config, job_return)
    assert alive() is None
    assert job_return.cfg is None
    assert str(job_return._return_value) == "out of memory"
