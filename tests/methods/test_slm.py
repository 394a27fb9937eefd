"""SLM: the search, against a naive loop over whole model copies, and against cases worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import random_source
from naive import naive_search, naive_states
from problems import problem_of

from slm_pipeline.engine.windows import originals
from slm_pipeline.errors import UserError
from slm_pipeline.methods.slm import SlidingLayerMerging, SlidingWindow
from slm_pipeline.methods.threshold import Search, find_threshold
from slm_pipeline.models.loading import load_dense
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.merge_rules import RULES


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        *((rule, {}) for rule in RULES),
        ("mean", {"protect_first": 0}),
        ("mean", {"protect_first": 3, "protect_last": 2}),
        ("official", {"protect_last": 0}),
        ("base_difference", {"protect_first": 0, "protect_last": 0}),
        ("base_difference", {"max_window": 2}),
    ],
)
def test_search_equals_the_naive_loop(rule, options, input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    outcomes = set()
    for threshold in (0.0, 0.6, 0.9, 0.97, 0.995, 1.0):
        windows, similarities = naive_search(model, input_ids, threshold, rule, **options)
        plan = SlidingLayerMerging(merge_rule=rule, **options).plan(
            problem_of(model, source, input_ids, threshold=threshold)
        )
        assert [op.layers for op in plan.ops] == [tuple(range(low, high + 1)) for low, high in windows]
        found = {(step["low"], step["high"]): step["similarity"] for step in plan.scores["steps"]}
        assert found.keys() == similarities.keys()
        assert found == pytest.approx(similarities, abs=1e-5)
        outcomes.add(str(plan.layer_groups))
    assert len(outcomes) > 2  # the thresholds chosen do lead to different plans


def test_model_is_left_alone_and_the_plan_gives_the_measured_similarity(input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = SlidingLayerMerging(merge_rule="mean").plan(problem_of(model, source, input_ids, threshold=0.9))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    reference = naive_states(model, input_ids)
    pruned = naive_states(apply(plan, copy.deepcopy(model)), input_ids)
    measured = sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(reference, pruned, strict=True)) / 3
    last_accepted = [step for step in plan.scores["steps"] if step["accepted"]][-1]
    assert measured == pytest.approx(last_accepted["similarity"], abs=1e-5)


def stub(stack):
    """1 - 0.02 for each layer removed."""
    return 1 - 0.02 * (sum(map(len, map(originals, stack))) - len(stack))


def search(window_pass, threshold):
    found = Search(threshold)
    window_pass(found, None)
    return found


@pytest.mark.parametrize(
    ("threshold", "window", "layers_left"), [(0.895, (25, 30), 27), (0.795, (20, 30), 22), (0.595, (10, 30), 12)]
)
def test_hand_worked_windows(threshold, window, layers_left):
    found = search(SlidingWindow(stub, 32), threshold)
    assert found.windows == [window]
    assert 32 - found.num_removed == layers_left


def test_a_window_still_open_at_the_end_is_merged():
    """The published loop returns the dense model here."""
    assert search(SlidingWindow(stub, 32), 0.3).windows == [(1, 30)]


def test_auto_lands_on_the_target_with_the_highest_threshold_tried():
    for target in (1, 5, 12, 20):
        chosen, searches, exact = find_threshold(SlidingWindow(stub, 32), target, refine=5, exhaustive=False)
        assert chosen.num_removed == target
        assert not exact
        reached = {search.threshold: search.num_removed for search in searches}
        # 1 - 0.02 n is on the grid: T = 1 - 0.02 n still admits n removed layers, T + 0.01 does not.
        assert max(t for t, removed in reached.items() if removed == target) == pytest.approx(
            1 - 0.02 * target, abs=0.0101
        )


class Reached:
    """A pass that removes 3 layers at some thresholds (in hundredths) and 2 at all others."""

    num_layers, length = 12, 1

    def __init__(self, *thresholds):
        self.thresholds = thresholds

    def __call__(self, search, num_remove):
        search.num_removed = 3 if round(100 * search.threshold) in self.thresholds else 2


UP_TO_50 = range(51)
HALVINGS = [50, 75, 62, 56, 53, 51]  # the seventh looks at 50 again


@pytest.mark.parametrize(
    ("thresholds", "refine", "best", "tried"),
    [
        ([*UP_TO_50, 54], 0, 50, HALVINGS),
        ([*UP_TO_50, 54], 3, 50, [*HALVINGS, 52]),
        ([*UP_TO_50, 54], 4, 54, [*HALVINGS, 54]),  # halving never came by
        ([*UP_TO_50, 52, 54], 5, 54, [*HALVINGS, 55, 54]),
        ([0], 1, 0, [50, 25, 12, 6, 3, 1, 0]),
        ([*range(100)], 5, 99, [50, 75, 87, 93, 96, 98, 99]),
    ],
)
def test_halvings_then_grid_points_above_the_best(thresholds, refine, best, tried):
    chosen, searches, exact = find_threshold(Reached(*thresholds), 3, refine=refine, exhaustive=False)
    assert round(100 * chosen.threshold) == best
    assert [round(100 * search.threshold) for search in searches] == tried
    assert not exact


@pytest.mark.parametrize(("thresholds", "tried"), [([20, 90], range(99, 89, -1)), ([0], range(99, -1, -1))])
def test_exhaustive_walks_the_grid_from_the_top(thresholds, tried):
    chosen, searches, exact = find_threshold(Reached(*thresholds), 3, refine=5, exhaustive=True)
    assert round(100 * chosen.threshold) == max(thresholds)
    assert [round(100 * search.threshold) for search in searches] == list(tried)
    assert exact


def test_the_plan_looks_as_long_as_the_problem_says(input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)

    def plan(**how):
        found = SlidingLayerMerging().plan(problem_of(model, source, input_ids, num_remove=2, **how))
        return found, [round(100 * search["threshold"]) for search in found.scores["searches"]]

    halved, tried = plan(refine=0)
    refined, tried_longer = plan(refine=3)
    best = round(100 * halved.threshold)
    assert tried_longer[: len(tried)] == tried
    assert set(tried_longer[len(tried) :]) <= {best + 3, best + 2, best + 1} - set(tried) != set()
    assert len(tried_longer) > len(tried)
    everywhere, tried = plan(exhaustive=True)
    assert tried == list(range(99, round(100 * everywhere.threshold) - 1, -1))
    assert (halved.scores["exact"], refined.scores["exact"], everywhere.scores["exact"]) == (False, False, True)


def test_a_similarity_as_low_as_the_threshold_passes():
    """As in the paper's figure; the published code asks for more."""
    assert search(SlidingWindow(lambda _: 0.75, 12), 0.75).windows == [(1, 10)]
    assert search(SlidingWindow(lambda _: 0.75, 12), 0.7500001).windows == []


def test_exhaustive_finds_the_highest_threshold():
    slide = SlidingWindow(stub, 32)
    chosen, searches, exact = find_threshold(slide, 7, refine=0, exhaustive=True)
    assert exact
    assert [search.num_removed == 7 for search in searches] == [False] * (len(searches) - 1) + [True]
    assert chosen is searches[-1]
    best = chosen.threshold
    assert search(slide, best).num_removed >= 7 > search(slide, best + 0.01).num_removed


def test_auto_says_what_can_be_reached():
    def never(stack):
        removed = sum(map(len, map(originals, stack))) - len(stack)
        return -0.5 if removed > 2 else 0.5

    with pytest.raises(UserError, match=r"no threshold removes 5 of 12 layers: the nearest removes 2 .*num_layers=10"):
        find_threshold(SlidingWindow(never, 12), 5, refine=5, exhaustive=False)


def test_infinite_states_are_an_error(input_ids):
    source = random_source()
    model, _ = load_dense(source)
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="similarity after merging layers 3..4 is nan"):
        SlidingLayerMerging().plan(problem_of(model, source, input_ids, threshold=0.5))


@pytest.mark.parametrize(
    "options", [{"merge_rule": "average"}, {"similarity": "cka"}, {"max_window": 1}, {"protect_last": -1}]
)
def test_bad_options_name_themselves(options):
    (option,) = options
    with pytest.raises(UserError, match=f"method.{option}="):
        SlidingLayerMerging(**options)
