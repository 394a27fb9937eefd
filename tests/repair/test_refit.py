"""Refit of whole plans: what it restores exactly, when it leaves the weights alone, and whom it serves."""

from __future__ import annotations

import copy
import dataclasses
import json
import weakref

import numpy as np
import pytest
import torch
from conftest import peculiar_model, random_source
from plans import narrowing
from repairs import plan_of, refit

from slm_pipeline.config import ModelConfig
from slm_pipeline.engine import refit as engine
from slm_pipeline.engine.streams import Streams
from slm_pipeline.errors import UserError
from slm_pipeline.models import checkpoint
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.loading import load_checkpoint, load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.store.unfinished import drop_incomplete
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops import resize
from slm_pipeline.surgery.ops.correct import Correct
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.ops.replace import Replace
from slm_pipeline.surgery.ops.scale import Scale
from slm_pipeline.surgery.plan import Plan

EXACT = [1e-9]  # ridges


def lively(num_layers=6):
    """A model whose layers turn the stream, so that each is missed."""
    model, _ = load_dense(random_source(num_layers=num_layers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def silent(model, *layers):
    """The model with layers that write nothing."""
    view = ModelView(model)
    for layer in layers:
        for part in ("attention", "mlp"):
            view.silence(layer, part)
    return model


def what(plan):
    """(layer, sublayer) -> what became of its projection."""
    layers = plan.scores["repair"]["layers"]
    return {(of["layer"], found["sublayer"]): found for of in layers for found in of["projections"]}


def test_a_plan_without_ops_stays_as_it_is(make_problem):
    plan = plan_of()
    assert refit().repair(make_problem(lively(), plan)) is plan
    assert (plan.ops, plan.scores) == ([], {})


def test_layers_that_wrote_nothing_are_not_missed(make_problem):
    plan = plan_of(Drop((3,)), Drop((4,)))
    repaired = refit(ridges=EXACT).repair(make_problem(silent(lively(), 3, 4), plan))
    assert repaired.content() == plan.content()
    assert {found["ridge"] for found in what(repaired).values()} == {None}
    assert repaired.scores["warnings"] == [
        "repair=refit: no new weights do better on the text held out, so the weights stay"
    ]


@torch.no_grad()
def test_a_halved_layer_is_restored_to_the_last_digit(make_problem):
    """Layers 3 and 4 write nothing and go, layer 2 below them writes half: its own weights are the one solution."""
    model = silent(lively(), 3, 4)
    plan = plan_of(Drop((3,)), Drop((4,)), Scale((2,), 0.5))
    repaired = refit(ridges=EXACT).repair(make_problem(model, plan))
    (op,) = [op for op in repaired.ops if isinstance(op, Replace)]
    assert (op.layers, op.sublayers, op.biases) == ((2,), ("attention", "mlp"), None)
    layer = ModelView(model).layers[2]
    for part, module in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
        new = torch.from_numpy(repaired.tensors[f"{op.tensors}.{part}"])
        torch.testing.assert_close(new, module.weight, rtol=1e-3, atol=1e-3)
        assert what(repaired)[2, part]["before"] == pytest.approx(0.25, rel=1e-3)
        assert what(repaired)[2, part]["after"] < 1e-6
    found = repaired.scores["repair"]["divergence"]
    assert found["repaired"]["kl"] < 1e-6 < 1e-3 < found["pruned"]["kl"]
    ids = torch.arange(24).view(2, 12)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(apply(repaired, model)(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_layer_that_only_writes_what_a_linear_map_of_the_one_below_gives_is_folded_into_that(make_problem):
    """Layer 3's network stands on the same normed states as layer 2's and has its inner weights: a linear map of the
    same activations. So layer 2 can write for both."""
    model = silent(lively(), 3)
    view = ModelView(model)
    low, high = view.layers[2], view.layers[3]
    low.mlp.down_proj.weight.zero_()  # so that layer 3's network sees what layer 2's did
    high.mlp.load_state_dict(low.mlp.state_dict())
    high.post_attention_layernorm.load_state_dict(low.post_attention_layernorm.state_dict())
    high.mlp.down_proj.weight.normal_(generator=torch.Generator().manual_seed(5))
    repaired = refit(ridges=EXACT).repair(make_problem(model, plan_of(Drop((3,)))))
    new = torch.from_numpy(repaired.tensors["refit.2.mlp"])
    torch.testing.assert_close(new, high.mlp.down_proj.weight, rtol=1e-3, atol=1e-3)
    assert what(repaired)[2, "attention"]["ridge"] is None
    assert repaired.scores["repair"]["divergence"]["repaired"]["kl"] < 1e-6


def test_a_part_of_the_samples_is_held_out_of_the_fit(make_problem):
    plan = plan_of(Drop((3,)))
    found = refit(held_out=0.25).repair(make_problem(lively(), plan)).scores["repair"]
    assert (found["num_tokens"], found["num_held_out"]) == (15 * 12, 5 * 12)
    for share, number, expected in ((0.2, 20, [2, 7, 12, 17]), (0.01, 4, [2]), (0.99, 3, [0, 2]), (0.5, 2, [1])):
        problem = make_problem(lively(1), plan_of(num_layers=1), num_samples=number)
        fitted, held_out = refit(held_out=share)._split(problem)
        assert torch.equal(held_out, problem.input_ids[expected])
        assert len(fitted) == number - len(expected)


def test_of_one_long_text_no_token_is_in_both_parts(make_problem):
    """Samples are 12 tokens long; those held out start at 40 and later, and one that starts at 29 reaches into that."""
    starts = [50, 3, 29, 40, 28, 16, 5, 44]
    problem = make_problem(lively(1), plan_of(num_layers=1), num_samples=len(starts))
    problem = dataclasses.replace(problem, places=[{"start": start} for start in starts])
    fitted, held_out = refit(held_out=0.4)._split(problem)
    assert torch.equal(held_out, problem.input_ids[[0, 3, 7]])
    assert torch.equal(fitted, problem.input_ids[[1, 4, 5, 6]])
    rows = dataclasses.replace(problem, places=[{"row": 2, "start": start} for start in starts])
    assert len(refit(held_out=0.4)._split(rows)[0]) == 5
    far = [7, 90_000, 20_000, 9_000, 80_000, 70_000, 66_000, 30_000]  # characters: 12 tokens may take 4,480
    letters = dataclasses.replace(problem, places=[{"character": start} for start in far])
    fitted, held_out = refit(held_out=0.4)._split(letters)
    assert torch.equal(held_out, problem.input_ids[[1, 4, 5]])  # and 66,000 may reach into 70,000
    assert torch.equal(fitted, problem.input_ids[[0, 2, 3, 7]])
    close = dataclasses.replace(problem, places=[{"start": start % 12} for start in starts])
    with pytest.raises(UserError, match="all of its 8 samples of 12 tokens overlap with those held out; use a longer"):
        refit(held_out=0.4)._split(close)


def test_weights_stay_where_the_fit_does_not_help_on_other_text(make_problem):
    """Two samples of 12 tokens, and 32 or 48 weights a row: one is fitted exactly, which says nothing of the other."""
    plan = plan_of(Drop((3,)), scores={"warnings": ["of the search"]})
    repaired = refit(ridges=[1e-5]).repair(make_problem(lively(), plan, num_samples=2))
    assert repaired.content() == plan.content()
    assert repaired.scores["warnings"][0] == "of the search"
    assert "so the weights stay" in repaired.scores["warnings"][1]
    assert plan.scores == {"warnings": ["of the search"]}


@pytest.mark.parametrize("after", [(2.0, 0.5), (1.0, 0.5), (0.98, 0.5)])
def test_nothing_changes_if_the_whole_model_is_no_closer_on_other_text(after, make_problem, monkeypatch):
    found = iter([(1.0, 0.5), after])
    monkeypatch.setattr(Streams, "divergence", lambda self: next(found))
    plan = plan_of(Drop((3,)))
    repaired = refit(choice="projection").repair(make_problem(lively(), plan))
    assert any(of["ridge"] for of in what(repaired).values())
    assert repaired.content() == plan.content()
    (line,) = repaired.scores["warnings"]
    assert f"is {after[0]:.4g} with new weights and 1 without, not 3% less (repair.least_gain)" in line
    divergence = repaired.scores["repair"]["divergence"]
    assert (
        divergence["repaired"] == divergence["pruned"] == {"kl": 1.0, "same_top_1": 0.5}
    )  # of the model that there is


def test_a_smaller_gain_is_taken_if_that_is_asked_for(make_problem, monkeypatch):
    found = iter([(1.0, 0.5), (0.98, 0.5)])
    monkeypatch.setattr(Streams, "divergence", lambda self: next(found))
    repaired = refit(choice="projection", least_gain=0.01).repair(make_problem(lively(), plan_of(Drop((3,)))))
    assert any(isinstance(op, Replace) for op in repaired.ops)


def test_a_prior_of_narrower_layers_is_said_to_do_nothing_where_there_are_none(make_problem, tmp_path):
    model, how = lively(), {"ridges": [0.1], "reads": [], "prior": "own_output", "target": "dense_stream"}
    cut = refit(**how).repair(make_problem(model, plan_of(Drop((3,))), out=tmp_path / "cut"))
    assert cut.scores["warnings"] == [
        "repair.prior=own_output does nothing here: no layer that stays has lost heads or neurons"
    ]
    narrower = narrowing({1: (None, range(20))}, num_layers=6)
    scores = refit(**how).repair(make_problem(model, narrower, out=tmp_path / "narrower")).scores
    assert all("repair.prior" not in line for line in scores.get("warnings", []))


def test_where_units_went_the_best_way_to_the_stream_is_tried_with_both_priors(make_problem, tmp_path):
    model, narrower = lively(), narrowing({1: (None, range(20)), 3: ([0], None)}, num_layers=6)
    stream = {"ridges": [10.0], "reads": [], "target": "dense_stream", "shares": [], "weighting": "none"}

    def repaired(plan, name, **options):
        return refit(**stream | options).repair(make_problem(model, plan, out=tmp_path / name)).scores["repair"]

    alone = {prior: repaired(narrower, prior, prior=prior) for prior in engine.PRIORS}
    kl = {prior: found["divergence"]["repaired"]["kl"] for prior, found in alone.items()}
    assert kl["own_output"] < kl["weights"]  # so large a ridge hardly moves a weight
    either = repaired(narrower, "either")
    assert either["ridges"] == alone["weights"]["ridges"]
    assert either["priors"] == {"own_output": kl["own_output"]}
    assert either["divergence"]["repaired"]["kl"] == kl["own_output"]
    assert either["layers"] == alone["own_output"]["layers"] != alone["weights"]["layers"]
    assert [found["priors"] for found in alone.values()] == [{}, {}]
    assert repaired(narrower, "own", target="own_output")["priors"] == {}
    assert repaired(plan_of(Drop((3,))), "cut")["priors"] == {}


def test_one_sublayer_alone(make_problem, tmp_path):
    plan = plan_of(Drop((3,)))
    for part in ("attention", "mlp"):
        repaired = refit(sublayers=part).repair(make_problem(lively(), plan, out=tmp_path / part))
        assert {sublayer for _, sublayer in what(repaired)} == {part}
        assert {op.sublayers for op in repaired.ops[1:]} == {(part,)}


def test_a_repaired_plan_is_repaired_again_and_both_weights_are_kept(make_problem, tmp_path):
    model, plan = lively(), plan_of(Drop((3,)))
    once = refit(ridges=[10.0], least_gain=0.0).repair(make_problem(model, plan))
    twice = refit(ridges=[0.01], least_gain=0.0).repair(make_problem(model, once, out=tmp_path / "again"))
    names = {name.partition(".")[0] for name in twice.tensors}
    assert names == {"refit", "refit_2"}
    assert all(np.array_equal(twice.tensors[name], value) for name, value in once.tensors.items())
    kl = [of.scores["repair"]["divergence"]["repaired"]["kl"] for of in (once, twice)]
    assert kl[1] < kl[0]
    assert twice.scores["repair"]["divergence"]["pruned"]["kl"] == pytest.approx(kl[0], rel=1e-5)


def test_what_is_read_is_corrected_after_the_ridge_is_known_if_that_brings_the_model_closer(make_problem, tmp_path):
    model, plan = lively(), plan_of(Drop((2, 3)))
    writes = refit(ridges=[0.001, 0.1]).repair(make_problem(model, plan, out=tmp_path / "writes"))
    both = refit(ridges=[0.001, 0.1], reads=[1e6, 0.1]).repair(make_problem(model, plan, out=tmp_path / "both"))
    tried = both.scores["repair"]
    assert tried["ridges"] == writes.scores["repair"]["ridges"]
    kl, best = tried["reads"], min(tried["ridges"].values())
    assert list(kl) == ["1e+06", "0.1"]
    assert kl["1e+06"] == pytest.approx(best, rel=1e-3)  # a map that hardly leaves the identity
    assert tried["divergence"]["repaired"]["kl"] == min(*kl.values(), best)
    alone = refit(ridges=[float(min(tried["ridges"], key=tried["ridges"].__getitem__))], reads=[0.1])
    found = alone.repair(make_problem(model, plan, out=tmp_path / "alone"))
    assert found.scores["repair"]["reads"]["0.1"] == kl["0.1"] < best
    assert found.content() == both.content() != writes.content()
    corrections = [op for op in found.ops if isinstance(op, Correct)]
    assert [op.layers for op in corrections] == [(4,), (5,)]  # what enters layer 1 is the dense stream, above it is not
    assert {name.split(".", 2)[2] for name in found.tensors} >= {"attention", "reads.attention", "reads.mlp"}


def test_one_ridge_is_chosen_for_the_stack_by_what_it_does_to_the_whole_model(make_problem, tmp_path):
    model, plan = lively(), plan_of(Drop((2, 3)))
    alone = {r: refit(ridges=[r]).repair(make_problem(model, plan, out=tmp_path / f"{r}")) for r in (0.001, 0.1, 10.0)}
    kl = {ridge: found.scores["repair"]["divergence"]["repaired"]["kl"] for ridge, found in alone.items()}
    chosen = refit(ridges=[0.001, 0.1, 10.0]).repair(make_problem(model, plan, out=tmp_path / "all"))
    best = min(kl, key=kl.__getitem__)
    assert chosen.scores["repair"]["ridges"] == {f"{ridge:g}": value for ridge, value in kl.items()}
    assert chosen.content() == alone[best].content()
    assert len({round(value, 6) for value in kl.values()}) == 3


@pytest.mark.parametrize(("failing", "other"), [(1e-9, 0.1), (0.1, 0.01)])  # the second is the middle one
def test_a_ridge_that_cannot_be_solved_leaves_the_others(failing, other, make_problem, tmp_path, monkeypatch, caplog):
    model, plan = lively(), plan_of(Drop((3,)))
    alone = refit(ridges=[other]).repair(make_problem(model, plan, out=tmp_path / "alone"))
    layer = engine.Refit.layer

    def small(self, *about):
        if failing in self.ridges:
            raise UserError("the inputs are linearly dependent")
        return layer(self, *about)

    monkeypatch.setattr(engine.Refit, "layer", small)
    found = refit(ridges=[failing, other]).repair(make_problem(model, plan, out=tmp_path / "both"))
    assert found.content() == alone.content()
    assert list(found.scores["repair"]["ridges"]) == [f"{other:g}"]
    assert f"refit: ridges {failing:g}: the inputs are linearly dependent" in caplog.messages
    with pytest.raises(UserError, match="the inputs are linearly dependent"):
        refit(ridges=[failing]).repair(make_problem(model, plan, out=tmp_path / "none"))


def test_walks_are_counted_also_where_another_ridge_than_the_middle_one_is_best(make_problem, monkeypatch):
    how = refit(ridges=[1e-3, 0.1, 1.0], weighting="either", reads=[0.1])
    names, walk = [], type(how)._walk
    monkeypatch.setattr(type(how), "_walk", lambda self, *about: names.append(about[-1]) or walk(self, *about))
    divergences = iter([(1.0, 0.5), (0.6, 0.5), (0.7, 0.5), (0.5, 0.5), (0.6, 0.5), (0.6, 0.5)])
    monkeypatch.setattr(Streams, "divergence", lambda self: next(divergences))
    tried = how.repair(make_problem(lively(), plan_of(Drop((3,))))).scores["repair"]
    assert tried["ridges"] == {"0.001": 0.5, "0.1": 0.6, "1": 0.6}
    assert names == [f"refit {number} of 5" for number in range(1, 6)]


def test_a_killed_repair_goes_on_after_its_last_layer_and_ends_the_same(make_problem, tmp_path, monkeypatch):
    model, plan, out = lively(), plan_of(Drop((1,))), tmp_path / "killed"
    expected = refit(ridges=[0.1], reads=[1.0]).repair(make_problem(model, plan))
    whole, fitted = engine.Refit.layer, []

    def until(number):
        def layer(self, streams, other, block):
            if len(fitted) == number:
                raise KeyboardInterrupt
            fitted.append(block.body)
            return whole(self, streams, other, block)

        return layer

    monkeypatch.setattr(engine.Refit, "layer", until(2))
    with pytest.raises(KeyboardInterrupt):
        refit(ridges=[0.1], reads=[1.0]).repair(make_problem(model, plan, out=out))
    assert fitted == [0, 2]
    damaged = out / "layers" / "refit_0.1" / "2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (out / "layers" / "refit_0.1" / "3.safetensors").write_bytes(b"half")
    drop_incomplete(out)  # as the store does before each attempt
    assert sorted(path.name for path in (out / "layers" / "refit_0.1").iterdir()) == ["0.json", "0.safetensors"]
    fitted.clear()
    monkeypatch.setattr(engine.Refit, "layer", until(None))
    repaired = refit(ridges=[0.1], reads=[1.0]).repair(make_problem(model, plan, out=out))
    assert fitted == [2, 3, 4, 5, 0, 2, 3, 4, 5]  # the second time with what is read
    for name, found in (("a", expected), ("b", repaired)):
        found.write(tmp_path / name / "plan.json")
    assert len({(tmp_path / name / "plan.json").read_bytes() for name in "ab"}) == 1
    assert len({(tmp_path / name / "plan.safetensors").read_bytes() for name in "ab"}) == 1


def test_what_goes_wrong_beside_the_fits_is_raised_and_what_was_whole_before_is_kept(
    make_problem, tmp_path, monkeypatch
):
    """Layers are written in the background: a disk that fills up ends the repair, also at its last layer."""
    from slm_pipeline.repair.refit import _Kept

    for full_at in (1, 4):
        model, plan, out = lively(), plan_of(Drop((1,))), tmp_path / str(full_at)
        write, written = _Kept.write, []

        def fails(self, *what, number=full_at, write=write, written=written):
            if len(written) == number:
                raise OSError(28, "No space left on device")
            write(self, *what)
            written.append(self.name)

        with monkeypatch.context() as patched:
            patched.setattr(_Kept, "write", fails)
            with pytest.raises(OSError, match="No space left"):
                refit(ridges=[0.1]).repair(make_problem(model, plan, out=out))
        assert written == [f"layers/refit_0.1/{layer}" for layer in (0, 2, 3, 4)[:full_at]]
        drop_incomplete(out)
        assert len([*(out / "layers").rglob("*.safetensors")]) == full_at


def test_of_all_walks_the_best_ones_layers_stay_and_what_is_known_is_not_walked_again(
    make_problem, tmp_path, monkeypatch
):
    model, plan = lively(), plan_of(Drop((1,)))
    how = refit(ridges=[10.0, 0.1, 1.0], weighting="either", shares=[0.5])
    expected = how.repair(make_problem(model, plan, out=tmp_path))
    tried = expected.scores["repair"]
    walks = {"refit_1.0": tried["weightings"]["inverse_square"], "refit_1.0_none": tried["weightings"]["none"]}
    way = "_none" if walks["refit_1.0_none"] < walks["refit_1.0"] else ""
    walks |= {f"refit_{r}{way}": kl for r, kl in zip(how.ridges, tried["ridges"].values(), strict=True)}
    assert walks[f"refit_1.0{way}"] == min(tried["weightings"].values())  # not walked again
    best = min(walks, key=walks.__getitem__)
    walks[f"{best.removesuffix('_none')}_share_0.5{way}"] = tried["shares"]["0.5"]
    assert sorted(path.stem for path in (tmp_path / "layers").glob("*.json")) == sorted(walks)
    (left,) = [path for path in (tmp_path / "layers").iterdir() if path.is_dir()]
    assert walks[left.name] == min(walks.values())
    assert len([*left.glob("*.safetensors")]) == 5
    drop_incomplete(tmp_path)
    monkeypatch.setattr(engine.Refit, "layer", lambda *_: pytest.fail("is known"))
    again = how.repair(make_problem(model, plan, out=tmp_path))
    assert (again.content(), again.scores) == (expected.content(), expected.scores)


def test_a_repair_killed_on_its_walk_to_the_own_output_goes_on_there(make_problem, tmp_path, monkeypatch):
    model, plan = lively(), narrowing({layer: (None, range(20)) for layer in range(1, 5)}, num_layers=6)
    how = refit(ridges=[1e3], reads=[1.0], weighting="either", shares=[0.5])
    whole, fitted = engine.Refit.layer, []
    expected = how.repair(make_problem(model, plan, out=tmp_path / "whole"))

    def layer(self, streams, other, block):
        if len(fitted) == 17:
            raise KeyboardInterrupt
        fitted.append((self.target, self.share, block.body))
        return whole(self, streams, other, block)

    monkeypatch.setattr(engine.Refit, "layer", layer)
    with pytest.raises(KeyboardInterrupt):
        how.repair(make_problem(model, plan, out=tmp_path / "killed"))
    before, fitted[:] = set(fitted), []

    def seen(self, *about):
        fitted.append((self.target, self.weighting, self.reads))
        return whole(self, *about)

    monkeypatch.setattr(engine.Refit, "layer", seen)
    found = how.repair(make_problem(model, plan, out=tmp_path / "killed"))
    assert {one[:2] for one in before} == {("dense_stream", 1.0), ("dense_stream", 0.5), ("own_output", 1.0)}
    own = [("own_output", weighting, None) for weighting in engine.WEIGHTINGS for _ in range(2 * 5)]
    assert fitted[:18] == own[2:]
    assert [(target, reads) for target, _, reads in fitted[18:]] == [("own_output", 1.0)] * 5
    assert (found.content(), found.scores) == (expected.content(), expected.scores)


def test_a_repair_killed_on_its_walk_with_the_other_prior_goes_on_there(make_problem, tmp_path, monkeypatch):
    model, plan = lively(), narrowing({layer: (None, range(20)) for layer in range(1, 5)}, num_layers=6)
    how = refit(ridges=[10.0], target="dense_stream")
    whole, fitted = engine.Refit.layer, []
    expected = how.repair(make_problem(model, plan, out=tmp_path / "whole"))

    def layer(self, *about):
        if len(fitted) == 7:
            raise KeyboardInterrupt
        fitted.append(self.prior)
        return whole(self, *about)

    monkeypatch.setattr(engine.Refit, "layer", layer)
    with pytest.raises(KeyboardInterrupt):
        how.repair(make_problem(model, plan, out=tmp_path / "killed"))
    assert fitted == ["weights"] * 5 + ["own_output"] * 2
    fitted.clear()
    found = how.repair(make_problem(model, plan, out=tmp_path / "killed"))
    assert fitted == ["own_output"] * 3
    assert (found.content(), found.scores) == (expected.content(), expected.scores)


def kinds_of_plans():
    """By name, a plan as each kind of method makes them."""
    matrix = (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(4))).numpy()
    kept = ([0], [0, 3, 7, *range(20, 40)])
    return {
        "drop": plan_of(Drop((2,)), Drop((3,))),
        "the first and the last": plan_of(Drop((0,)), Drop((5,))),
        "merge": plan_of(Merge((2, 3, 4), "official")),
        "merge upwards": plan_of(Merge((2, 3), "keep_highest")),
        "zeroed": plan_of(DropSublayer((2,), "attention", "stock"), DropSublayer((4,), "mlp", "stock")),
        "left out": plan_of(DropSublayer((2,), "attention", "custom"), DropSublayer((4,), "mlp", "custom")),
        "fold": plan_of(Drop((3,)), Fold((2,), "fold"), tensors={"fold": matrix}),
        "narrower": narrowing({2: kept, 4: (None, [1, 2])}, Drop((3,))),
        "with a bias": narrowing({2: kept}, biases={2: {"mlp": np.ones(32, np.float32)}}),
        "rescaled": plan_of(Drop((2,)), Scale((3,), 0.5)),
    }


SERVED = sorted(ARCHITECTURES)
SAVED = {"merge", "with a bias"}  # of every architecture; of Llama all are


@pytest.mark.parametrize("architecture", SERVED)
@torch.no_grad()
def test_after_every_kind_of_plan_the_model_is_closer_and_what_is_saved_is_what_is_run(
    architecture, make_problem, tmp_path
):
    _, tokenizer = load_dense(random_source(architecture, num_layers=1))
    model = peculiar_model(architecture)
    ids = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(9))
    for name, plan in kinds_of_plans().items():
        if name not in SAVED and architecture not in ("llama", "opt", "gpt_neox"):
            continue
        how = refit(ridges=[0.1], reads=[10.0])
        repaired = how.repair(make_problem(model, plan, out=tmp_path / name))
        found = repaired.scores["repair"]["divergence"]
        assert found["repaired"]["kl"] < found["pruned"]["kl"], name
        repaired.write(tmp_path / name / "plan.json")
        again = Plan.read(tmp_path / name / "plan.json")
        assert again.content() == repaired.content() != plan.content()
        assert (again.layer_groups, again.zeroed(), again.absent()) == (
            plan.layer_groups, plan.zeroed(), plan.absent(),
        )  # fmt: skip
        unrepaired, pruned = apply(plan, copy.deepcopy(model)), apply(again, copy.deepcopy(model))
        assert type(pruned) is type(unrepaired)
        assert pruned.config.to_dict() == unrepaired.config.to_dict()
        assert {key: value.shape for key, value in pruned.state_dict().items()} == {
            key: value.shape for key, value in unrepaired.state_dict().items()
        }
        if name not in SAVED and architecture != "llama":
            continue
        folder = tmp_path / name / "model"
        config = ModelConfig(name="m", source="local", path=str(folder), dtype="float32", device="cpu")
        expected = pruned(input_ids=ids, use_cache=False).logits
        checkpoint.save(pruned, tokenizer, folder, card="# A model\n", config=config)
        reloaded = load_checkpoint(folder, config)
        torch.testing.assert_close(reloaded(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "dense"}, "repair.target='dense' is not one of either, dense_stream, own_output"),
        ({"weighting": "norm"}, "repair.weighting='norm' is not one of either, inverse_square, none"),
        ({"sublayers": "all"}, "repair.sublayers='all' is not one of both, attention, mlp"),
        ({"ridges": []}, r"repair.ridges=\[\] must name at least one"),
        ({"ridges": [0.0]}, r"repair.ridges.*0"),
        ({"reads": [0.0]}, r"repair.reads.*0"),
        ({"held_out": 0.0}, "repair.held_out"),
        ({"target": "own_output", "prior": "own_output"}, "repair.prior=own_output with repair.target=own_output"),
        ({"held_out": 1.0}, "repair.held_out"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        refit(**options)


def test_the_choices_are_those_of_the_engine():
    from slm_pipeline.repair.refit import CHOICES

    assert CHOICES["weighting"] == ("either", *engine.WEIGHTINGS)
    assert CHOICES["target"] == ("either", *engine.TARGETS)
    assert CHOICES["prior"] == ("either", *engine.PRIORS)


def test_scores_are_json(make_problem):
    repaired = refit(ridges=[0.1]).repair(make_problem(lively(), plan_of(Drop((3,)))))
    assert json.loads(json.dumps(repaired.scores, allow_nan=False)) == repaired.scores


def test_where_units_alone_went_walks_towards_the_own_output_are_tried_too(make_problem, tmp_path):
    model, plan = lively(), narrowing({layer: (None, range(20)) for layer in range(1, 5)}, num_layers=6)
    either = refit(ridges=[1e3], weighting="either").repair(make_problem(model, plan, out=tmp_path / "either"))
    tried = either.scores["repair"]
    names = [
        "own_output, 0.01",
        "own_output, 0.1",
        "own_output, 0.01, all tokens alike",
        "own_output, 0.1, all tokens alike",
    ]
    assert list(tried["targets"]) == names
    assert max(tried["targets"].values()) < min(tried["weightings"].values())  # a ridge that hardly moves a weight
    how = refit(ridges=[0.01, 0.1], weighting="either", target="own_output")
    own = how.repair(make_problem(model, plan, out=tmp_path / "own"))
    assert own.content() == either.content()
    for name, kl in own.scores["repair"]["ridges"].items():
        assert tried["targets"][f"own_output, {name}"] == kl
    alone = refit(ridges=[0.1], target="own_output", weighting="none", reads=[])
    scores = alone.repair(make_problem(model, plan, out=tmp_path / "alone")).scores["repair"]
    assert scores["ridges"] == {"0.1, all tokens alike": tried["targets"][names[-1]]}
    assert len({*tried["targets"].values()}) == 4
    dense = refit(ridges=[1e3], target="dense_stream", least_gain=0.0)
    assert dense.repair(make_problem(model, plan, out=tmp_path / "dense")).scores["repair"]["targets"] == {}
    cut = refit().repair(make_problem(model, plan_of(Drop((3,))), out=tmp_path / "cut"))
    assert cut.scores["repair"]["targets"] == {}


def test_of_a_narrower_model_a_few_blocks_at_a_time_are_there(make_problem, tmp_path, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def kept(*args):
        nonlocal most
        tensor = cut(*args)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    cut = resize._kept
    monkeypatch.setattr(resize, "_kept", kept)
    plan = narrowing({layer: (None, range(20)) for layer in range(6)}, num_layers=6)
    refit(ridges=[0.1], target="dense_stream").repair(make_problem(lively(), plan, out=tmp_path))
    assert 3 <= most <= 9  # of 18: each has two projections into its neurons, and one out of them


def test_shares_of_what_is_missing_are_tried_with_the_best_ridge_and_weights(make_problem, tmp_path):
    model, plan = lively(), plan_of(Drop((2, 3)))

    def found(name, **options):
        repaired = refit(**options).repair(make_problem(model, plan, out=tmp_path / name))
        return repaired, repaired.scores["repair"]

    without, all_of_it = found("without", ridges=[0.001, 0.1], weighting="either")
    several, tried = found("several", ridges=[0.001, 0.1], weighting="either", shares=[0.5, 1 - 1e-6])
    assert (tried["ridges"], tried["weightings"]) == (all_of_it["ridges"], all_of_it["weightings"])
    best = all_of_it["divergence"]["repaired"]["kl"]
    assert list(tried["shares"]) == ["0.5", "0.999999"]
    assert tried["shares"]["0.999999"] == pytest.approx(best, rel=1e-4)
    assert tried["shares"]["0.5"] != pytest.approx(best, rel=1e-2)
    assert tried["divergence"]["repaired"]["kl"] == min(best, *tried["shares"].values())
    _, own = found("own", ridges=[0.1], target="own_output", shares=[0.5])
    assert own["shares"] == {}  # it is no share of anything


def test_both_ways_to_weigh_tokens_are_tried_with_the_middle_ridge_and_the_better_one_with_all(make_problem, tmp_path):
    model, plan, reads = lively(), plan_of(Drop((2, 3))), [0.1]

    def found(name, ridges, weighting, reads=()):
        how = refit(ridges=ridges, weighting=weighting, reads=reads)
        return how.repair(make_problem(model, plan, out=tmp_path / name))

    alone = {way: found(f"{way} alone", [0.1], way) for way in engine.WEIGHTINGS}
    kl = {way: of.scores["repair"]["divergence"]["repaired"]["kl"] for way, of in alone.items()}
    assert kl["none"] != kl["inverse_square"]
    better = min(kl, key=kl.__getitem__)
    of_better = found("of the better one", [1.0, 0.001, 0.1], better)
    either = found("either", [1.0, 0.001, 0.1], "either")
    assert either.scores["repair"]["weightings"] == kl
    ridges = either.scores["repair"]["ridges"]
    assert ridges == of_better.scores["repair"]["ridges"]
    assert len({*ridges.values()}) == 3
    alike = ", all tokens alike" if better == "none" else ""
    assert list(ridges) == [f"1{alike}", f"0.001{alike}", f"0.1{alike}"]
    assert ridges[f"0.1{alike}"] == kl[better]
    assert either.content() == of_better.content()
    best = float(min(ridges, key=ridges.__getitem__).split(",")[0])
    after = found("reads", [1.0, 0.001, 0.1], "either", reads).scores["repair"]["reads"]
    assert after == found("of", [best], better, reads).scores["repair"]["reads"]
