"""ReplaceMe against least squares over all tokens at once."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import random_source

from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.replaceme import ReplaceMe
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply


@pytest.fixture
def many_ids():
    """[20, 12]: more tokens than channels, so that the fit is not exact."""
    return torch.randint(0, 256, (20, 12), generator=torch.Generator().manual_seed(2))


def problem_for(architecture, input_ids, num_remove=2):
    source = random_source(architecture)
    model, _ = load_dense(source)
    view = ModelView(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # blocks that turn the stream, and biases that are not zero
        for layer in view.layers:
            for name, parameter in layer.named_parameters():
                if name not in view.norm_names(0):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.2 * noise)
    return PruningProblem(source, view, input_ids, collect(view, input_ids), num_remove, None, 5, False, {})


@torch.no_grad()
def rows_of(view, input_ids, start, end):
    """m, h_s, h_e as [tokens, d] from one whole forward pass with transformers' own hidden states."""
    seen = []
    hook = view.mlp_output(start - 1).register_forward_hook(lambda module, args, output: seen.append(output))
    hidden = view.model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    return seen[0].reshape(-1, hidden[0].shape[-1]), hidden[start].flatten(0, 1), hidden[end].flatten(0, 1)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "phi3"])
def test_least_squares_over_all_tokens(architecture, many_ids):
    problem = problem_for(architecture, many_ids)
    plan = ReplaceMe(protect_last=1).plan(problem)
    start, end = plan.dropped[0], plan.dropped[-1] + 1
    output, before, after = rows_of(problem.view, many_ids, start, end)
    expected = torch.linalg.lstsq(output.double(), (after - before + output).double()).solution
    transform = torch.from_numpy(plan.tensors["fold.0"])
    torch.testing.assert_close(transform, expected.float(), rtol=1e-3, atol=1e-3)
    mapped = output @ transform + before - output
    cosine = torch.cosine_similarity(mapped, after, dim=-1).mean()
    assert plan.scores["cosine_after"] == pytest.approx(float(cosine), abs=1e-5)
    assert plan.scores["cosine_before"] == pytest.approx(
        float(torch.cosine_similarity(before, after, dim=-1).mean()), abs=1e-5
    )
    assert plan.scores["cosine_after"] > plan.scores["cosine_before"]
    # The folded model's stream after layer start - 1 is m T + (h_s - m).
    pruned = apply(plan, copy.deepcopy(problem.view.model))
    found = pruned(input_ids=many_ids, use_cache=False, output_hidden_states=True).hidden_states[start]
    torch.testing.assert_close(found.flatten(0, 1), mapped, rtol=1e-3, atol=1e-3)


def test_the_ridge_shrinks_the_map(many_ids):
    problem = problem_for("llama", many_ids)
    plans = [ReplaceMe(ridge=ridge, protect_last=1).plan(problem) for ridge in (0, 0.1, 10)]
    sizes = [float(torch.from_numpy(plan.tensors["fold.0"]).norm()) for plan in plans]
    assert sizes[0] > sizes[1] > sizes[2]
    output, before, after = rows_of(problem.view, many_ids, *ends(plans[1]))
    gram, moment = output.double().T @ output.double(), output.double().T @ (after - before + output).double()
    expected = torch.linalg.solve(gram + 0.1 * gram.trace() / 32 * torch.eye(32, dtype=torch.float64), moment)
    torch.testing.assert_close(torch.from_numpy(plans[1].tensors["fold.0"]), expected.float(), rtol=1e-3, atol=1e-4)


def ends(plan):
    return plan.dropped[0], plan.dropped[-1] + 1


@pytest.mark.parametrize("accurate", [False, True])
def test_cosine_is_raised_where_it_says(accurate, many_ids):
    problem = problem_for("llama", many_ids)
    options = {"learning_rate": 1e-2, "num_epochs": 30, "batch_tokens": 60, "protect_last": 1}
    method = ReplaceMe(solver="cosine", accurate=accurate, **options)
    plan = method.plan(problem)
    output, before, after = rows_of(problem.view, many_ids, *ends(plan))
    rest = before - output

    def objective(transform):
        mapped = output @ transform
        pair = (mapped + rest, after) if accurate else (mapped, after - rest)
        return float(torch.cosine_similarity(*pair, dim=-1).mean())

    assert objective(torch.from_numpy(plan.tensors["fold.0"])) > objective(torch.eye(32)) + 0.05


def test_fewer_tokens_than_channels(input_ids):
    plan = ReplaceMe().plan(problem_for("llama", input_ids[:1]))
    assert plan.scores["cosine_after"] == pytest.approx(1, abs=1e-3)  # 12 tokens, 32 channels: an exact fit exists


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "olmo2"])
def test_a_norm_behind_the_projection_is_refused(architecture):
    with pytest.raises(UserError, match="a norm follows the last projection"):
        ReplaceMe().check(random_source(architecture))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect_first": 0}, "must be at least 1: a layer must be left below"),
        ({"solver": "qr"}, "'qr' is not one of least_squares"),
        ({"ridge": -1.0}, "must be at least 0"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"num_epochs": 0}, "must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        ReplaceMe(**options)
