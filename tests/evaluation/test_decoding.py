"""The cache of fixed size: what is captured or compiled on a GPU is the step that is run here."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import peculiar_model, random_source
from plans import narrowing

from slm_pipeline.evaluation.decoding import FixedDecoding, cache_bytes_per_token, compiled
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.models.widths import cut_out, settle
from slm_pipeline.surgery.apply import apply

NEW = 9


@torch.no_grad()
def naive(model, input_ids):
    """Greedy decoding that reads all tokens again for each new one; the tokens, and their logits one by one."""
    logits = []
    for _ in range(NEW):
        logits.append(model(input_ids=input_ids, use_cache=False).logits[:, -1])
        input_ids = torch.cat([input_ids, logits[-1].argmax(dim=-1, keepdim=True)], dim=1)
    return input_ids, torch.stack(logits)


@torch.no_grad()
def fixed(model, input_ids):
    """The same with the cache."""
    decoding, logits = FixedDecoding(model, input_ids, NEW), []
    hook = model.register_forward_hook(lambda _, inputs, output: logits.append(output.logits[:, -1]))
    tokens = decoding.run()
    hook.remove()
    return tokens, torch.stack(logits)


def test_decoding_with_a_fixed_cache_is_decoding_without_one(any_model, input_ids):
    """Sliding layers see 5 of the 21 tokens, beside others that see all."""
    torch.testing.assert_close(fixed(any_model, input_ids), naive(any_model, input_ids), atol=1e-4, rtol=1e-4)


def test_so_it_is_for_layers_of_unequal_width_and_without_a_sublayer(input_ids):
    model, _ = load_dense(random_source())
    view = ModelView(model)
    apply(narrowing({1: ([0], [2, 5]), 3: (None, [2, 5, 9])}), model)
    cut_out(view, {"attention": [0, 4], "mlp": [2]})
    settle(view)
    torch.testing.assert_close(fixed(model, input_ids), naive(model, input_ids), atol=1e-4, rtol=1e-4)
    head = 2 * 8 * 4  # keys and values, their width, bytes
    assert cache_bytes_per_token(model) == (1 + 3 * 2) * head + 2 * 2 * 4  # without attention one number each


def test_greedy_generation_of_transformers_gives_the_same_tokens(tiny_llama, input_ids):
    model, _ = tiny_llama
    expected = model.generate(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=NEW,
        eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(fixed(model, input_ids)[0], expected)


def test_steps_that_warm_up_leave_no_trace_and_a_run_is_repeated(input_ids):
    """A capture runs the step a few times before, and once while it records."""
    model = peculiar_model("gemma3_text")
    calls = []

    def warmed_up(step):
        for _ in range(4):
            step()

        def replayed():
            calls.append(1)
            step()

        return replayed

    with torch.no_grad():
        decoding = FixedDecoding(model, input_ids, NEW, warmed_up)
        first, again = decoding.run().clone(), decoding.run().clone()
    assert len(calls) == 2 * (NEW - 1)  # the first token comes with the prompt
    assert torch.equal(first, naive(model, input_ids)[0])
    assert torch.equal(first, again)


def test_a_step_moves_no_buffer_and_asks_the_host_for_nothing(input_ids):
    """Else it could not be captured."""
    model = peculiar_model("qwen3")
    with torch.no_grad():
        decoding = FixedDecoding(model, input_ids, NEW)
        places = [layer.keys.data_ptr() for layer in decoding.cache.layers]
        with pytest.MonkeyPatch.context() as patched:
            for name in ("item", "tolist", "__bool__", "__int__", "__index__"):
                patched.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor was read by the host"))
            decoding.step()
    assert places == [layer.keys.data_ptr() for layer in decoding.cache.layers]


class Steps:
    """In the place of a model: what it has differs in size from the next one's."""

    def __init__(self, size):
        self.taken = torch.zeros(size)

    def step(self):
        self.taken.add_(1)


def test_each_of_many_steps_is_compiled_and_let_go(monkeypatch):
    """torch compiles one code eight times, and runs what comes then as it is."""
    compiles, made, gone = [], torch.compile, []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step, **options: made(step, backend=backend, dynamic=False))
    for size in range(2, 12):
        steps = Steps(size)
        replayed = compiled(steps.step)
        before = steps.taken.clone()
        replayed()
        assert torch.equal(steps.taken, before + 1)
        assert len(compiles) == size - 1
        gone.append(weakref.ref(steps))
    del steps, replayed
    compiles.clear()
    gc.collect()
    assert not any(left() for left in gone)
