"""Which parts of a pruned model train, and which stay frozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from slm_pipeline.recovery.base import RecoveryProblem

if TYPE_CHECKING:
    from torch import nn


def freeze_all_but(problem: RecoveryProblem, modules: Iterable[nn.Module]) -> None:
    """Let the parameters of ``modules`` get gradients, and no others of the model.

    Those of sublayers that the plan removed by zeroing never do: training would bring them back.
    """
    problem.model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    for module in silent_modules(problem).values():
        module.requires_grad_(False)


def silent_modules(problem: RecoveryProblem) -> dict[str, nn.Module]:
    """By their full names, the modules with parameters in sublayers that the plan removed by zeroing."""
    from slm_pipeline.models.view import ModelView

    view = ModelView(problem.model)
    silent = {
        id(module)
        for name, positions in problem.plan.zeroed().items()
        for position in positions
        for child in view.sublayer(name)
        for module in view.layers[position].get_submodule(child).modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    return {name: module for name, module in problem.model.named_modules() if id(module) in silent}
