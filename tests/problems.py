"""What a method is asked, in one place: every test makes its `PruningProblem` here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_pipeline.engine.window_memo import WindowMemos
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.target import Floor, Layers, NoTarget, Parameters, Target
from slm_pipeline.models.source import ModelSource
from slm_pipeline.models.view import ModelView


def problem_of(
    model: Any,
    source: ModelSource,
    input_ids: Any,
    *,
    num_remove: int | None = None,
    num_parameters: int | None = None,
    threshold: float | None = None,
    refine: int = 5,
    exhaustive: bool = False,
    statistics: Any = None,
    calibration: dict[str, Any] | None = None,
    memo: Path | None = None,
    forced: bool = False,
) -> PruningProblem:
    """A problem with ``model`` as it is now. Without ``statistics``: of a method that does not look at them.

    At most one of ``num_remove``, ``num_parameters`` and ``threshold``, which make the target; ``memo`` and ``forced``
    are the folder of the `WindowMemos` and whether they begin afresh.
    """
    asked: list[Target] = [
        make(value)
        for make, value in ((Layers, num_remove), (Parameters, num_parameters), (Floor, threshold))
        if value is not None
    ]
    (target,) = asked or [NoTarget()]
    return PruningProblem(
        source=source,
        view=ModelView(model),
        input_ids=input_ids,
        statistics=statistics,
        target=target,
        calibration={} if calibration is None else calibration,
        refine=refine,
        exhaustive=exhaustive,
        windows=WindowMemos(memo, afresh=forced),
    )
