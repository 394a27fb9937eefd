"""What Hydra keeps of a study's jobs."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from slm_pipeline.jobs.callbacks import ForgetJob

MULTIRUN = OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN}})


class Model:
    """Stands for gigabytes."""


class Demanding(Exception):
    """Cannot be rebuilt from its message, like many a library's."""

    def __init__(self, message: str, *, request: str) -> None:
        super().__init__(message)


def failed_job(*models: Model) -> JobReturn:
    """A job whose error, and what that came from, has models in its frames."""

    def stage(model: Model, cause: Model) -> None:
        try:
            load(cause)
        except ValueError as error:
            raise RuntimeError("boolq does not fit") from error

    def load(model: Model) -> None:
        raise ValueError("out of memory")

    try:
        stage(*models)
    except RuntimeError as error:
        return JobReturn(status=JobStatus.FAILED, _return_value=error, cfg=OmegaConf.create({"seed": 1}))
    raise AssertionError


def test_a_failed_job_of_a_study_lets_go_of_its_models():
    models = [Model(), Model()]
    alive = [weakref.ref(model) for model in models]
    job_return = failed_job(*models)
    del models
    gc.collect()
    assert all(reference() is not None for reference in alive)  # the tracebacks hold them
    ForgetJob().on_job_end(MULTIRUN, job_return)
    assert all(reference() is None for reference in alive)
    assert job_return.cfg is None
    assert str(job_return._return_value) == "boolq does not fit"
    assert isinstance(job_return._return_value.__cause__, ValueError)


def test_an_error_lets_go_of_what_it_came_from_and_of_what_it_came_during():
    def during(model: Model) -> None:
        raise ValueError("during")

    def cause(model: Model) -> None:
        raise KeyError("cause")

    def fail(function: Callable[[Model], None], model: Model) -> Exception:
        try:
            function(model)
        except Exception as error:
            return error
        raise AssertionError

    models = [Model(), Model()]
    alive = [weakref.ref(model) for model in models]
    error = RuntimeError("last")
    error.__context__, error.__cause__ = fail(during, models[0]), fail(cause, models[1])
    del models
    ForgetJob().on_job_end(MULTIRUN, JobReturn(status=JobStatus.FAILED, _return_value=error))
    assert all(reference() is None for reference in alive)


def test_an_error_that_cannot_be_sent_from_a_worker_goes_as_its_message():
    try:
        raise Demanding("the hub said no", request="GET")
    except Demanding as error:
        job_return = JobReturn(status=JobStatus.FAILED, _return_value=error)
    with pytest.raises(TypeError, match="request"):
        pickle.loads(pickle.dumps(job_return._return_value))
    ForgetJob().on_job_end(MULTIRUN, job_return)
    sent = pickle.loads(pickle.dumps(job_return._return_value))
    assert repr(sent) == "RuntimeError('Demanding: the hub said no')"
