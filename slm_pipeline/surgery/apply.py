"""Apply a plan to a model: a pure function of plan and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.merge_rules import merge
from slm_pipeline.surgery.plan import Plan


@dataclass
class _Slot:
    """A place in the stack: the block, and the original layer whose per-layer configuration it keeps."""

    block: nn.Module
    source: int


@torch.no_grad()
def apply(plan: Plan, model: Any) -> Any:
    """Edit ``model``, the dense model, as ``plan`` says; returns the same object, of the same class, shallower.

    Raises:
        UserError: the plan is for another depth, has an unknown op, or its ops do not give its layer groups.
    """
    view = ModelView(model)
    if plan.model["num_layers"] != view.num_layers:
        raise UserError(
            f"the plan is for {plan.model['name']} with {plan.model['num_layers']} layers;"
            f" this model has {view.num_layers}"
        )
    slots: dict[int, _Slot] = {layer: _Slot(block, layer) for layer, block in enumerate(view.layers)}
    for op in plan.ops:
        if op["op"] == "drop":
            for layer in op["layers"]:
                del slots[layer]
        elif op["op"] == "merge":
            low, high = op["layers"][0], op["layers"][-1]
            merged = merge(view, low, high, op["rule"])
            block = view.layers[merged.body]
            for name, value in merged.replaced.items():
                block.get_parameter(name).copy_(value)
            for layer in op["layers"]:
                del slots[layer]
            slots[low] = _Slot(block, merged.body)
        else:
            raise UserError(f"this version cannot apply the op {op['op']!r} of the plan")
    ordered = [slots[position] for position in sorted(slots)]
    if len(ordered) != plan.num_layers:
        raise UserError(f"the plan's ops leave {len(ordered)} layers, its layer_groups name {plan.num_layers}")
    view.rebuild([slot.block for slot in ordered], [slot.source for slot in ordered])
    return model
