"""Apply a plan to a model: a pure function of plan and weights."""

from __future__ import annotations

from typing import Any

import torch

from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.concatenate import concatenate
from slm_pipeline.surgery.fold import fold
from slm_pipeline.surgery.merge_rules import merge, weighted
from slm_pipeline.surgery.plan import Plan


@torch.no_grad()
def apply(plan: Plan, model: Any) -> Any:
    """Edit ``model``, the dense model, as ``plan`` says; returns the same object, shallower.

    Its class stays, unless sublayers are missing and the plan's export is ``custom``.

    Raises:
        UserError: the plan is for another depth, or its tensors are for other widths.
    """
    view = ModelView(model)
    blocks = planned_blocks(plan, view)
    for block in blocks:
        module = view.layers[block.body]
        for name, value in block.replaced.items():
            module.get_parameter(name).copy_(value)
    bodies = [block.body for block in blocks]
    view.rebuild([view.layers[body] for body in bodies], bodies)
    if plan.export == "custom":
        view.cut_out(plan.missing_positions())
    elif plan.export == "stock":
        silence_missing(plan, model)
    return model


def silence_missing(plan: Plan, model: Any) -> None:
    """Set the last projections of the sublayers that ``plan`` removed to zero in ``model``, the pruned one."""
    view = ModelView(model)
    for name, positions in plan.missing_positions().items():
        for position in positions:
            view.silence(position, name)


def planned_blocks(plan: Plan, view: ModelView) -> list[Block]:
    """The pruned model's blocks, input side first; nothing in the model changes.

    Raises:
        UserError: the plan is for another depth, or its tensors are for other widths.
    """
    if plan.model["num_layers"] != view.num_layers:
        raise UserError(
            f"the plan is for {plan.model['name']} with {plan.model['num_layers']} layers;"
            f" this model has {view.num_layers}"
        )
    plan.check_sizes(heads=view.num_kv_heads, neurons=view.num_neurons, width=view.config.hidden_size)
    blocks = {layer: Block(layer) for layer in range(view.num_layers)}  # by the lowest original layer of each
    for op in plan.ops:
        members = [blocks.pop(layer) for layer in sorted(op["layers"]) if layer in blocks]
        if op["op"] == "merge" and op["rule"] == "concatenate":
            parts = range(len(members))
            blocks[min(op["layers"])] = concatenate(
                view,
                members,
                heads=[torch.from_numpy(plan.tensors[f"{op['tensors']}.heads.{part}"]) for part in parts],
                neurons=[torch.from_numpy(plan.tensors[f"{op['tensors']}.neurons.{part}"]) for part in parts],
                shares=op["shares"],
                official_gqa=op.get("official_gqa", False),
                fold_norm=op.get("fold_norm", False),
            )
        elif op["op"] == "merge" and op["rule"] == "weighted":
            blocks[min(op["layers"])] = weighted(view, members, op["shares"])
        elif op["op"] == "merge":
            blocks[min(op["layers"])] = merge(view, members, op["rule"])
        elif op["op"] == "drop_sublayer":
            blocks[min(op["layers"])] = members[0].lacking(op["sublayer"])
        elif op["op"] == "fold":
            blocks[min(op["layers"])] = fold(view, members[0], torch.from_numpy(plan.tensors[op["tensor"]]))
    return [blocks[layer] for layer in sorted(blocks)]
