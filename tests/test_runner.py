"""What a job leaves in memory."""

from __future__ import annotations

import weakref

import pytest

from slm_pipeline import runner
from slm_pipeline.errors import UserError


class Weights:
    pass


def test_a_failed_job_holds_no_model_however_long_its_error_is_kept():
    alive = []

    def load() -> None:
        weights = Weights()
        alive.append(weakref.ref(weights))
        raise RuntimeError(f"no memory for {weights}")

    def stage() -> None:
        weights = Weights()
        alive.append(weakref.ref(weights))
        try:
            load()
        except RuntimeError as error:
            raise UserError("does not fit into memory") from error

    with pytest.raises(UserError) as kept:
        stage()
    assert [reference() is None for reference in alive] == [False, False]
    runner._forget_variables(kept.value)
    assert [reference() is None for reference in alive] == [True, True]
