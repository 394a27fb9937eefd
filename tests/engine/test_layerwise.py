"""States that go up layer by layer are those of the model's own forward pass, and so are the inputs on the way."""

from __future__ import annotations

import pytest
import torch

from slm_pipeline.engine.layerwise import Stream
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import SUBLAYERS


@torch.no_grad()
def test_gram_matrices_are_those_of_a_whole_forward_pass(any_model, input_ids):
    view, inputs, hooks = ModelView(any_model), {}, []
    for layer in range(view.num_layers):
        for part in SUBLAYERS:
            output = view.attention_output(layer) if part == "attention" else view.mlp_output(layer)
            place = (layer, part)
            hooks.append(
                output.register_forward_pre_hook(lambda _, args, at=place: inputs.update({at: args[0].flatten(0, -2)}))
            )
    any_model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    stream = Stream(view, input_ids)
    for layer in range(view.num_layers):
        for part in SUBLAYERS:
            gram, expected = stream.gram(Block(layer), part), inputs[layer, part].double()
            assert gram.num_tokens == input_ids.numel()
            torch.testing.assert_close(gram.matrix, expected.T @ expected, rtol=1e-4, atol=1e-4)
        stream.pass_through(Block(layer))
    output = view.final_norm(stream.states)
    torch.testing.assert_close(output, view.decoder(input_ids=input_ids).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_inputs_that_are_not_finite_are_an_error(tiny_llama, input_ids):
    view = ModelView(tiny_llama[0])
    stream = Stream(view, input_ids)
    stream.states[0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="what enters the last projection of layer 2's mlp is not finite"):
        stream.gram(Block(2), "mlp")
