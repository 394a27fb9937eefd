"""Which runs are the best, where sizes differ, seeds are repeated and differences are small."""

from __future__ import annotations

import math

import pytest
from studies import finished, write_run

from slm_pipeline.report import documents
from slm_pipeline.report.study import read_study
from slm_pipeline.report.winners import choice_of, winners
from slm_pipeline.results.number import Number
from slm_pipeline.results.of_run import ratio_missed


def choices(*found: tuple[str, float | None, list[float], float | None]):
    """Of (name, size, metric of each seed, standard error of each)."""
    return [
        choice_of((name,), [(i, Number("ppl", value, "perplexity", error), size) for i, value in enumerate(values)])
        for name, size, values, error in found
    ]


def said(found) -> list[tuple[str, list[str], bool]]:
    """Name of the best, of those tied, and whether it is on the front, the largest size first."""
    return [(w.best.values[0], [choice.values[0] for choice in w.tied], w.on_front) for w in found]


def test_each_size_has_a_best_and_sizes_within_a_percent_are_one():
    found = winners(
        choices(
            ("a", 99.1, [20.0], None), ("b", 100.0, [19.0], None), ("c", 80.0, [30.0], None), ("d", 79.0, [31.0], None)
        ),
        higher_is_better=False,
    )
    assert said(found) == [("b", [], True), ("c", [], True), ("d", [], True)]  # 79 is 1.25 % below 80
    assert said(winners(choices(("a", 99.1, [20.0], None), ("b", 100.0, [19.0], None)), higher_is_better=True)) == [
        ("a", [], True)
    ]


def test_a_larger_one_that_is_no_better_is_not_on_the_front():
    found = choices(("large", 100.0, [30.0], None), ("middle", 80.0, [30.0], None), ("small", 60.0, [40.0], None))
    assert said(winners(found, higher_is_better=False)) == [
        ("large", [], False), ("middle", [], True), ("small", [], True),
    ]  # fmt: skip
    assert [winner.on_front for winner in winners(found, higher_is_better=True)] == [False, False, True]


def test_the_luckiest_seed_does_not_win():
    """One seed of "lucky" is the best of all, its mean is 23; the other's is 20 with hardly a spread."""
    found = choices(("lucky", 1.0, [17.0, 22.0, 24.0, 29.0], None), ("steady", 1.0, [19.9, 20.0, 20.1, 20.0], None))
    (winner,) = winners(found, higher_is_better=False)
    assert winner.best.values == ("steady",)
    assert [choice.values[0] for choice in winner.tied] == ["lucky"]  # 3 < 3.18 x 4.97 / 2
    assert winner.best.metric.stderr == pytest.approx(math.sqrt(0.02 / 3))


@pytest.mark.parametrize(("difference", "tied"), [(3.5, True), (3.52, False)])
def test_means_of_three_seeds_differ_beyond_students_t(difference, tied):
    """A spread of 1 over three seeds: each mean is known to 4.30 / sqrt(3), their difference to 3.511."""
    seeds = [19.0, 20.0, 21.0]
    found = choices(("a", 1.0, seeds, None), ("b", 1.0, [seed + difference for seed in seeds], None))
    (winner,) = winners(found, higher_is_better=False)
    assert bool(winner.tied) == tied


def test_a_single_run_is_as_uncertain_as_the_others_are_on_average():
    """Spread 2 of the two seeds of each other; singles then differ beyond 1.96 x 2 x sqrt(2) = 5.54."""
    several = ("b", 1.0, [40.0, 40.0 + math.sqrt(8.0)], None)
    for value, tied in ((25.5, ["c"]), (25.6, [])):
        found = choices(("a", 1.0, [20.0], None), several, ("c", 1.0, [value], None))
        (winner,) = winners(found, higher_is_better=False)
        assert [choice.values[0] for choice in winner.tied if choice.values != ("b",)] == tied


def test_without_any_error_only_equals_are_tied():
    found = choices(("a", None, [20.0], None), ("b", None, [20.001], None), ("c", None, [20.0], None))
    assert said(winners(found, higher_is_better=False)) == [("a", ["c"], True)]


def test_a_study_over_sizes_names_the_best_of_each_and_not_the_least_pruned(tmp_path):
    jobs = [("slm", 27, 20.0), ("laco", 27, 21.0), ("slm", 24, 40.0), ("laco", 24, 30.0), ("slm", 21, 29.0)]
    for job, (method, layers, value) in enumerate(jobs):
        result = finished(tmp_path, layers, value)
        result["parameters"]["pruned"] = layers * 4_000_000
        result["pruning_ratio"] = {"asked": 0.2, "of": "layers", "got_layers": 1 - layers / 30, "got_parameters": 0.1}
        write_run(tmp_path / "s" / str(job), [f"method={method}", f"pruning_ratio=r{layers}"], result)
    study = read_study(tmp_path / "s", metric="pruned/perplexity/bundled")
    assert study.best_runs == {0, 4}
    text = documents.text(study)
    assert text.partition("\n\n")[2].startswith(
        "Best at each size\n"
        "  parameters  method  pruning_ratio  pruned/perplexity/bundled  note\n"
        "      108.0M  slm     r27                                20.00\n"
        "       96.0M  laco    r24                                30.00  a smaller one is as good\n"
        "       84.0M  slm     r21                                29.00\n"
    )
    assert "jobs 0, 1: asked 20% of the layers, got 10%\n" in text
    assert "job 4: asked 20% of the layers, got 30%\n" in text
    assert "Bold" not in text
    assert "Bold: the best at each size, unless a smaller one is as good\n" in documents.markdown(study)


@pytest.mark.parametrize(
    ("asked", "of", "layers", "got_parameters", "said"),
    [
        (0.2, "layers", 24, 0.15, None),
        (0.35, "layers", 20, 0.25, None),  # 10 of 30 for 10.5
        (0.2, "layers", 22, 0.2, "asked 20% of the layers, got 26.67%"),
        (0.2, "layers", 30, 0.2, None),  # by width: the parameters of so many layers
        (0.2, "parameters", 24, 0.209, None),
        (0.2, "parameters", 24, 0.25, "asked 20% of the parameters, got 25%"),
        ({"num_layers": 24}, "layers", 24, 0.2, None),
    ],
)
def test_what_was_asked_and_not_got_is_said(asked, of, layers, got_parameters, said):
    ratio = {"asked": asked, "of": of, "got_layers": round(1 - layers / 30, 4), "got_parameters": got_parameters}
    summary = {"pruning_ratio": ratio, "num_layers": {"dense": 30, "pruned": layers}}
    assert ratio_missed(summary) == said
    for mark in ({"label": "narrower", "layers": [0], "part": "whole"}, {"label": "x", "layers": [0], "part": "upper"}):
        expected = None if of == "layers" else said  # what went of a layer counts too: depth and width together
        assert ratio_missed({**summary, "changes": {"marks": [mark]}}) == expected


def test_each_dense_model_has_winners_of_its_own(tmp_path):
    """They may cut the same text into other tokens: their perplexities do not compare."""
    for job, (model, value) in enumerate([("coarse", 40.0), ("coarse", 45.0), ("fine", 8.0)]):
        result = finished(tmp_path, 24, value, model=model)
        write_run(tmp_path / "s" / str(job), [f"model={model}", f"method=m{job}"], result)
    study = read_study(tmp_path / "s", metric="pruned/perplexity/bundled")
    assert study.best_runs == {0, 2}
    assert [winner.best.metric.value for winner in study.winners] == [40.0, 8.0]
    assert documents.text(study).partition("\n\n")[2].startswith("Best of each model\n")
    assert "Bold: the best of each model\n" in documents.markdown(study)


def test_a_score_of_few_examples_competes_with_its_uneven_interval():
    """0 and 4 of 20: the usual interval of the difference, +-17.5, excludes 0, Newcombe's (-41.6, 0.0 ...) does not."""
    found = []
    for name, right in (("none", 0), ("four", 4)):
        share = right / 20
        measured = {"num_examples": 20}
        number = Number("x/boolq", 100 * share, "%", 100 * math.sqrt(share * (1 - share) / 19), True, measured)
        found.append(choice_of((name,), [(len(found), number, None)]))
    assert said(winners(found, higher_is_better=True)) == [("four", ["none"], True)]
