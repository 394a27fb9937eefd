"""Single blocks on cached states against the model's own forward pass, for every architecture."""

from __future__ import annotations

import pytest
import torch

from slm_pipeline.engine import blocks, statistics
from slm_pipeline.engine.blocks import BlockRunner, batches
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block


@torch.no_grad()
def test_states_are_the_models_own(any_model, input_ids):
    runner = BlockRunner(ModelView(any_model), input_ids)
    output = any_model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    assert len(runner.states) == 7
    for state, hidden in zip(runner.states[:-1], output.hidden_states[:-1], strict=True):
        torch.testing.assert_close(state, hidden, rtol=0, atol=0)
    torch.testing.assert_close(runner.final, output.hidden_states[-1], rtol=0, atol=0)  # transformers gives it normed


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 2, 5])
def test_running_on_from_any_state_is_the_models_forward(start, any_model, input_ids):
    view = ModelView(any_model)
    runner = BlockRunner(view, input_ids)
    hidden = runner.states[start]
    for layer in range(start, view.num_layers):
        hidden = runner.run(Block(layer), hidden)
        torch.testing.assert_close(hidden, runner.states[layer + 1])
    expected = any_model(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(view.logits(runner.finish(hidden)), expected)
    assert runner.num_block_evaluations == view.num_layers - start


@torch.no_grad()
def test_skipping_a_block_is_the_model_without_it(any_model, input_ids):
    """Also of architectures whose layers differ in kind: the removed layer's neighbours keep their own masks."""
    view = ModelView(any_model)
    runner = BlockRunner(view, input_ids)
    hidden = runner.states[2]
    for layer in (3, 4, 5):
        hidden = runner.run(Block(layer), hidden)
    found = view.logits(runner.finish(hidden))
    kept = [0, 1, 3, 4, 5]
    view.rebuild([view.layers[layer] for layer in kept], kept)
    torch.testing.assert_close(found, any_model(input_ids=input_ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("max_logits", [1, 7 * 300, 1 << 26])
def test_losses_are_each_samples_own(max_logits, any_model, input_ids, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_LOGITS", max_logits)
    runner = BlockRunner(ModelView(any_model), input_ids)
    expected = [float(any_model(input_ids=row[None], labels=row[None]).loss) * 11 for row in input_ids]
    assert runner.losses(runner.states[-1], input_ids).tolist() == pytest.approx(expected, rel=1e-5)
    assert runner.loss(runner.states[-1], input_ids) == pytest.approx(sum(expected), rel=1e-5)


@torch.no_grad()
def test_replaced_parameters_are_used_and_the_model_is_left_alone(any_model, input_ids):
    view = ModelView(any_model)
    runner = BlockRunner(view, input_ids)
    before = {name: value.clone() for name, value in any_model.state_dict().items()}
    replaced = {name: view.layers[4].get_parameter(name).detach() for name, _ in view.layers[1].named_parameters()}
    found = runner.run(Block(1, replaced), runner.states[1])
    assert not torch.equal(found, runner.states[2])
    assert all(torch.equal(value, before[name]) for name, value in any_model.state_dict().items())
    for name, value in replaced.items():
        view.layers[1].get_parameter(name).copy_(value)
    torch.testing.assert_close(found, runner.run(Block(1), runner.states[1]), rtol=0, atol=0)


def test_hooks_are_removed(tiny_llama, input_ids):
    model, _ = tiny_llama
    runner = BlockRunner(ModelView(model), input_ids)
    model(input_ids=input_ids)
    assert len(runner.states) == 7


def test_similarity_does_not_depend_on_how_samples_are_batched(tiny_llama, input_ids, monkeypatch):
    model, _ = tiny_llama
    together = statistics.collect(ModelView(model), input_ids).cosine
    monkeypatch.setattr("slm_pipeline.engine.statistics.MAX_BATCH_TOKENS", 1)
    torch.testing.assert_close(statistics.collect(ModelView(model), input_ids).cosine, together)


@pytest.mark.parametrize(
    ("max_tokens", "sizes"), [(4, [1] * 5), (8, [2, 2, 1]), (11, [2, 2, 1]), (100, [5]), (1, [1] * 5)]
)
def test_batches_keep_to_the_limit(max_tokens, sizes):
    samples = torch.arange(20).reshape(5, 4)
    found = batches(samples, max_tokens)
    assert [len(batch) for batch in found] == sizes
    assert torch.equal(torch.cat(found), samples)


def test_the_least_loss_is_never_above_the_loss(any_model, input_ids, monkeypatch):
    runner = BlockRunner(ModelView(any_model), input_ids)
    for state in (runner.states[-1], runner.states[2]):
        whole = runner.loss(state, input_ids)
        least = []
        for count in (1, 30, 300):
            monkeypatch.setattr(blocks, "_NUM_LIKELY", count)
            runner.__dict__.pop("_likely_tokens", None)
            least.append(runner.least_loss(state, input_ids))
        assert least[0] < least[1] < whole
        assert least[2] == pytest.approx(whole, rel=1e-6)  # all of the vocabulary
