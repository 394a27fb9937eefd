"""Apply a plan to a model: a pure function of plan and weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from slm_pipeline.errors import UserError
from slm_pipeline.models import widths
from slm_pipeline.models.view import ModelView, Slice
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops import Layer, LayerSize, Op, Widths, walk
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.plan import Plan

_Planned = tuple[Layer, Callable[[], Block]]  # a layer's history, and what makes its block


@torch.no_grad()
def apply(plan: Plan, model: Any) -> Any:
    """Edit ``model``, the dense model, as ``plan`` says; returns the same object, shallower or narrower.

    Its class stays, unless the plan leaves layers without a sublayer, or of widths that its class does not know.

    Raises:
        UserError: the plan is for another depth, or its tensors are for other widths.
    """
    view = ModelView(model)
    view.rest()
    blocks = planned_blocks(plan, view)
    are_resized = any(widths.changes_shapes(view, block.body, block.replaced) for block in blocks)
    gained = [widths.put(view.layers[block.body], block.replaced) for block in blocks]
    bodies = [block.body for block in blocks]
    view.rebuild([view.layers[body] for body in bodies], bodies)
    absent = plan.absent()
    widths.cut_out(view, absent)
    if are_resized or any(absent.values()):
        widths.settle(view, gained)
    silence_zeroed(plan, model)
    return model


@torch.no_grad()
def apply_beside(plan: Plan, view: ModelView) -> Any:
    """The pruned model, while ``view``'s, the dense model, stays as it is. They share the weights that the plan leaves
    alone.

    Raises:
        UserError: as `apply`.
    """
    blocks = planned_blocks(plan, view)
    zeroed = {position for positions in plan.zeroed().values() for position in positions}
    written = {block.body for position, block in enumerate(blocks) if block.replaced or position in zeroed}
    own = {id(parameter) for layer in written for parameter in view.layers[layer].parameters()}
    shared = {id(parameter): parameter for parameter in view.model.parameters() if id(parameter) not in own}
    return apply(plan, copy.deepcopy(view.model, shared))


def silence_zeroed(plan: Plan, model: Any) -> None:
    """Set the last projections of the sublayers that ``plan`` zeroes to zero in ``model``, the pruned one."""
    view = ModelView(model)
    for name, positions in plan.zeroed().items():
        for position in positions:
            view.silence(position, name)


def planned_blocks(plan: Plan, view: ModelView) -> list[Block]:
    """The pruned model's blocks, input side first; nothing in the model changes.

    Raises:
        UserError: the plan is for another depth, or its tensors are for other widths.
    """
    return list(PlannedBlocks(plan, view))


class PlannedBlocks:
    """The blocks of `planned_blocks`, each made when its turn comes, every time: those of a narrower model are copies,
    together nearly as large as the model.

    Raises:
        UserError: as `planned_blocks`.
    """

    def __init__(self, plan: Plan, view: ModelView):
        if plan.model["num_layers"] != view.num_layers:
            raise UserError(
                f"the plan is for {plan.model['name']} with {plan.model['num_layers']} layers;"
                f" this model has {view.num_layers}"
            )
        layers = range(view.num_layers)
        heads, neurons = max(map(view.kv_heads_of, layers)), max(map(view.neurons_of, layers))
        plan.check_sizes(Widths(heads=heads, neurons=neurons, states=view.config.hidden_size))

        def step(op: Op, members: list[_Planned]) -> _Planned | None:
            left = op.check([layer for layer, _ in members], "the plan")
            return None if left is None else (left, partial(_made, op, view, [make for _, make in members], plan))

        dense: list[_Planned] = [(Layer((layer,)), partial(Block, layer)) for layer in layers]
        self._makers = [make for _, make in walk(plan.ops, dense, step)]

    def __len__(self) -> int:
        return len(self._makers)

    def __iter__(self) -> Iterator[Block]:
        return (make() for make in self._makers)


def _made(op: Op, view: ModelView, makers: list[Callable[[], Block]], plan: Plan) -> Block:
    block = op.apply(view, [make() for make in makers], plan.tensors)
    assert block is not None  # the layer's history knows of it
    return block


def layer_sizes(view: ModelView) -> list[LayerSize]:
    """Parameters of the dense model's layers."""
    sizes = []
    for layer in range(view.num_layers):
        attention, mlp = (view.sublayer_parameters(layer, name) for name in SUBLAYERS)
        block, hidden = view.layers[layer], view.config.hidden_size
        per_head, per_neuron = (
            sum(_parameters_of_unit(piece, block.get_parameter(piece.parameter)) for piece in slices)
            for slices in (view.attention_slices(layer), view.mlp_slices(layer))
        )
        sizes.append(
            LayerSize(
                attention,
                mlp,
                other=view.block_parameters(layer) - attention - mlp,
                heads=view.kv_heads_of(layer),
                neurons=view.neurons_of(layer),
                per_head=per_head,
                per_neuron=per_neuron,
                attention_bias=0
                if view.lacks(layer, "attention") or view.attention_output(layer).bias is not None
                else hidden,
                mlp_bias=0 if view.lacks(layer, "mlp") or view.mlp_output(layer).bias is not None else hidden,
            )
        )
    return sizes


def _parameters_of_unit(piece: Slice, parameter: torch.Tensor) -> int:
    """Parameters of ``parameter`` in one key-value group or neuron."""
    return sum(units.shape[1] for units in piece.units) * parameter.numel() // parameter.shape[piece.dim]
