"""Repairs with their defaults, and plans for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slm_pipeline.config import CalibrationConfig
from slm_pipeline.repair.refit import Refit
from slm_pipeline.repair.rescale import Rescale
from slm_pipeline.surgery.plan import Plan

CALIBRATION = CalibrationConfig(source="bundled", num_samples=20, seq_len=12)


def refit(
    *,
    reads: Sequence[float] = (),
    weighting: str = "inverse_square",
    shares: Sequence[float] = (),
    **options: Any,
) -> Refit:
    """What writes alone is fitted, unless ``reads`` says more, in one walk for each ridge."""
    return Refit(calibration=CALIBRATION, reads=[*reads], weighting=weighting, shares=[*shares], **options)


def rescale() -> Rescale:
    return Rescale(calibration=CALIBRATION)


def plan_of(*ops: Any, num_layers: int = 6, **more: Any) -> Plan:
    plan = Plan({"name": "m", "fingerprint": "f", "num_layers": num_layers}, "test", {}, None, list(ops), **more)
    plan.check("the plan")
    return plan
