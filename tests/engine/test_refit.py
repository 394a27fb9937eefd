"""Two streams side by side, and fits on them, against whole forward passes and plain least squares."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import random_source
from plans import narrowing
from two_processes import of_both

from slm_pipeline.engine import least_squares
from slm_pipeline.engine.refit import WEIGHTINGS, Fitted, Refit, _solution
from slm_pipeline.engine.streams import Streams, Sums, first_changed, pass_all, spans
from slm_pipeline.errors import UserError
from slm_pipeline.machine import ranks
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply, planned_blocks
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

RIDGE = 0.05
IDS = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(3))


def lively(architecture="llama", num_layers=4):
    """A model whose layers turn the stream, with biases that are not 0 where it has any."""
    model, _ = load_dense(random_source(architecture, num_layers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def plan_of(*ops, num_layers=4):
    plan = Plan({"name": "m", "fingerprint": "f", "num_layers": num_layers}, "test", {}, None, list(ops))
    plan.check("the plan")
    return plan


@torch.no_grad()
def passed(model, ids=IDS):
    """By one forward pass: what enters each layer (the last: the final norm), and of each sublayer's last projection
    the inputs and outputs; rows of tokens, float64."""
    view, seen, hooks = ModelView(model), {}, []

    def keep(module, args, output, at):
        seen[at] = args[0].flatten(0, -2).double(), output.flatten(0, -2).double()

    for layer in range(view.num_layers):
        for part, module in (("attention", view.attention_output(layer)), ("mlp", view.mlp_output(layer))):
            hooks.append(module.register_forward_hook(lambda *about, at=(layer, part): keep(*about, at=at)))
    states = []
    for module in (*view.layers, view.final_norm):
        hooks.append(module.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, 1).double())))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states, seen


def naive_fit(inputs, wanted, weight, tokens, ridge=RIDGE):
    """Weighted ridge regression as one tall least-squares problem."""
    root = tokens.sqrt()[:, None]
    size = inputs.shape[1]
    penalty = ridge * float((inputs.square() * tokens[:, None]).sum(dim=0).mean())
    left = torch.cat([inputs * root, penalty**0.5 * torch.eye(size, dtype=torch.float64)])
    right = torch.cat([wanted * root, penalty**0.5 * weight.T])
    return torch.linalg.lstsq(left, right).solution.T


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "olmo2"])
def test_a_map_in_front_of_what_reads_is_that_of_brute_force_least_squares(architecture):
    """Layer 1 is dropped: layer 2, where the streams differ, reads other states than in the dense model. OLMo 2 has no
    norm in front of its sublayers, GPT-NeoX has both side by side."""
    model = lively(architecture)
    view = ModelView(model)
    streams = Streams(view, IDS)
    for block, span in zip((Block(0), Block(2)), ((0, 2), (2, 3)), strict=True):
        streams.look_ahead(*span)
        if block.body == 0:
            streams.pass_through(block)
    pruned = apply(plan_of(Drop((1,))), copy.deepcopy(model))
    for part in SUBLAYERS:
        reads: list[torch.Tensor] = []
        for which, layer in ((model, 2), (pruned, 1)):
            module = (
                ModelView(which).layers[layer].get_submodule(view.reading_names(2, part)[0].removesuffix(".weight"))
            )
            hook = module.register_forward_pre_hook(
                lambda _, args, reads=reads: reads.append(args[0].flatten(0, 1).double())
            )
            which(input_ids=IDS, use_cache=False)
            hook.remove()
        wanted, inputs = reads
        identity = torch.eye(inputs.shape[1], dtype=torch.float64)
        expected = naive_fit(inputs, wanted, identity, 1 / wanted.square().mean(dim=1))
        block, what = Refit([1.0], reads=RIDGE).reading(streams, streams, Block(2), part)
        torch.testing.assert_close(what.tensors[f"reads.{part}"], expected, rtol=1e-4, atol=1e-5)
        assert (what.sublayer, what.ridge, what.reads) == (part, RIDGE, True)
        assert 0 < what.after < what.before
        for name in view.reading_names(2, part):
            weight = view.layers[2].get_parameter(name).double() @ expected
            torch.testing.assert_close(block.replaced[name].double(), weight, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("weighting", ["inverse_square", "none"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "phi3"])
def test_a_fit_is_that_of_brute_force_least_squares(architecture, weighting):
    """Layers 1 and 3 are dropped, so layer 2 gets other states than in the dense model, and stands for 2 and 3."""
    model = lively(architecture)
    view, plan = ModelView(model), plan_of(Drop((1,)), Drop((3,)))
    blocks = planned_blocks(plan, view)
    streams = Streams(view, IDS)
    assert streams.pruned is streams.dense
    streams.look_ahead(0, 2)
    streams.pass_through(blocks[0])
    streams.look_ahead(2, 4)
    dense, writes = passed(model)
    how, block = Refit([RIDGE], weighting), blocks[1]
    pruned = apply(plan, copy.deepcopy(model))
    for part in SUBLAYERS:
        reference = dense[2] + writes[2, "attention"][1] if part == "attention" else dense[4]
        states, now = passed(pruned)  # with the attention repaired when it is the other's turn
        entering = states[1] if part == "attention" else states[1] + now[1, "attention"][1]
        inputs, _ = now[1, part]
        weight = streams.weight(block, part)
        if has_bias := streams.bias(block, part) is not None:
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
        assert has_bias == (architecture in ("opt", "gpt_neox"))
        tokens = torch.ones(len(inputs), dtype=torch.float64)
        if weighting == "inverse_square":
            tokens = 1 / reference.square().mean(dim=1)
        sums = how.sums(streams, block, part)
        wanted = reference - entering
        expected = naive_fit(inputs, wanted, weight, tokens)
        found = least_squares.solve(
            sums.gram, sums.moment, prior=weight, penalty=least_squares.penalty(sums.gram, RIDGE)
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        missed = ((inputs @ weight.T - wanted).square().sum(dim=1) * tokens).sum()
        energy = (wanted.square().sum(dim=1) * tokens).sum()
        assert sums.error(weight) == pytest.approx(float(missed / energy), rel=1e-3)
        block, what = how.writing(streams, streams, block, part)
        assert (what.sublayer, what.ridge) == (part, RIDGE)
        assert what.after < what.before == pytest.approx(sums.error(weight), rel=1e-3)
        module = ModelView(pruned).layers[1].get_submodule(view.output_name(part))
        module.weight.copy_(expected[:, :-1] if has_bias else expected)
        if has_bias:
            module.bias.copy_(expected[:, -1])
    streams.pass_through(block)
    states, _ = passed(pruned)
    torch.testing.assert_close(streams.pruned.flatten(0, 1).double(), states[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(streams.dense.flatten(0, 1).double(), dense[4], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layer_without_a_sublayer_lets_the_other_one_make_up_for_it():
    model = lively()
    view = ModelView(model)
    dense, writes = passed(model)
    for gone, other in (("attention", "mlp"), ("mlp", "attention")):
        streams = Streams(view, IDS)
        streams.look_ahead(0, 1)
        block = Block(0).lacking(gone)
        sums = streams.sums(block, other, target="dense_stream", weighting="none")
        wanted = dense[1] - dense[0]
        assert sums.energy == pytest.approx(float(wanted.square().sum()), rel=1e-4)
        if other == "attention":
            torch.testing.assert_close(sums.moment, wanted.T @ writes[0, other][0], rtol=1e-3, atol=1e-3)
        _, what = Refit(sublayers=SUBLAYERS).layer(streams, streams, block)
        assert [of_one.sublayer for of_one in what] == [other]


@torch.no_grad()
def test_a_dense_model_that_lacks_sublayers_is_walked_too():
    """A pruned model that is pruned again: layer 1 has no attention, layer 2 no feed-forward network."""
    lacking = plan_of(DropSublayer((1,), "attention", "custom"), DropSublayer((2,), "mlp", "custom"))
    model = apply(lacking, lively())
    view, plan = ModelView(model), plan_of(Drop((3,)))
    states = []
    hook = view.final_norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(input_ids=IDS, use_cache=False)
    hook.remove()
    streams = pass_all(Streams(view, IDS), planned_blocks(plan, view), plan.layer_groups)
    torch.testing.assert_close(streams.dense, states[0], rtol=1e-5, atol=1e-5)
    streams = Streams(view, IDS)
    for layer, there in ((0, ["attention", "mlp"]), (1, ["mlp"]), (2, ["attention"])):
        streams.look_ahead(layer, layer + 1)
        _, what = Refit().layer(streams, streams, Block(layer))
        assert [of_one.sublayer for of_one in what] == there
        assert all(of_one.before < 1e-6 for of_one in what)  # the last sublayer's target is the whole layer's output
        streams.pass_through(Block(layer))


@torch.no_grad()
def test_a_bfloat16_model_is_fitted_in_float32_and_keeps_its_type():
    """Although its stream, a hundred times as large as what is missing to it, is rounded to bfloat16."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = lively().to(torch.bfloat16).to(dtype)
        view = ModelView(model)
        model.model.embed_tokens.weight.mul_(100)
        streams = Streams(view, IDS)
        assert streams.dense.dtype == dtype
        streams.look_ahead(0, 1)
        block = streams.put(Block(0), "mlp", 0.5 * streams.weight(Block(0), "mlp"))
        new, what = Refit([0.01]).writing(streams, streams, block, "mlp")
        assert what.ridge == 0.01, what
        assert streams.weight(new, "mlp").dtype == torch.float64
        assert new.replaced["mlp.down_proj.weight"].dtype == dtype
        found[dtype] = what.after / what.before
    assert found[torch.float32] < 1e-3
    assert found[torch.bfloat16] < 0.01


@torch.no_grad()
def test_the_own_output_is_that_of_the_sublayer_with_all_its_neurons():
    """On the states that reach it, so that a fit by its neurons that are left is that of least squares."""
    model = lively()
    view, kept = ModelView(model), [1, 5, 30, 31]
    (block,) = [planned_blocks(narrowing({1: (None, kept)}, num_layers=4), view)[1]]
    streams = Streams(view, IDS)
    streams.look_ahead(0, 1)
    streams.pass_through(Block(0))
    streams.look_ahead(1, 2)
    sums = streams.sums(block, "mlp", target="own_output", weighting="none")
    _, writes = passed(model)
    inputs, wanted = writes[1, "mlp"]
    inputs = inputs[:, kept]
    torch.testing.assert_close(sums.gram, inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.moment, wanted.T @ inputs, rtol=1e-4, atol=1e-3)
    full = streams.sums(Block(1), "mlp", target="own_output", weighting="none")
    assert full.error(streams.weight(Block(1), "mlp")) == pytest.approx(0, abs=1e-6)
    part = full.of(torch.tensor(kept))
    torch.testing.assert_close((part.gram, part.moment), (sums.gram, sums.moment), rtol=1e-4, atol=1e-3)
    again, what = Refit(target="own_output").layer(streams, streams, Block(1))
    assert again == Block(1), what


@torch.no_grad()
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_with_a_share_the_target_lies_between_both_and_so_do_the_weights(weighting):
    """Below a layer that is narrower, so that something is missing that is not the sublayer's own."""
    view = ModelView(lively())
    blocks = planned_blocks(narrowing({0: (None, [1, 5]), 1: (None, [1, 5, 30, 31])}, num_layers=4), view)
    streams = Streams(view, IDS)
    streams.look_ahead(0, 1)
    streams.pass_through(blocks[0])
    streams.look_ahead(1, 2)
    for part, unchanged in (("attention", True), ("mlp", False)):
        weight, sums = streams.weight(blocks[1], part), {}
        for target, share in (("dense_stream", 1.0), ("dense_stream", 0.75), ("own_output", 1.0)):
            sums[target, share] = streams.sums(blocks[1], part, target=target, weighting=weighting, share=share)
        missing, both, own = sums.values()
        assert (own.error(weight) < 1e-6) is unchanged
        assert not torch.allclose(missing.moment, own.moment, rtol=0.1)
        torch.testing.assert_close(both.gram, own.gram)
        torch.testing.assert_close(both.moment, 0.75 * missing.moment + 0.25 * own.moment, rtol=1e-4, atol=1e-5)
        first, between, second = (_solution(of, weight, 0.1) for of in sums.values())
        torch.testing.assert_close(between, 0.75 * first + 0.25 * second, rtol=1e-4, atol=1e-5)
        new, what = Refit([0.1], weighting, share=0.75).writing(streams, streams, blocks[1], part)
        assert what.ridge == 0.1
        torch.testing.assert_close(streams.weight(new, part), between, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_fit_to_the_own_output_does_not_undo_what_is_read_better():
    """That output is one of the states as they come: weights that nothing was taken from stay, whatever the map."""
    view = ModelView(lively())
    blocks = planned_blocks(narrowing({0: ([0], [1, 5]), 1: (None, [1, 5, 30, 31])}, num_layers=4), view)
    streams = Streams(view, IDS)
    streams.look_ahead(0, 1)
    streams.pass_through(blocks[0])
    streams.look_ahead(1, 2)
    how = Refit([0.01], target="own_output")
    plain = {of.sublayer: of for of in how.layer(streams, streams, blocks[1])[1]}
    _, found = replace(how, reads=RIDGE).layer(streams, streams, blocks[1])
    both = {(of.sublayer, of.reads): of for of in found}
    assert all(both[part, True].tensors for part in SUBLAYERS)
    assert both["attention", False] == plain["attention"] == Fitted("attention", None, 0.0, 0.0)
    assert plain["mlp"].ridge == both["mlp", False].ridge == 0.01


@torch.no_grad()
def test_the_ridge_may_draw_to_the_weights_that_make_up_for_the_units_that_went():
    """A ridge of a billion leaves nothing but what it draws to."""
    view, kept = ModelView(lively()), [1, 5, 30, 31]
    block = planned_blocks(narrowing({1: (None, kept)}, num_layers=4), view)[1]
    streams = Streams(view, IDS)
    streams.look_ahead(0, 1)
    streams.pass_through(Block(0))
    streams.look_ahead(1, 2)
    own = streams.sums(block, "mlp", target="own_output", weighting="none")
    weight = streams.weight(block, "mlp")
    damped = own.gram + 0.01 * own.gram.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    lam = 0.01 * own.gram.diagonal().mean()
    wanted = torch.linalg.solve(damped, (own.moment + lam * weight).T).T
    assert not torch.allclose(wanted, weight, rtol=0.1)
    how = Refit([1e9], weighting="none", prior="own_output")
    new, what = how.writing(streams, streams, block, "mlp")
    assert what.ridge == 1e9
    torch.testing.assert_close(streams.weight(new, "mlp"), wanted, rtol=1e-4, atol=1e-5)
    assert Refit([1e9], weighting="none").writing(streams, streams, block, "mlp")[1].ridge is None


@torch.no_grad()
def test_divergence_is_that_of_the_two_models_logits():
    model = lively()
    view, plan = ModelView(model), plan_of(Drop((2,)))
    streams = pass_all(Streams(view, IDS), planned_blocks(plan, view), plan.layer_groups)
    dense = model(input_ids=IDS).logits.double().log_softmax(dim=-1)
    pruned = apply(plan, copy.deepcopy(model))(input_ids=IDS).logits.double().log_softmax(dim=-1)
    kl, same = streams.divergence()
    assert kl == pytest.approx(float((dense.exp() * (dense - pruned)).sum(dim=-1).mean()), rel=1e-4)
    assert same == pytest.approx(float((dense.argmax(dim=-1) == pruned.argmax(dim=-1)).double().mean()))
    assert pass_all(Streams(view, IDS), [Block(layer) for layer in range(4)], [[0], [1], [2], [3]]).divergence() == (
        0.0,
        1.0,
    )


def test_of_the_ridges_the_best_on_other_text_is_taken_and_none_for_a_gain_of_rounding():
    """Weights are W / 2, or W; the fit by the data alone doubles them, and the text held out says W."""
    streams = Streams(ModelView(lively()), IDS[:2])
    streams.look_ahead(0, 1)
    weight = streams.weight(Block(0), "mlp")

    def fitted(block, factor):
        wanted = factor * streams.weight(block, "mlp")
        sums = Sums(torch.eye(48, dtype=torch.float64), wanted, float(wanted.square().sum()))
        return Refit([0.5, 0.125], target="own_output").writing(streams, streams, block, "mlp", sums)

    new, what = fitted(streams.put(Block(0), "mlp", weight / 2), 2)
    # (2 + 1/8) / (9/8) = 17/9
    assert what == Fitted("mlp", 0.125, pytest.approx(0.25, rel=1e-4), pytest.approx(0.25 / 81, rel=1e-3))
    torch.testing.assert_close(streams.weight(new, "mlp"), 17 / 18 * weight, rtol=1e-6, atol=1e-7)
    assert fitted(Block(0), 2) == (Block(0), Fitted("mlp", None, 0.0, 0.0))
    assert fitted(streams.put(Block(0), "mlp", weight / 1.0005), 1.0005)[1].ridge is None


def test_a_ridge_too_small_to_solve_with_is_not_taken_and_if_none_is_left_that_is_said():
    """By rounding one eigenvalue of the Gram matrix is below 0."""
    streams = Streams(ModelView(lively()), IDS[:2])
    streams.look_ahead(0, 1)
    wanted = streams.weight(Block(0), "mlp")
    block = streams.put(Block(0), "mlp", wanted / 2)
    gram = torch.eye(48, dtype=torch.float64)
    gram[0, 0] = -1e-3
    dependent = Sums(gram, wanted, float(wanted.square().sum()))
    for ridges in ([1e-6, 0.5], [0.5, 1e-6]):
        how = Refit(ridges, target="own_output")
        assert how.writing(streams, streams, block, "mlp", dependent)[1].ridge == 0.5
    with pytest.raises(UserError, match="linearly dependent; use a larger ridge"):
        Refit([1e-5, 1e-6]).writing(streams, streams, block, "mlp", dependent)


def test_layers_that_went_belong_to_the_layer_below_them():
    assert spans([[0], [3], [4, 5]], 8) == [(0, 3), (3, 4), (4, 8)]
    assert spans([[2], [3]], 4) == [(0, 3), (3, 4)]
    view = ModelView(lively())
    for ops, expected in (
        ([], None),
        ([Drop((3,))], 2),
        ([Drop((0,))], 0),
        ([Merge((1, 2), "keep_highest")], 1),
        ([DropSublayer((2,), "mlp", "stock")], 2),
    ):
        plan = plan_of(*ops)
        assert first_changed(planned_blocks(plan, view), plan.layer_groups, 4) == expected


def test_a_divergence_that_is_not_finite_is_an_error():
    streams = Streams(ModelView(lively()), IDS)
    streams.pruned = streams.dense.clone()
    streams.pruned[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="predictions from the dense model's is not finite"):
        streams.divergence()


def test_sums_that_are_not_finite_are_an_error():
    streams = Streams(ModelView(lively()), IDS)
    streams.look_ahead(0, 1)
    streams.leaving[0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="last projection of layer 0's mlp, or is to leave it, is not finite"):
        streams.sums(Block(0), "mlp", target="dense_stream", weighting="none")
    with pytest.raises(
        UserError, match="what layer 0's mlp writes, or is to write, on the text held out is not finite"
    ):
        Refit().writing(Streams(streams.view, IDS), streams, Block(0), "mlp")
    streams.pruned = streams.dense.clone()
    streams.pruned[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="what layer 0's attention reads is not finite; try model.dtype=float32"):
        streams.reading_sums(Block(0), "attention")


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_behind_a_norm_the_direction_is_fitted(architecture, sublayer):
    """Fewer tokens than inputs, and next to no ridge: what reaches the stream points where it should, token by token,
    though its length is for the norm to say."""
    view, ids = ModelView(lively(architecture)), IDS[:1]  # 12 tokens, 48 neurons or 32 channels of heads
    streams = Streams(view, ids)
    streams.look_ahead(1, 3)
    block = Block(1)
    sums = Refit(target="dense_stream").sums(streams, block, sublayer)
    weight = streams.weight(block, sublayer)
    found = least_squares.solve(sums.gram, sums.moment, prior=weight, penalty=least_squares.penalty(sums.gram, 1e-6))
    assert sums.error(found) < 1e-4 * sums.error(weight)
    fitted = streams.put(block, sublayer, found)
    for made, limit in ((block, 0.9), (fitted, None)):
        _, _, written, leaving = streams._runner.observed(made, streams.pruned, sublayer)
        end = streams.leaving if sublayer == "mlp" else streams.middle
        wanted = end - (leaving - written if sublayer == "mlp" else streams.pruned)
        alike = torch.cosine_similarity(written, wanted, dim=-1)
        if limit is None:
            assert float(alike.min()) > 0.999
        else:
            assert sublayer == "attention" or float(alike.mean()) < limit  # the attention is still the dense model's


@torch.no_grad()
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3_text"])
def test_a_plain_gram_matrix_is_of_the_inputs_alone_all_tokens_alike(architecture, weighting):
    """Where the fit's is the same it is not made twice; a bias's input, a norm's divisor and weights make another."""
    view = ModelView(lively(architecture))
    streams = Streams(view, IDS)
    streams.look_ahead(0, 2)
    sums = streams.sums(Block(0), "mlp", target="dense_stream", weighting=weighting, plain=True)
    inputs = streams._runner.inputs_of(Block(0), streams.pruned, "mlp").double()
    torch.testing.assert_close(sums.plain, inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    assert (sums.plain is sums.gram) is (architecture == "llama" and weighting == "none")


@torch.no_grad()
@pytest.mark.parametrize("sublayer", SUBLAYERS)
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gemma3_text", "olmo2"])
def test_errors_of_several_blocks_in_one_pass_are_those_of_each(architecture, sublayer):
    view = ModelView(lively(architecture))
    streams = Streams(view, IDS)
    streams.look_ahead(0, 2)
    kept = {"attention": ([0], None), "mlp": (None, [*range(20)])}[sublayer]
    (block,) = [planned_blocks(narrowing({1: kept}, num_layers=4), view)[1]]
    draw = torch.Generator().manual_seed(7)
    weight = streams.weight(block, sublayer)
    other = streams.put(block, sublayer, weight + 0.3 * torch.randn(weight.shape, generator=draw))
    blocks = [block, other]
    if (norm := streams.output_norm(block, sublayer)) is not None:
        blocks.append(streams.put_gains(other, sublayer, 1.5 * norm[1]))
    how = {"target": "dense_stream", "weighting": "inverse_square", "share": 0.5}
    alone = [streams.errors([one], sublayer, **how)[0] for one in blocks]
    assert streams.errors(blocks, sublayer, **how) == pytest.approx(alone, rel=1e-5)
    assert all(abs(one - alone[0]) > 1e-3 for one in alone[1:])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "olmo2"])
def test_behind_a_norm_a_fit_is_judged_by_what_it_leads_to_in_the_stream(architecture):
    """Noise cannot be predicted: the least squares for it are better, and what the norm makes of them is worse."""
    view = ModelView(lively(architecture))
    streams = Streams(view, IDS)
    streams.look_ahead(1, 2)
    (block,) = [planned_blocks(narrowing({1: (None, [*range(20)])}, num_layers=4), view)[1]]
    draw = torch.Generator().manual_seed(7)
    streams.leaving = streams.leaving + 8 * torch.randn(streams.leaving.shape, generator=draw)

    def error(made):
        _, _, written, leaving = streams._runner.observed(made, streams.pruned, "mlp")
        reference = streams.leaving.double()
        weights = 1 / reference.square().mean(dim=-1, keepdim=True)
        wanted = reference - (leaving.double() - written.double())
        return float((weights * (wanted - written).square()).sum() / (weights * wanted.square()).sum())

    how = Refit([0.1, 10.0])
    (alone,) = streams.errors([block], "mlp", target="dense_stream", weighting="inverse_square")
    assert alone == pytest.approx(error(block), rel=1e-4)
    sums = how.sums(streams, block, "mlp")
    weight = streams.weight(block, "mlp")
    solved = least_squares.solve(sums.gram, sums.moment, prior=weight, penalty=least_squares.penalty(sums.gram, 0.1))
    assert sums.error(solved) < sums.error(weight)
    gain = streams.gain_sums(block, "mlp", target="dense_stream", weighting="inverse_square")
    _, gains = streams.output_norm(block, "mlp")
    _, _, written, leaving = streams._runner.observed(block, streams.pruned, "mlp")
    reference = streams.leaving.double()
    root = reference.square().mean(dim=-1, keepdim=True).rsqrt()
    wanted = (reference - (leaving.double() - written.double())) * root
    normed = written.double() / gains.double() * root
    for channel in (0, 5):  # without a ridge: plain least squares, channel by channel
        left, right = normed[..., channel].flatten()[:, None], wanted[..., channel].flatten()[:, None]
        naive = torch.linalg.lstsq(left, right).solution
        assert float(gain.solve(0.0)[channel]) == pytest.approx(float(naive), rel=1e-3, abs=1e-4)
    with_gains = streams.put_gains(block, "mlp", gain.solve(0.0))
    assert error(with_gains) < error(block)
    assert streams.output_norm(with_gains, "mlp")[1] == pytest.approx(gain.solve(0.0).float(), rel=1e-4, abs=1e-5)
    new, what = how.writing(streams, streams, block, "mlp")
    assert what.tensors.keys() == {"mlp", "mlp_norm"}
    assert what.before == pytest.approx(error(block), rel=1e-4)
    assert what.after == pytest.approx(error(new), rel=1e-4)
    assert what.after <= error(with_gains) * 1.01
    own = Refit([0.1], target="own_output")
    for made in (how.writing(streams, streams, block, "mlp")[0], own.writing(streams, streams, block, "mlp")[0]):
        assert what.after <= error(made) + 1e-6


@torch.no_grad()
def test_the_prior_of_a_layer_that_is_made_of_two_is_that_layer():
    """It is as wide as the dense one, and what it writes is no loss to make up for."""
    view = ModelView(lively())
    block = planned_blocks(plan_of(Merge((1, 2), "official")), view)[1]
    streams = Streams(view, IDS)
    streams.look_ahead(0, 1)
    streams.pass_through(Block(0))
    streams.look_ahead(1, 3)
    for part in SUBLAYERS:
        new, _ = Refit([1e9], prior="own_output").writing(streams, streams, block, part)
        torch.testing.assert_close(streams.weight(new, part), streams.weight(block, part), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_prior_that_one_process_alone_cannot_solve_for_has_failed_in_all(monkeypatch):
    plain, model = least_squares.solve, lively()

    @torch.no_grad()
    def fitted():
        view = ModelView(copy.deepcopy(model))
        block = planned_blocks(narrowing({0: (None, [1, 5])}, num_layers=4), view)[0]
        streams = Streams(view, IDS)
        streams.look_ahead(0, 1)
        return Refit([1.0], prior="own_output").writing(streams, streams, block, "mlp")

    def fails_in_the_second(gram, moment, *, prior, penalty):
        if ranks.rank() == 1:
            raise UserError("it has no inverse")
        return plain(gram, moment, prior=prior, penalty=penalty)

    monkeypatch.setattr(least_squares, "solve", fails_in_the_second)
    found = of_both(monkeypatch, fitted)
    assert [str(error) for error in found] == [
        "another process cannot solve for new weights with a ridge of 0.01", "it has no inverse"
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("reads", [None, RIDGE])
def test_a_solve_that_fails_in_one_process_alone_has_failed_in_all(reads, monkeypatch):
    """Else one would go on to the next ridge while the other waits for its part of a sum of this one."""
    plain, model = least_squares.solve, lively()
    many = torch.randint(0, 256, (48, 12), generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def fitted(ridges):
        view = ModelView(copy.deepcopy(model))  # each process has its own
        blocks = planned_blocks(plan_of(Drop((1,))), view)
        streams = [Streams(view, ids) for ids in (many[:40], many[40:])]
        for one in streams:
            one.look_ahead(0, 2)
            one.pass_through(blocks[0])
            one.look_ahead(2, 3)
        return Refit(ridges, reads=reads).layer(*streams, blocks[1])[1]

    def fails_in_the_second(gram, moment, *, prior, penalty):
        is_the_first_ridge = penalty < 0.05 * float(gram.diagonal().mean())
        if ranks.rank() == 1 and (is_the_first_ridge if reads is None else len(moment) == len(gram)):
            raise UserError("it has no inverse")
        return plain(gram, moment, prior=prior, penalty=penalty)

    expected = fitted([0.1])
    monkeypatch.setattr(least_squares, "solve", fails_in_the_second)
    found = of_both(monkeypatch, lambda: fitted([0.001, 0.1]))
    if reads is not None:
        assert [str(error) for error in found] == [
            "another process cannot solve for new weights with a ridge of 0.05", "it has no inverse"
        ]  # fmt: skip
        return
    for of_process in found:
        assert [one.ridge for one in of_process] == [one.ridge for one in expected] == [0.1, 0.1]
        for one, other in zip(of_process, expected, strict=True):
            assert one.after == pytest.approx(other.after, rel=1e-4)
            assert one.tensors.keys() == other.tensors.keys()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma3_text", "opt"])
@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
def test_what_a_sublayer_writes_is_known_without_the_rest_of_its_block(architecture, sublayer):
    view = ModelView(lively(architecture))
    streams = Streams(view, IDS)
    *whole, leaving = streams._runner.observed(Block(1), streams.dense, sublayer)
    *part, nothing = streams._runner.observed(Block(1), streams.dense, sublayer, whole=False)
    assert nothing is None
    torch.testing.assert_close(leaving, streams._runner.run(Block(1), streams.dense), rtol=0, atol=0)
    torch.testing.assert_close(part, whole, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "opt"])  # the latter has biases
def test_the_plain_gram_matrix_counts_all_tokens_alike_and_no_bias(architecture):
    model = lively(architecture)
    streams = Streams(ModelView(model), IDS)
    streams.look_ahead(0, 1)
    sums = Refit(weighting="inverse_square").sums(streams, Block(0), "mlp", plain=True)
    inputs = passed(model)[1][0, "mlp"][0]
    torch.testing.assert_close(sums.plain, inputs.T @ inputs, rtol=1e-5, atol=1e-5)
    assert len(sums.gram) == inputs.shape[1] + (architecture == "opt")
    assert Refit().sums(streams, Block(0), "mlp").plain is None


@torch.no_grad()
def test_a_whole_sublayer_is_not_fitted_towards_its_own_output(monkeypatch):
    view = ModelView(lively())
    monkeypatch.setattr(Streams, "sums", lambda *about, **how: pytest.fail("nothing is missing there"))
    streams = Streams(view, IDS)
    streams.look_ahead(1, 2)
    how = Refit([0.1], target="own_output")
    assert how.writing(streams, streams, Block(1), "mlp") == (Block(1), Fitted("mlp", None, 0.0, 0.0))
