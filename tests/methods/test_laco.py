"""LaCo against the published loop over whole model copies."""

from __future__ import annotations

import pytest
import torch
from conftest import context_of, random_source
from naive import naive_merge, naive_states
from problems import problem_of

from slm_pipeline.engine.windows import originals
from slm_pipeline.errors import UserError
from slm_pipeline.methods.laco import Laco, LayerCollapse
from slm_pipeline.methods.threshold import find_threshold
from slm_pipeline.models.loading import load_dense
from slm_pipeline.surgery.apply import apply


def naive_laco(model, input_ids, threshold, rule, num_merged, interval, lowest=0, highest=None):
    reference = naive_states(model, input_ids)
    current, similarities = model, []
    layer = (len(model.model.layers) - 1 if highest is None else highest) - num_merged
    while layer >= lowest:
        high = layer + min(num_merged - 1, len(current.model.layers) - layer - 1)
        candidate = naive_merge(current, layer, high, rule)
        pairs = zip(reference, naive_states(candidate, input_ids), strict=True)
        similarities.append(sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs) / len(reference))
        if similarities[-1] >= threshold:
            current = candidate
            layer -= interval
            if layer >= len(current.model.layers):
                layer = len(current.model.layers) - 1 - num_merged
        else:
            layer -= 1
    return current, similarities


@torch.no_grad()
@pytest.mark.parametrize("rule", ["official", "base_difference", "mean"])
@pytest.mark.parametrize(("num_merged", "interval"), [(2, 1), (3, 1), (3, 2), (4, 1)])
def test_equals_the_published_loop(rule, num_merged, interval, input_ids):
    """Folded layers are folded again here: the weights, not only the similarities, must come out alike."""
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    depths = set()
    for threshold in (0.5, 0.9, 0.97, 0.99):
        expected, similarities = naive_laco(model, input_ids, threshold, rule, num_merged, interval)
        method = Laco(merge_rule=rule, num_merged=num_merged, interval=interval)
        plan = method.plan(problem_of(model, source, input_ids, threshold=threshold))
        assert [step["similarity"] for step in plan.scores["steps"]] == pytest.approx(similarities, abs=1e-5)
        fresh, _ = load_dense(source)
        pruned = apply(plan, fresh)
        assert len(pruned.model.layers) == len(expected.model.layers)
        torch.testing.assert_close(
            pruned(input_ids, use_cache=False).logits, expected(input_ids, use_cache=False).logits, rtol=0, atol=1e-5
        )
        depths.add(plan.num_layers)
    assert len(depths) > 1


@torch.no_grad()
@pytest.mark.parametrize("rule", ["official", "mean"])
@pytest.mark.parametrize(
    ("lowest", "highest", "looked_at"), [(2, None, [4, 3, 2]), (0, 5, [2, 1, 0]), (2, 6, [3, 2]), (3, 4, [])]
)
def test_layers_outside_its_range_are_not_looked_at(lowest, highest, looked_at, rule, input_ids):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    for threshold in (0.0, 1.0):
        _, similarities = naive_laco(model, input_ids, threshold, rule, 3, 1, lowest, highest)
        method = Laco(merge_rule=rule, num_merged=3, lowest=lowest, highest=highest)
        steps = method.plan(problem_of(model, source, input_ids, threshold=threshold)).scores["steps"]
        assert [step["similarity"] for step in steps] == pytest.approx(similarities, abs=1e-5)
        assert [step["low"] for step in steps] == looked_at


def test_the_highest_layer_must_be_there():
    Laco(highest=7).check(context_of(random_source(num_layers=8)))
    with pytest.raises(UserError, match="method.highest=8 must be below the model's 8 layers"):
        Laco(highest=8).check(context_of(random_source(num_layers=8)))


def test_the_last_fold_is_shortened_to_land_on_the_target():
    def stub(stack):
        return 1 - 0.02 * (sum(map(len, map(originals, stack))) - len(stack))

    chosen, _, _ = find_threshold(LayerCollapse(stub, 30, 4, 0, 29, 1), 7, refine=5, exhaustive=False)
    assert chosen.num_removed == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_merged": 1}, "method.num_merged=1"),
        ({"interval": 0}, "method.interval=0"),
        ({"lowest": 5, "highest": 5}, "method.highest=5"),
        ({"merge_rule": "sum"}, "method.merge_rule='sum'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Laco(**options)
