"""ReplaceMe against least squares over all tokens at once."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import context_of, random_source
from problems import problem_of

from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
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
    return problem_of(model, source, input_ids, num_remove=num_remove, statistics=collect(view, input_ids))


HELD = [2, 7, 12, 17]  # of 20 samples, where a fifth is held out


@torch.no_grad()
def rows_of(view, input_ids, start, end):
    """m, h_s, h_e as [tokens, d] from one whole forward pass with transformers' own hidden states."""
    seen = []
    hook = view.mlp_output(start - 1).register_forward_hook(lambda module, args, output: seen.append(output))
    hidden = view.model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    return seen[0].reshape(-1, hidden[0].shape[-1]), hidden[start].flatten(0, 1), hidden[end].flatten(0, 1)


@pytest.mark.parametrize(
    ("architecture", "held_out"), [("llama", 0.0), ("llama", 0.2), ("opt", 0.2), ("gpt_neox", 0.2), ("phi3", 0.2)]
)
def test_least_squares_over_all_fitted_tokens(architecture, held_out, many_ids):
    problem = problem_for(architecture, many_ids)
    plan = ReplaceMe(protect_last=1, held_out=held_out).plan(problem)
    start, end = plan.dropped[0], plan.dropped[-1] + 1
    output, before, after = rows_of(problem.view, many_ids, start, end)
    held = torch.zeros(20, 12, dtype=torch.bool)
    held[HELD if held_out else []] = True
    held = held.flatten()
    fitted = output[~held].double(), (after - before + output)[~held].double()
    expected = torch.linalg.lstsq(*fitted).solution
    transform = torch.from_numpy(plan.tensors["fold.0"])
    torch.testing.assert_close(transform, expected.float(), rtol=1e-3, atol=1e-3)
    mapped = output @ transform + before - output
    assert list(plan.scores["fit"]) == ["fitted", "held_out"] if held_out else ["fitted"]
    for name, rows in (("fitted", ~held), ("held_out", held)):
        if rows.any():
            found = plan.scores["fit"][name]
            assert found["num_tokens"] == int(rows.sum())
            for when, stream in (("before", before), ("after", mapped)):
                cosine = torch.cosine_similarity(stream[rows], after[rows], dim=-1).mean()
                assert found[f"cosine_{when}"] == pytest.approx(float(cosine), abs=1e-5)
    assert plan.scores["fit"]["fitted"]["cosine_after"] > plan.scores["fit"]["fitted"]["cosine_before"]
    # The folded model's stream after layer start - 1 is m T + (h_s - m).
    pruned = apply(plan, copy.deepcopy(problem.view.model))
    found = pruned(input_ids=many_ids, use_cache=False, output_hidden_states=True).hidden_states[start]
    torch.testing.assert_close(found.flatten(0, 1), mapped, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["zero", "identity"])
def test_the_ridge_draws_the_map_to_its_target(target, many_ids):
    problem = problem_for("llama", many_ids)
    goal = torch.eye(32) if target == "identity" else torch.zeros(32, 32)
    options = {"protect_last": 1, "held_out": 0.0, "ridge_target": target}
    plans = [ReplaceMe(protect_last=1, held_out=0.0).plan(problem)]
    plans += [ReplaceMe(ridge=ridge, **options).plan(problem) for ridge in (0.1, 10)]
    sizes = [float((torch.from_numpy(plan.tensors["fold.0"]) - goal).norm()) for plan in plans]
    assert sizes[0] > sizes[1] > sizes[2]
    output, before, after = rows_of(problem.view, many_ids, *ends(plans[1]))
    gram, moment = output.double().T @ output.double(), output.double().T @ (after - before + output).double()
    penalty = 0.1 * gram.trace() / 32 * torch.eye(32, dtype=torch.float64)
    expected = torch.linalg.solve(gram + penalty, moment + penalty @ goal.double())
    torch.testing.assert_close(torch.from_numpy(plans[1].tensors["fold.0"]), expected.float(), rtol=1e-3, atol=1e-4)


def ends(plan):
    return plan.dropped[0], plan.dropped[-1] + 1


@pytest.mark.parametrize("accurate", [False, True])
def test_cosine_is_raised_where_it_says(accurate, many_ids):
    problem = problem_for("llama", many_ids)
    options = {"held_out": 0.0, "learning_rate": 1e-2, "num_epochs": 30, "batch_tokens": 60, "protect_last": 1}
    method = ReplaceMe(solver="cosine", accurate=accurate, **options)
    plan = method.plan(problem)
    output, before, after = rows_of(problem.view, many_ids, *ends(plan))
    rest = before - output

    def objective(transform):
        mapped = output @ transform
        pair = (mapped + rest, after) if accurate else (mapped, after - rest)
        return float(torch.cosine_similarity(*pair, dim=-1).mean())

    assert objective(torch.from_numpy(plan.tensors["fold.0"])) > objective(torch.eye(32)) + 0.05


def test_a_fit_to_few_tokens_is_measured_on_others_and_warned_about(input_ids):
    """24 tokens fitted, 32 channels: an exact fit exists, and says nothing."""
    problem = problem_for("llama", input_ids)
    plan = ReplaceMe().plan(problem)
    fit = plan.scores["fit"]
    assert (fit["fitted"]["num_tokens"], fit["held_out"]["num_tokens"]) == (24, 12)
    assert fit["fitted"]["cosine_after"] == pytest.approx(1, abs=1e-3)
    assert fit["held_out"]["cosine_after"] < 0.9
    (warning,) = plan.scores["warnings"]
    assert warning.startswith("replaceme: 24 tokens for a linear map of 32 x 32 numbers, fewer than 8 x 32: ")
    assert f"-> 1.00 on 24 tokens fitted, {fit['held_out']['cosine_before']:.2f} -> " in warning
    assert warning.endswith("method.ridge=0.1 method.ridge_target=identity")
    drawn = ReplaceMe(ridge=0.1, ridge_target="identity").plan(problem)
    assert drawn.scores["fit"]["held_out"]["cosine_after"] > fit["held_out"]["cosine_after"]
    assert not drawn.scores["warnings"][0].endswith("identity")


def test_enough_tokens_are_no_warning():
    ids = torch.randint(0, 256, (20, 16), generator=torch.Generator().manual_seed(2))
    plan = ReplaceMe().plan(problem_for("llama", ids))
    assert plan.scores["fit"]["fitted"]["num_tokens"] == 288 >= 8 * 32
    assert "warnings" not in plan.scores


def test_of_a_single_sample_the_last_tokens_are_held_out(input_ids):
    held = ReplaceMe(held_out=0.25)._is_held_out(input_ids[:1])
    assert held.tolist() == [[False] * 9 + [True] * 3]
    assert not ReplaceMe()._is_held_out(input_ids[:1, :1]).any()
    assert ReplaceMe(held_out=0.99)._is_held_out(input_ids).sum() == 24  # one sample is left to fit


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "olmo2"])
def test_a_norm_behind_the_projection_is_refused(architecture):
    with pytest.raises(UserError, match="a norm follows the last projection"):
        ReplaceMe().check(context_of(random_source(architecture)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect_first": 0}, "must be at least 1: a layer must be left below"),
        ({"solver": "qr"}, "'qr' is not one of least_squares"),
        ({"ridge": -1.0}, "must be at least 0"),
        ({"ridge": float("nan")}, "must be a finite number at least 0"),
        ({"held_out": 1.0}, r"held_out=1.0 must lie in \[0, 1\)"),
        ({"ridge": 1.0, "ridge_target": "mean"}, "'mean' is not one of zero, identity"),
        ({"ridge_target": "identity"}, "ridge_target=identity does nothing with method.ridge=0; leave it at zero"),
        ({"solver": "cosine", "ridge": 0.1}, "ridge=0.1 does nothing with method.solver=cosine; leave it at 0.0"),
        ({"num_epochs": 3}, "num_epochs=3 does nothing with method.solver=least_squares; leave it at 10"),
        ({"accurate": True}, "accurate=True does nothing with method.solver=least_squares"),
        ({"solver": "cosine", "learning_rate": 0.0}, "must be above 0"),
        ({"solver": "cosine", "num_epochs": 0}, "must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        ReplaceMe(**options)
