"""Scales for what a narrower model keeps, layer by layer, by least squares (Kwon et al., arXiv 2204.00656, 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slm_pipeline.engine.blocks import BlockRunner, batches
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import SUBLAYERS

LARGEST = 10.0  # a scale beyond it, either way, is not believed
_MAX_BATCH_TOKENS = 2048


class _Seen(NamedTuple):
    """A layer's run on one batch: what leaves it ([batch, length, d]), and for each sublayer what enters and leaves its
    last projection ([tokens, n] and [tokens, d])."""

    state: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@torch.no_grad()
def tune(
    view: ModelView, input_ids: Tensor, kept: Mapping[tuple[int, str], Tensor], damping: float
) -> tuple[dict[tuple[int, str], Tensor], list[tuple[int, str]]]:
    """Scales of the units that stay, with which the narrower model's residual stream is closest to the dense one's.

    From the first layer up, attention before the feed-forward network: with x_u what unit u hands to the last
    projection W of a sublayer in the narrower model, whose sublayers below are tuned already, and r what is missing
    between the two streams without this sublayer, the scales s minimise the sum over tokens of
    |r - sum_u s_u W_u x_u|^2 + c |s - 1|^2. Where a norm follows W, r is what the dense model's W puts out.

    Args:
        input_ids: [N, T] int64.
        kept: (layer, attention | mlp) -> [kept] int64 indices of the units that stay.
        damping: c, relative to the mean over units of their own sum of squares.

    Returns:
        For each of them [kept] float32 scales, on the CPU; and those for which some scale was not finite or
        beyond `LARGEST`, which have no scales and stay as they are.
    """
    scales: dict[tuple[int, str], Tensor] = {}
    refused = []
    runners = [BlockRunner(view, batch) for batch in batches(input_ids.to(view.device), _MAX_BATCH_TOKENS)]
    dense = [runner.states[0] for runner in runners]
    narrow = dense
    for runner in runners:
        runner.states.clear()  # the dense model's are made again, layer by layer
    for layer in tqdm(range(view.num_layers), desc="tuning of masks", disable=None):
        whole = [
            _run(runner, Block(layer), state)._replace(inputs={}) for runner, state in zip(runners, dense, strict=True)
        ]
        factors = {part: _factors(view, layer, part, kept[layer, part]) for part in SUBLAYERS if (layer, part) in kept}
        for part in factors:
            block = _masked(view, layer, factors)
            weight = view.output(layer, part).weight.detach().float()
            products, right = torch.zeros((), device=weight.device), torch.zeros((), device=weight.device)
            for runner, state, wanted, target in zip(runners, narrow, dense, whole, strict=True):
                seen = _run(runner, block, state)
                missing = _missing(view, layer, part, wanted, target, state, seen)
                inputs = seen.inputs[part].float()
                products = products + (inputs.T @ inputs).double()
                right = right + (inputs.T @ missing.to(inputs.device)).double()
            units = view.num_units(layer, part)
            found = _solve(weight, products, right, units, kept[layer, part].to(weight.device), damping)
            if found is None:
                refused.append((layer, part))
                continue
            scales[layer, part] = found.float().cpu()
            factors[part] = _factors(view, layer, part, kept[layer, part], scales[layer, part])
        if factors or narrow is not dense:
            block = _masked(view, layer, factors)
            narrow = [runner.run(block, state) for runner, state in zip(runners, narrow, strict=True)]
            dense = [seen.state for seen in whole]
        else:
            narrow = dense = [seen.state for seen in whole]
    return scales, refused


def _solve(
    weight: Tensor, products: Tensor, right: Tensor, num_units: int, kept: Tensor, damping: float
) -> Tensor | None:
    """[kept] float64 scales; None if they are not to be believed.

    Args:
        weight: [d, n] of the last projection.
        products: [n, n] sum over tokens of x x^T.
        right: [n, d] sum over tokens of x r^T.
    """
    columns = weight.double()
    size = columns.shape[1] // num_units
    matrix = (products * (columns.T @ columns)).view(num_units, size, num_units, size).sum(dim=(1, 3))
    vector = (right * columns.T).sum(dim=1).view(num_units, size).sum(dim=1)
    matrix, vector = matrix[kept][:, kept], vector[kept]
    ridge = damping * matrix.diagonal().mean()
    if not bool(ridge > 0):
        return None
    damped = matrix + ridge * torch.eye(len(kept), dtype=matrix.dtype, device=matrix.device)
    scales = 1 + torch.linalg.solve(damped, vector - matrix.sum(dim=1))
    believed = bool(scales.isfinite().all()) and bool(scales.abs().max() <= LARGEST)
    return scales if believed else None


def _missing(
    view: ModelView, layer: int, part: str, wanted: Tensor, target: _Seen, state: Tensor, seen: _Seen
) -> Tensor:
    """[tokens, d] float32: what the sublayer's last projection should put out, less its bias.

    Args:
        wanted, target: what enters the layer in the dense model, and what it makes of it.
        state, seen: the same in the narrower model, tuned below this sublayer.
    """
    output = view.output(layer, part)
    found = target.outputs[part].float()
    if not view.architecture.output_norms:
        found = found + (wanted - state).flatten(0, 1).to(found.device).float()
        if part == "mlp" and "attention" in seen.outputs:
            found = found + (target.outputs["attention"] - seen.outputs["attention"]).to(found.device).float()
    return found if output.bias is None else found - output.bias.detach().float()


def _factors(view: ModelView, layer: int, part: str, kept: Tensor, scales: Tensor | None = None) -> Tensor:
    """[n] float32 for the inputs of a sublayer's last projection: 0 for what is gone, the scale for what stays."""
    factors = torch.zeros(view.num_units(layer, part))
    factors[kept] = 1.0 if scales is None else scales
    return factors.repeat_interleave(view.output(layer, part).in_features // len(factors))


def scaled(weight: Tensor, factors: Tensor) -> Tensor:
    """[d, n] a last projection whose columns are multiplied, in the dtype that it has."""
    return (weight.detach().float() * factors.to(weight.device)).to(weight.dtype)


def _masked(view: ModelView, layer: int, factors: Mapping[str, Tensor]) -> Block:
    """The dense layer, with all its units, that computes what the narrower one does."""
    return Block(
        layer,
        {
            f"{view.output_name(part)}.weight": scaled(view.output(layer, part).weight, of)
            for part, of in factors.items()
        },
    )


def _run(runner: BlockRunner, block: Block, state: Tensor) -> _Seen:
    view, inputs, outputs, hooks = runner.view, {}, {}, []
    for part in (part for part in SUBLAYERS if not view.lacks(block.body, part)):

        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor, part: str = part) -> None:
            inputs[part], outputs[part] = args[0].flatten(0, -2), output.flatten(0, -2)

        hooks.append(view.output(block.body, part).register_forward_hook(keep))
    try:
        return _Seen(runner.run(block, state), inputs, outputs)
    finally:
        for hook in hooks:
            hook.remove()
