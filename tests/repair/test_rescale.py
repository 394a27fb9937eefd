"""Rescale against what Prune&Comp does by hand: larger embeddings, and a head that is as much smaller."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import context_of, random_source
from repairs import plan_of, rescale
from torch import nn

from slm_pipeline.errors import UserError
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.ops.scale import Scale

# Of 6 layers: those that go, and for each place the first and one past the last of the layers that went there.
CUTS = [((2, 3), [(2, 4)]), ((1, 3, 4), [(1, 2), (3, 5)]), ((0, 2), [(0, 1), (2, 3)])]


def growing(architecture="llama"):
    """A model whose stream grows, and whose norms know no scale at all: they add nothing to the variance."""
    model, _ = load_dense(random_source(architecture))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


@torch.no_grad()
def growth(model, ids, cuts):
    """s of each cut: mean over channels of E|h_e| / E|h_s|, by transformers' own hidden states."""
    view, states = ModelView(model), []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in view.layers]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    sizes = [state.flatten(0, 1).double().abs().mean(dim=0) for state in states]
    return [float((sizes[end] / sizes[start]).mean()) for start, end in cuts]


@pytest.mark.parametrize(("dropped", "cuts"), CUTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt"])
@torch.no_grad()
def test_it_is_the_same_to_enlarge_what_enters_the_layers_above_each_cut(architecture, dropped, cuts, make_problem):
    """By hand: a module at each cut multiplies the stream by s. No head is touched: norms know no scale."""
    model = growing(architecture)
    problem = make_problem(model, plan_of(*(Drop((layer,)) for layer in dropped)))
    plan = rescale().repair(problem)
    factors = growth(model, problem.input_ids, cuts)
    found = plan.scores["repair"]
    assert found["num_tokens"] == problem.input_ids.numel()
    assert [cut["layer"] for cut in found["cuts"]] == [end for _, end in cuts]
    assert [cut["factor"] for cut in found["cuts"]] == pytest.approx(factors, rel=1e-5)
    total, expected = 1.0, {}
    for layer in (layer for layer in range(6) if layer not in dropped):
        for (_, end), factor in zip(cuts, factors, strict=True):
            total *= factor if end == layer else 1.0
        if total != 1.0:
            expected[layer] = 1 / total
    scales = {op.layers[0]: op.factor for op in plan.ops if isinstance(op, Scale)}
    assert scales == pytest.approx(expected, rel=1e-5)

    by_hand = apply(problem.plan, copy.deepcopy(model)).double()
    kept = [layer for layer in range(6) if layer not in dropped]
    for (_, end), factor in zip(cuts, factors, strict=True):
        ModelView(by_hand).layers[kept.index(end)].register_forward_pre_hook(
            lambda _, args, factor=factor: (args[0] * factor, *args[1:])
        )
    ids = problem.input_ids[:3]
    repaired = apply(plan, copy.deepcopy(model)).double()
    logits = [each(input_ids=ids, use_cache=False).logits for each in (repaired, by_hand)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    plain = apply(problem.plan, copy.deepcopy(model)).double()(input_ids=ids, use_cache=False).logits
    assert (plain - logits[1]).abs().max() > 20 * (logits[0] - logits[1]).abs().max()


@torch.no_grad()
def test_tied_embeddings_stay_as_they_are(make_problem):
    """Where the published code makes the embeddings larger and must make up for it in the head."""
    model = growing()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    problem = make_problem(model, plan_of(Drop((0,)), Drop((1,))))
    plan = rescale().repair(problem)
    (factor,) = (cut["factor"] for cut in plan.scores["repair"]["cuts"])
    before = model.lm_head.weight.clone()
    repaired = apply(plan, copy.deepcopy(model))
    assert repaired.lm_head.weight is repaired.model.embed_tokens.weight
    assert torch.equal(repaired.lm_head.weight, before)
    published = apply(problem.plan, copy.deepcopy(model))
    published.lm_head.weight = nn.Parameter(before)  # as the head is after it was divided by s again
    published.model.embed_tokens.weight.data = before * factor
    ids = problem.input_ids[:3]
    logits = [each(input_ids=ids, use_cache=False).logits for each in (repaired, published)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_where_no_layers_went_below_others_there_is_nothing_to_rescale(make_problem):
    for ops in ((), (Drop((5,)),), (Merge((2, 3), "official"),)):
        plan = plan_of(*ops)
        repaired = rescale().repair(make_problem(growing(), plan))
        assert repaired.ops == plan.ops
        assert repaired.scores["repair"]["cuts"] == []
        assert repaired.scores["repair"]["num_tokens"] == 0  # none was run
        assert repaired.scores["warnings"] == [
            "repair=rescale: no whole layers went below one that stays, so there is nothing to rescale"
        ]


def test_a_cut_that_a_map_stands_for_is_left_alone(make_problem):
    """The map brings the stream to the size that it had; the other cut, in the same plan, is rescaled."""
    model, eye = growing(), np.eye(32, dtype=np.float32)
    ops = [Drop((2,)), Drop((4,)), Fold((1,), "map")]
    plan = rescale().repair(make_problem(model, plan_of(*ops, tensors={"map": eye})))
    assert [cut["layer"] for cut in plan.scores["repair"]["cuts"]] == [5]
    assert [op.layers for op in plan.ops[3:]] == [(5,)]
    (line,) = plan.scores["warnings"]
    assert line.startswith("repair=rescale: a linear map stands for layers 2 to 2, which went")
    alone = rescale().repair(make_problem(model, plan_of(Drop((2,)), Fold((1,), "map"), tensors={"map": eye})))
    assert len(alone.ops) == 2
    assert len(alone.scores["warnings"]) == 1


def test_states_that_are_not_finite_are_an_error(make_problem):
    model = growing()
    ModelView(model).layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the states after layer 1 are not finite"):
        rescale().repair(make_problem(model, plan_of(Drop((3,)))))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "olmo2"])
def test_refused_where_a_norm_follows_the_last_projections(architecture):
    with pytest.raises(UserError, match=f"^repair=rescale multiplies what .* in random, a {architecture} model, a nor"):
        rescale().check(context_of(random_source(architecture)))
