"""The one number that a job returns to a sweeper that searches, such as Optuna's. See sweeps/search.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slm_pipeline.config import Config
from slm_pipeline.errors import UserError
from slm_pipeline.results.columns import flat_metrics
from slm_pipeline.results.measurement import corpus_labels

OVER_BUDGET = 1e9  # what each layer above `objective.max_layers` counts, far beyond any score or perplexity


def names(config: Config) -> list[str]:
    """The metrics that a job of this configuration measures, by the names of `flat_metrics`."""
    found = ["num_layers", "parameters"] if "merge" in config.stages else []
    if "evaluate" not in config.stages:
        return found
    evaluation = config.evaluation
    for target in evaluation.of:
        if target == "recovered" and "_target_" not in (config.recovery or {}):  # recovery=none
            continue
        if evaluation.tasks:
            found += [f"{target}/{task}" for task in [*evaluation.tasks, "average"]]
        found += [f"{target}/perplexity/{label}" for label in corpus_labels(evaluation.perplexity.corpora).values()]
    return found


def check(config: Config) -> None:
    """Raise `UserError` unless the job will measure its objective."""
    objective = config.objective
    if objective.direction not in ("minimize", "maximize"):
        raise UserError(f"objective.direction={objective.direction!r} is not one of minimize, maximize")
    if objective.max_layers is not None and objective.metric is None:
        raise UserError(f"objective.max_layers={objective.max_layers} is a budget for objective.metric, which is null")
    if objective.max_layers is not None and "num_layers" not in names(config):
        raise UserError("objective.max_layers needs the merge stage, which finds how many layers are left")
    if objective.metric is not None and objective.metric not in (known := names(config)):
        raise UserError(f"objective.metric={objective.metric!r} is not measured by this job; it measures: {known}")


def value(config: Config, summary: Mapping[str, Any]) -> float | None:
    """What a finished job is worth to the sweeper; None without an objective.

    A plan of more layers than ``objective.max_layers`` is worth nothing, but the search has to learn where the budget
    lies: it gets `OVER_BUDGET` for each layer too many, on the bad side, instead of the metric.

    Args:
        summary: the content of summary.json.

    Raises:
        UserError: the metric is missing or not finite; Optuna's sweeper cannot go on with such a number.
    """
    objective = config.objective
    if objective.metric is None:
        return None
    found = flat_metrics(summary)
    if objective.max_layers is not None and found["num_layers"] > objective.max_layers:
        worst = OVER_BUDGET * (found["num_layers"] - objective.max_layers)
        return worst if objective.direction == "minimize" else -worst
    if objective.metric not in found:
        raise UserError(f"objective.metric={objective.metric!r} was not measured; there is: {sorted(found)}")
    if not math.isfinite(found[objective.metric]):
        raise UserError(f"objective.metric={objective.metric!r} is {found[objective.metric]}, not a number to compare")
    return float(found[objective.metric])
