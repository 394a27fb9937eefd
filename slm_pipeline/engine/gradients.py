"""Gradients of the next-token loss, reduced as they appear: never is more than one of a parameter in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slm_pipeline.models.view import ModelView


def of_parameters(
    view: ModelView, input_ids: Tensor, parameters: Iterable[Tensor], reduce: Callable[[Tensor, Tensor], None]
) -> None:
    """One backward pass of the mean loss over all of ``input_ids`` ([N, T] int64, T at least 2).

    Args:
        parameters: of the model.
        reduce: is given each of them and its gradient, which is freed then.
    """

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        reduce(parameter, parameter.grad)
        parameter.grad = None

    with _differentiating(view, parameters):
        hooks = [parameter.register_post_accumulate_grad_hook(hook) for parameter in parameters]
        try:
            _loss(view, input_ids).backward()
        finally:
            for handle in hooks:
                handle.remove()


def of_gates(view: ModelView, input_ids: Tensor, places: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Tensor]:
    """What each sample's mean loss loses per unit of each gate: a factor, 1 as it is, of all that a key-value group
    (with its query heads) or a neuron hands to the last projection of its sublayer.

    One sample ([T], T at least 2) after the other, forward and backward; no parameter gets a gradient.

    Args:
        places: sublayers, as (layer, attention | mlp).

    Returns:
        For each of them [N, units] float32 gradients, on the CPU.
    """
    rows: dict[tuple[int, str], list[Tensor]] = {place: [] for place in places}

    def gate(num_units: int, of_samples: list[Tensor]) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            values = args[0].detach()

            def reduce(gradient: Tensor) -> None:
                of_channels = (values.float() * gradient.float()).flatten(0, -2).sum(dim=0)
                of_samples.append(of_channels.view(num_units, -1).sum(dim=1).cpu())

            args[0].register_hook(reduce)

        return before

    embedding = view.decoder.get_submodule(view.architecture.embedding)
    with _differentiating(view, []):
        hooks = [embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))]
        for place, of_samples in rows.items():
            before = gate(view.num_units(*place), of_samples)
            hooks.append(view.output(*place).register_forward_pre_hook(before))
        try:
            for sample in tqdm(input_ids, desc="gradients", disable=None):
                _loss(view, sample[None]).backward()
        finally:
            for handle in hooks:
                handle.remove()
    return {place: torch.stack(of_samples) for place, of_samples in rows.items()}


def _loss(view: ModelView, input_ids: Tensor) -> Tensor:
    """Mean next-token loss."""
    ids = input_ids.to(view.device)
    loss: Tensor = view.model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@contextmanager
def _differentiating(view: ModelView, parameters: Iterable[Tensor]) -> Iterator[None]:
    """These parameters alone get a gradient, for a while."""
    wanted = set(parameters)
    required_before = {parameter: parameter.requires_grad for parameter in view.model.parameters()}
    try:
        for parameter in required_before:
            parameter.requires_grad_(parameter in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in required_before.items():
            parameter.requires_grad_(required)
