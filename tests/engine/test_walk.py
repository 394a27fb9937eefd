"""Many removals walked together against whole models that lack what is removed, one after the other."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import peculiar_model

from slm_pipeline.engine import blocks, walk
from slm_pipeline.engine.walk import Removal, RemovalWalk, Round
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView


@torch.no_grad()
def naive_loss(model, removed, input_ids):
    """Mean next-token loss of a copy without some layers and with other sublayers' last projections at zero."""
    view = ModelView(copy.deepcopy(model))
    for layer, part in removed:
        if part != "layer":
            view.silence(layer, part)
    gone = [layer for layer, part in removed if part == "layer"]
    kept = [layer for layer in range(view.num_layers) if layer not in gone]
    view.rebuild([view.layers[layer] for layer in kept], kept)
    return sum(float(view.model(input_ids=row[None], labels=row[None]).loss) for row in input_ids) / len(input_ids)


CANDIDATES = [Removal(0), Removal(2), Removal(3, "mlp"), Removal(4, "attention"), Removal(5, "mlp"), Removal(5)]


@pytest.mark.parametrize(("tokens", "strict"), [(2048, False), (12, False), (2048, True)])
def test_losses_are_those_of_whole_models(tokens, strict, any_model, input_ids, monkeypatch):
    """Layer 1 is gone already, layer 3 has lost its attention and loses the rest."""
    monkeypatch.setattr(walk, "_TEXT_TOKENS", tokens)
    monkeypatch.setattr(blocks, "CPU_TOKENS", tokens)
    walking = RemovalWalk(ModelView(any_model), input_ids, strict=strict)
    walking.remove(Removal(1))
    walking.remove(Removal(3, "attention"))
    removed = [Removal(1), Removal(3, "attention")]
    expected = {candidate: naive_loss(any_model, [*removed, candidate], input_ids) for candidate in CANDIDATES}
    assert len({round(loss, 4) for loss in expected.values()}) == len(CANDIDATES)
    assert walking.losses(CANDIDATES) == pytest.approx(expected, abs=1e-5)
    best = min(expected, key=expected.get)
    contenders = walking.losses_of_contenders(CANDIDATES)
    assert min(contenders, key=contenders.get) == best
    measured = {candidate: loss for candidate, loss in contenders.items() if loss < math.inf}
    assert measured == pytest.approx({candidate: expected[candidate] for candidate in measured}, abs=1e-5)


def test_each_candidate_starts_where_it_differs(tiny_llama, input_ids):
    walking = RemovalWalk(ModelView(tiny_llama[0]), input_ids)
    walking.losses([Removal(layer) for layer in range(6)])
    assert walking.num_block_evaluations == pytest.approx(5 + 4 + 3 + 2 + 1 + 0)
    walking.losses([Removal(4, "mlp")])  # runs its own block, and the one above
    assert walking.num_block_evaluations == pytest.approx(15 + 2)
    walking.remove(Removal(2))
    walking.losses([Removal(5)])  # what enters layer 5 is out of date: layers 3 and 4 are run; 5 is found on the way
    assert walking.num_block_evaluations == pytest.approx(17 + 3)
    walking.losses([Removal(5)])
    assert walking.num_block_evaluations == pytest.approx(20)


def test_greedily_it_is_the_plain_loop(input_ids):
    model = peculiar_model("gemma3_text")
    candidates = [Removal(layer, part) for layer in range(1, 6) for part in ("attention", "mlp")]
    removed, losses = [], []
    for _ in range(4):
        found = {c: naive_loss(model, [*removed, c], input_ids) for c in candidates if c not in removed}
        removed.append(min(found, key=found.get))
        losses.append(found[removed[-1]])
    rounds = list(RemovalWalk(ModelView(model), input_ids).greedily(candidates, 4))
    assert [found.removed for found in rounds] == removed
    assert [found.loss for found in rounds] == pytest.approx(losses, abs=1e-5)
    assert [len(found.losses) for found in rounds] == [10, 9, 8, 7]


def test_a_candidate_is_given_up_only_when_it_cannot_win(input_ids, monkeypatch):
    monkeypatch.setattr(walk, "_TEXT_TOKENS", 12)  # one sample at a time
    view = ModelView(peculiar_model("llama", num_layers=8))
    with torch.no_grad():  # without layer 0 the residual stream lacks what makes the logits small
        view.layers[0].mlp.down_proj.weight.mul_(40)
    candidates = [walk.Removal(layer) for layer in range(8)]
    everything = walk.RemovalWalk(view, input_ids).losses(candidates)
    best = min(everything, key=everything.get)
    limited = walk.RemovalWalk(view, input_ids).losses_of_contenders(candidates)
    assert min(limited, key=limited.get) == best
    assert math.inf in limited.values()
    finite = {layer: loss for layer, loss in limited.items() if loss < math.inf}
    assert finite == pytest.approx({layer: everything[layer] for layer in finite}, abs=1e-6)


def test_a_round_in_the_plan():
    losses = {Removal(3): 1.5, Removal(4, "mlp"): math.inf, Removal(4, "attention"): 2.5}
    assert Round(Removal(3), 1.5, losses).as_scores() == {
        "removed": 3, "loss": 1.5, "losses": {"3": 1.5, "4.mlp": None, "4.attention": 2.5}
    }  # fmt: skip
    assert Round(Removal(4, "mlp"), 0.5, {}).as_scores("distance", "distances") == {
        "removed": "4.mlp", "distance": 0.5, "distances": {}
    }  # fmt: skip


def test_no_finite_loss_is_an_error():
    walk.check_some_finite([math.inf, 1.0])
    with pytest.raises(UserError, match="loss is not finite whatever is removed"):
        walk.check_some_finite([math.inf, math.nan])
