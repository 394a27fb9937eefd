"""The one number that a job returns to a sweeper that searches, such as Optuna's. See sweeps/search.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from slm_pipeline.config import ObjectiveConfig
from slm_pipeline.errors import UserError
from slm_pipeline.results.devices import check_one_device
from slm_pipeline.results.number import Number

OVER_BUDGET = 1e9  # what each layer above `objective.max_layers` counts, far beyond any score or perplexity


def check(objective: ObjectiveConfig, known: Mapping[str, bool]) -> None:
    """Raise `UserError` unless the job will measure its objective.

    Args:
        known: keys of the numbers to come; False where the key may be the beginning of longer ones.
    """
    if objective.direction not in ("minimize", "maximize"):
        raise UserError(f"objective.direction={objective.direction!r} is not one of minimize, maximize")
    if objective.max_layers is not None and objective.metric is None:
        raise UserError(f"objective.max_layers={objective.max_layers} is a budget for objective.metric, which is null")
    if objective.max_layers is not None and "num_layers" not in known:
        raise UserError("objective.max_layers needs the merge stage, which finds how many layers are left")
    wanted = objective.metric
    if wanted is None or wanted in known:
        return
    if not any(wanted.startswith(f"{label}/") for label, whole in known.items() if not whole):
        names = [key if whole else f"{key}/..." for key, whole in known.items()]
        raise UserError(f"objective.metric={wanted!r} is not measured by this job; it measures: {names}")


def value(
    objective: ObjectiveConfig, numbers: Mapping[str, Number], others: Iterable[Mapping[str, Number]] = ()
) -> float | None:
    """What a finished job is worth to the sweeper; None without an objective.

    A plan of more layers than ``objective.max_layers`` is worth nothing, but the search has to learn where the budget
    lies: it gets `OVER_BUDGET` for each layer too many, on the bad side, instead of the metric.

    Args:
        numbers: all that the job measured, by key.
        others: the same of other jobs of the search; read only where the metric belongs to a device.

    Raises:
        UserError: the metric is missing or not finite, with which Optuna's sweeper cannot go on, or another job of the
            search measured it on another device.
    """
    if objective.metric is None:
        return None
    if objective.max_layers is not None and (layers := numbers["num_layers"].value) > objective.max_layers:
        worst = OVER_BUDGET * (layers - objective.max_layers)
        return worst if objective.direction == "minimize" else -worst
    if objective.metric not in numbers:
        raise UserError(f"objective.metric={objective.metric!r} was not measured; there is: {sorted(numbers)}")
    check_one_device(objective.metric, numbers[objective.metric], others)
    found = numbers[objective.metric].value
    if not math.isfinite(found):
        raise UserError(f"objective.metric={objective.metric!r} is {found}, not a number to compare")
    return float(found)
