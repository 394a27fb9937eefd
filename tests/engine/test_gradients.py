"""Gradients of gates and parameters against autograd on explicit masks, for every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slm_pipeline.engine.gradients import of_gates, of_parameters
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.ops.base import SUBLAYERS


class Masked(nn.Module):
    """A projection with a mask on its inputs."""

    def __init__(self, linear, num_units):
        super().__init__()
        self.linear, self.mask = linear, torch.ones(num_units, requires_grad=True)

    def forward(self, values):
        return self.linear(values * self.mask.repeat_interleave(values.shape[-1] // len(self.mask)))


def masked_gradients(view, layer, part, input_ids):
    """[N, units] with a mask that autograd knows, sample by sample."""
    name = view.architecture.attention_output if part == "attention" else view.architecture.mlp_output
    linear = view.layers[layer].get_submodule(name)
    masked = Masked(linear, view.kv_heads_of(layer) if part == "attention" else view.neurons_of(layer))
    view.layers[layer].set_submodule(name, masked)
    try:
        rows = []
        for sample in input_ids:
            loss = view.model(input_ids=sample[None], labels=sample[None]).loss
            rows += torch.autograd.grad(loss, masked.mask)
    finally:
        view.layers[layer].set_submodule(name, linear)
    return torch.stack(rows)


def test_gates_are_masks_that_autograd_knows(any_model, input_ids):
    view = ModelView(any_model)
    found = of_gates(view, input_ids, [(layer, part) for layer in (0, 4) for part in SUBLAYERS])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in any_model.parameters())
    assert len(found) == 4
    for place, gradients in found.items():
        expected = masked_gradients(view, *place, input_ids)
        assert gradients.shape == expected.shape
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


def test_no_more_than_one_gradient_is_there_at_a_time(tiny_llama, input_ids):
    model, _ = tiny_llama
    wanted = [layer.mlp.up_proj.weight for layer in ModelView(model).layers]
    seen = []

    def reduce(parameter, gradient):
        seen.append((parameter, gradient.clone()))
        assert [other.grad is not None for other in model.parameters()].count(True) == 1

    of_parameters(ModelView(model), input_ids, wanted, reduce)
    assert len(seen) == len(wanted)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    for parameter, gradient in seen:
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize(
    "fails",
    [
        lambda view, ids: of_gates(view, ids, [(0, "mlp")]),
        lambda view, ids: of_parameters(view, ids, [view.final_norm.weight], print),
    ],
)
def test_the_model_is_as_it_was_after_an_error(fails, tiny_llama, input_ids):
    model, _ = tiny_llama
    frozen = model.model.norm.weight.requires_grad_(False)
    with pytest.raises(IndexError):
        fails(ModelView(model), input_ids + 300)
    assert [parameter is frozen for parameter in model.parameters() if not parameter.requires_grad] == [True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not frozen._post_accumulate_grad_hooks
