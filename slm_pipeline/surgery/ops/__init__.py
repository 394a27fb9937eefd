"""The operations of plans, one file each, which registers itself: adding one is adding a file here.

Imports no torch. An operation from outside is a subclass of `Op` with `register` above it, in a module that is imported
before its plans are read; that of a job is a plugin's, whose code is part of what its checkpoints are.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.ops.base import OPS, Layer, LayerSize, Op, Tensors, Widths, register, walk
from slm_pipeline.surgery.untrusted import short

__all__ = ["OPS", "Layer", "LayerSize", "Op", "Tensors", "Widths", "read_op", "register", "walk"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def read_op(values: Mapping[str, Any], tensors: Tensors, where: str) -> Op:
    """The operation that a mapping of plan.json says; see `Op.from_json`.

    Raises:
        UserError: there is none of that name, or it is not well said.
    """
    kind = values.get("op")
    if not isinstance(kind, str) or kind not in OPS:
        raise UserError(f"{where} is {short(kind)}; this version knows {', '.join(sorted(OPS))}")
    return OPS[kind].from_json(values, tensors, where)
