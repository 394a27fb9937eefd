"""What a method is asked, in one place: every test makes its `PruningProblem` here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.models.source import ModelSource
from slm_pipeline.models.view import ModelView


def problem_of(
    model: Any,
    source: ModelSource,
    input_ids: Any,
    *,
    num_remove: int | None = None,
    num_parameters: int = 0,
    threshold: float | None = None,
    refine: int = 5,
    exhaustive: bool = False,
    statistics: Any = None,
    calibration: dict[str, Any] | None = None,
    memo: Path | None = None,
    forced: bool = False,
) -> PruningProblem:
    """A problem with ``model`` as it is now. Without ``statistics``: of a method that does not look at them."""
    return PruningProblem(
        source=source,
        view=ModelView(model),
        input_ids=input_ids,
        statistics=statistics,
        num_remove=num_remove,
        num_parameters=num_parameters,
        threshold=threshold,
        refine=refine,
        exhaustive=exhaustive,
        calibration={} if calibration is None else calibration,
        memo=memo,
        forced=forced,
    )
