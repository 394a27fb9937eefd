"""What a method is asked to remove: how much that is, and that what it cannot reach is refused before it starts."""

from __future__ import annotations

import itertools

import pytest
from conftest import random_source, run_slm
from plans import narrowing
from problems import problem_of

from slm_pipeline.config import PruningRatioConfig
from slm_pipeline.engine.progressive import ProgressiveStack
from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.methods.angular import AngularDistance
from slm_pipeline.methods.come import Come
from slm_pipeline.methods.finercut import FinerCut
from slm_pipeline.methods.laco import Laco
from slm_pipeline.methods.none import NoPruning
from slm_pipeline.methods.reverse import ReverseOrder
from slm_pipeline.methods.shortgpt import ShortGPT
from slm_pipeline.methods.sleb import Sleb
from slm_pipeline.methods.slm import SlidingLayerMerging
from slm_pipeline.methods.target import Layers, NoTarget, ParameterCounts, Parameters, PruningRatio
from slm_pipeline.methods.threshold import Search
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply

SIX_LAYERS = [
    "model=random", "model.architecture=llama", "model.num_layers=6", "model.hidden_size=32",
    "model.intermediate_size=48", "model.num_heads=4", "model.num_kv_heads=2", "model.vocab_size=300",
    "recovery=none", "evaluation=none", "dry_run=true",
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "num_layers", "message"),
    [
        (["method=reverse", "method.protect_last=2"], 3, "2 protected and one more"),
        (["method=sleb"], 3, "2 protected and one more"),
        (["method=shortgpt", "method.protect_first=4"], 5, "4 protected and one more"),
        (["method=angular"], 2, "1 protected and one more"),
        (["method=replaceme", "method.protect_last=1"], 3, "2 protected and one more"),
        (["method=mka", "method.protect_first=1"], 2, "1 protected and one more"),
        (["method=finercut", "method.protect_first=2"], 3, "2 protected and one more"),
        (["method=come"], 3,
         "0 protected; with method.repeat=forbid at most method.run_length=2 layers become one"),
        (["method=come", "method.run_length=4"], 2,
         "0 protected; with method.repeat=forbid at most method.run_length=4 layers become one"),
        (["method=come", "method.protect_first=1"], 4,
         "1 protected; with method.repeat=forbid at most method.run_length=2 layers become one"),
        (["method=come", "method.repeat=allow", "method.protect_last=1"], 2, "1 protected and one more"),
        (["method=come_posterior"], 3,
         "0 protected; with method.repeat=forbid at most method.run_length=2 layers become one"),
        (["method=slm"], 3, "2 protected and one more"),
        (["method=slm", "method.max_window=2"], 4, "2 protected; at most method.max_window=2 layers become one"),
        (["method=slm", "method.max_window=3", "method.protect_last=0"], 3, "1 protected; at most method.max_window=3"),
        (["method=laco", "method.num_merged=2", "method.lowest=1"], 3,
         "with method.num_merged=2 and method.interval=1 a pass over layers 1 to 5 folds no more"),
        (["method=laco", "method.num_merged=2", "method.interval=3", "method.highest=4"], 5,
         "with method.num_merged=2 and method.interval=3 a pass over layers 0 to 4 folds no more"),
    ],
)  # fmt: skip
def test_what_cannot_be_reached_is_refused_before_anything_is_loaded(overrides, num_layers, message, tmp_path):
    """The least that a method can leave is accepted, one layer less is not, and the message says what is."""
    given = [*SIX_LAYERS, f"output_dir={tmp_path}", "pruning_ratio=layers", *overrides]
    assert run_slm(*given, f"pruning_ratio.num_layers={num_layers}").status == 0
    refused = run_slm(*given, f"pruning_ratio.num_layers={num_layers - 1}")
    assert refused.status == 2
    left = f"{num_layers - 1} layer{'s' * (num_layers > 2)}"
    assert f"num_layers={num_layers - 1} leaves {left}; at least {num_layers} must be left" in refused.err
    assert message in refused.err
    assert refused.err.rstrip().endswith(f"nearest: pruning_ratio=layers pruning_ratio.num_layers={num_layers}")


@pytest.mark.parametrize(
    ("method", "share"),
    [(["finercut", "method.protect_first=3"], "33.3%"), (["come"], "50.0%"), (["slm"], "50.0%")],
)
def test_a_share_of_parameters_above_that_of_the_layers_that_can_go_is_refused(method, share, tmp_path):
    given = [*SIX_LAYERS, f"output_dir={tmp_path}", "pruning_ratio.of=parameters", f"method={method[0]}", *method[1:]]
    assert run_slm(*given, "pruning_ratio.ratio=0.3").status == 0
    refused = run_slm(*given, "pruning_ratio.ratio=0.55")
    assert refused.status == 2
    assert "pruning_ratio.ratio=0.55 of all parameters: of 6 layers at least" in refused.err
    assert f"so less than {share} of the parameters can go" in refused.err


def removable(one_pass, num_layers):
    """Most layers that a pass removes, over everything that it may be told of its windows."""
    most = 0
    for told in itertools.product([1.0, 0.0], repeat=num_layers):
        answers = iter(told)
        one_pass.similarity = lambda _, answers=answers: next(answers, 0.0)
        search = Search(0.5)
        one_pass(search, None)
        most = max(most, search.num_removed)
    return most


@pytest.mark.parametrize("max_window", [2, 3, 4, None])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("num_layers", [5, 8])
def test_slm_can_leave_as_few_layers_as_it_says(num_layers, first, last, max_window):
    method = SlidingLayerMerging(protect_first=first, protect_last=last, max_window=max_window)
    most = removable(method.one_pass(lambda _: 1.0, num_layers), num_layers)
    assert method.fewest_left(num_layers)[0] == num_layers - most


@pytest.mark.parametrize(
    "options",
    [
        {"num_merged": merged, "interval": interval, "lowest": lowest, "highest": highest}
        for merged in (2, 3, 6)
        for interval in (1, 2, 4)
        for lowest in (0, 2)
        for highest in (None, 6)
    ],
)
def test_laco_can_leave_as_few_layers_as_it_says(options):
    """Folding wherever it may is not always the most: 6 into one with an interval of 2 should pass the first by."""
    method = Laco(**options)
    most = removable(method.one_pass(lambda _: 1.0, 9), 9)
    assert method.fewest_left(9)[0] == 9 - most


def test_come_reaches_the_fewest_that_it_says_it_can_leave(input_ids, monkeypatch):
    """From the bottom up no layer is left between two runs."""
    source = random_source()
    model, _ = load_dense(source)
    monkeypatch.setattr(ProgressiveStack, "run_distance", lambda self, position, length, **_: float(position))
    for method, fewest in ((Come(), 3), (Come(run_length=4), 2), (Come(protect_first=1), 4)):
        assert method.fewest_left(6)[0] == fewest
        plan = method.plan(problem_of(model, source, input_ids, num_remove=6 - fewest))
        assert plan.num_layers == fewest
        with pytest.raises(UserError, match="no run of [23] unmerged layers is left"):
            method.plan(problem_of(model, source, input_ids, num_remove=7 - fewest))


SIZES = ParameterCounts(total=1000, blocks=[30] * 30)


@pytest.mark.parametrize(
    ("ratio", "layers", "parameters"), [(0.2, 7, 200), (0.21, 7, 210), (0.2101, 8, 211), (0.001, 1, 1), (0.81, 27, 810)]
)
def test_a_ratio_of_parameters_is_of_them_all_and_at_least_reached(ratio, layers, parameters):
    options = PruningRatioConfig(of="parameters", ratio=ratio)
    assert PruningRatio(options, Sleb()).target(SIZES) == Layers(layers)
    assert PruningRatio(options, FinerCut()).target(SIZES) == Parameters(parameters)
    assert PruningRatio(options, Sleb()).layers(30) is None  # how many go is not known before the model is


def test_a_ratio_of_parameters_that_the_embeddings_put_out_of_reach_names_the_largest():
    options = PruningRatioConfig(of="parameters", ratio=0.85)
    with pytest.raises(UserError, match=r"leaves 1 layer; at least 3 must be left .* at most 81.0% of the parameters"):
        PruningRatio(options, Sleb()).target(SIZES)


def test_layers_of_different_sizes_are_counted_by_parameters_or_by_their_mean():
    """Of 1000 parameters 100 are to go; six layers have 10 to 60, 35 on average: 2.9 of them."""
    options, sizes = PruningRatioConfig(of="parameters", ratio=0.1), ParameterCounts(1000, [10, 20, 30, 40, 50, 60])
    assert PruningRatio(options, ReverseOrder()).target(sizes) == Parameters(100)
    assert PruningRatio(options, FinerCut()).target(sizes) == Parameters(100)
    assert PruningRatio(options, AngularDistance()).target(sizes) == Layers(3)
    with pytest.raises(UserError, match=r"at least 1 must be left .* at most 20.0% of the parameters"):
        PruningRatio(PruningRatioConfig(of="parameters", ratio=0.205), FinerCut()).target(sizes)


@pytest.mark.parametrize("method", [ReverseOrder(), Sleb(protect_first=0, protect_last=0), ShortGPT()])
def test_layers_of_different_sizes_go_until_the_parameters_are_reached(method, input_ids):
    """Less than one layer too many: without the last to go they would not do."""
    source = random_source()
    model = apply(narrowing({1: ([0], [2, 5]), 3: (None, [2, 5, 9]), 4: (None, [*range(20)])}), load_dense(source)[0])
    view = ModelView(model)
    statistics = collect(view, input_ids)
    asked = view.block_parameters(0) + view.block_parameters(3)
    plan = method.plan(problem_of(model, source, input_ids, statistics=statistics, num_parameters=asked))
    sizes = [view.block_parameters(layer) for layer in plan.scores["order"]]
    assert sum(sizes) >= asked > sum(sizes[:-1])
    assert sorted(plan.scores["order"]) == plan.dropped
    with pytest.raises(UserError, match="that may go have"):
        method.plan(problem_of(model, source, input_ids, statistics=statistics, num_parameters=10**6))


def test_a_number_of_layers_counts_layers_whatever_a_ratio_would_be_of():
    options = PruningRatioConfig(of="parameters", num_layers=24)
    assert PruningRatio(options, FinerCut()).target(SIZES) == Layers(6)
    assert PruningRatio(PruningRatioConfig(), NoPruning()).target(SIZES) == NoTarget()
