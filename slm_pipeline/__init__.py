"""Depth-wise compression of language models: calibrate, merge, repair, recover, evaluate.

The Python API (`slm_pipeline.api`, docs/python.md) is imported when it is first asked for: the version costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm_pipeline.api import Plan, Run, UserError, apply_plan, compose, load_results, make_plan, run, save_model

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Run",
    "UserError",
    "apply_plan",
    "compose",
    "load",
    "load_results",
    "make_plan",
    "run",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
