"""Which plots compare the runs of a study, and what numbers they show."""

from __future__ import annotations

from itertools import product

import pytest
from studies import finished, perplexity, with_speedup, write_run

from slm_pipeline.report import plots
from slm_pipeline.report.study import read_study
from slm_pipeline.results.number import Number
from slm_pipeline.show import curves
from slm_pipeline.show.looks import METHODS, RECOVERIES


def points(curve: curves.Curve) -> list[tuple[float, float, float | None]]:
    return [(point.x, round(point.y, 4), point.error and round(point.error, 4)) for point in curve.points]


def test_seeds_are_one_point_with_their_deviation_and_failures_are_said(seeds, drawn, tmp_path):
    plots.draw(read_study(seeds), tmp_path)
    found, note = drawn["metric"]["arguments"][0], drawn["metric"]["note"]
    assert [curve.label for curve in found] == ["laco", "slm"]
    assert points(found[0]) == [(20.0, 32.0, 2.6458)]
    assert points(found[1]) == [(24.0, 23.0, 4.2426)]
    assert (found[0].look, found[1].look) == (METHODS["laco"], METHODS["slm"])
    assert drawn["metric"]["reference"] == ("dense: 15.23", 15.234)
    assert note == "points: mean over seed; bars: standard deviation; left out: 1 of 6 jobs (1 FAILED)"
    assert drawn["score_by_layers"]["y"].label == "pruned/average in percent (higher is better)"


def test_a_single_run_has_its_standard_error(sweep, drawn, tmp_path):
    plots.draw(read_study(sweep, metric="pruned/boolq", x="num_layers"), tmp_path)
    (curve,) = drawn["metric"]["arguments"][0]
    assert points(curve) == [(24.0, 40.0, 4.0), (27.0, 50.0, 4.0)]
    assert drawn["metric"]["note"] == "bars: one standard error; left out: 2 of 4 jobs (1 FAILED, 1 interrupted)"


@pytest.mark.parametrize(("export", "label", "place"), [
    ("stock", "parameters at work", 100_000_013.0), ("custom", "parameters", 100_000_020.0),
])  # fmt: skip
def test_the_axis_says_which_parameters_it_counts(export, label, place, tmp_path, drawn):
    missing = {"export": export, "attention": [3], "mlp": [], "parameters": 7}
    for job, result in enumerate([finished(tmp_path, 20, 30.0, sublayers=missing), finished(tmp_path, 24, 20.0)]):
        write_run(tmp_path / "p" / str(job), [f"pruning_ratio=r{job}"], result)
    plots.draw(read_study(tmp_path / "p", x="parameters"), tmp_path)
    assert drawn["metric"]["x"].label == label
    (curve,) = drawn["metric"]["arguments"][0]
    assert [point.x for point in curve.points] == [place, 100_000_024.0]


def test_an_option_that_is_no_number_is_a_ranking(tmp_path, drawn):
    for job, (method, value) in enumerate([("slm", 500.0), ("laco", 20.0), ("mka", 30.0)]):
        write_run(tmp_path / "m" / str(job), [f"method={method}"], finished(tmp_path, 24, value))
    plots.draw(read_study(tmp_path / "m", x="method"), tmp_path)
    rows, found = drawn["metric"]["arguments"]
    assert rows == ["laco", "mka", "slm"]
    assert {curve.look: points(curve) for curve in found} == {
        METHODS["slm"]: [(2.0, 500.0, None)],
        METHODS["laco"]: [(0.0, 20.0, None)],
        METHODS["mka"]: [(1.0, 30.0, None)],
    }
    assert drawn["metric"]["x"].log
    assert "score_by_layers" not in drawn  # all have 24


def test_before_the_recovery_is_drawn_beside_after_it(tmp_path, drawn):
    for job, layers in enumerate((20, 24)):
        result = finished(tmp_path, layers, 100.0 * (job + 1))
        result["metrics"]["recovered"] = {"perplexity": {"bundled": perplexity(30.0 + job)}}
        write_run(tmp_path / "r" / str(job), [f"pruning_ratio=r{job}"], result)
    plots.draw(read_study(tmp_path / "r"), tmp_path)
    after, before = drawn["metric"]["arguments"][0]
    assert (points(after), after.faint) == ([(20.0, 30.0, None), (24.0, 31.0, None)], False)
    assert (points(before), before.faint) == ([(20.0, 100.0, None), (24.0, 200.0, None)], True)
    assert drawn["metric"]["y"].log
    assert drawn["metric"]["note"].startswith("hollow: pruned, before what followed")


def test_before_the_repair_is_drawn_beside_after_it(tmp_path, drawn):
    for job, layers in enumerate((20, 24)):
        result = finished(tmp_path, layers, 100.0 * (job + 1))
        result["metrics"]["repaired"] = {"perplexity": {"bundled": perplexity(50.0 + job)}}
        write_run(tmp_path / "r" / str(job), [f"pruning_ratio=r{job}"], result)
    plots.draw(read_study(tmp_path / "r"), tmp_path)
    after, before = drawn["metric"]["arguments"][0]
    assert (points(after), after.faint) == ([(20.0, 50.0, None), (24.0, 51.0, None)], False)
    assert (points(before), before.faint) == ([(20.0, 100.0, None), (24.0, 200.0, None)], True)


@pytest.mark.parametrize("measured", [True, False])
def test_speed_is_measured_or_the_parameters_left(measured, tmp_path, drawn):
    for job, (speed, score) in enumerate([(50.0, 60.0), (60.0, 55.0), (45.0, 40.0)]):
        result = finished(tmp_path, 24 - job, 20.0, score, score)
        result["parameters"] = {"dense": 200, "pruned": 160 - 20 * job}
        settings = {
            "device": "cpu",
            "dtype": "float32",
            "batch_size": 1,
            "output_len": 8,
            "num_runs": 3,
            "num_warmup": 1,
        }
        if measured:
            result["efficiency"] = {
                "dense": {"tokens_per_second": 40.0, **settings},
                "pruned": {"tokens_per_second": speed, **settings},
            }
        write_run(tmp_path / "s" / str(job), [f"pruning_ratio=r{job}"], result)
    plots.draw(read_study(tmp_path / "s"), tmp_path)
    found, best = drawn["score_by_speed"]["arguments"]
    reference = drawn["score_by_speed"]["reference"][1]
    label = drawn["score_by_speed"]["x"].label
    if measured:
        assert [points(curve)[0][:2] for curve in found] == [(50.0, 60.0), (60.0, 55.0), (45.0, 40.0)]
        assert best == [(50.0, 60.0), (60.0, 55.0)]
        assert (reference.x, reference.y) == (40.0, 65.0)
        assert label == "pruned/efficiency/tokens_per_second (higher is better)"
    else:
        assert [points(curve)[0][:2] for curve in found] == [(80.0, 60.0), (70.0, 55.0), (60.0, 40.0)]
        assert best == [(60.0, 40.0), (70.0, 55.0), (80.0, 60.0)]  # fewer is better, so all three
        assert (reference.x, reference.y) == (100.0, 65.0)
        assert label == "parameters left in percent (speed was not measured)"


def test_the_studys_metric_has_a_front_too_by_the_speed_that_it_asks_for_and_in_each_setting(tmp_path, drawn):
    """A score of tasks, and the perplexity that the study is about, over a token's speedup; a setting of the grid."""
    for job, (perplexity_of, score) in enumerate([(20.0, 60.0), (22.0, 65.0), (30.0, 50.0)]):
        done = with_speedup(finished(tmp_path, 24 - job, perplexity_of, score, score), 1.5 - 0.1 * job, "H100")
        for part, name, value in (("", "token_speedup", 1.25 + 0.25 * job), ("64x512", "speedup", 2.0 + job)):
            key = "/".join(word for word in ("pruned/efficiency", part, name) if word)
            measured = {"measure": "efficiency", "part": part, "device": "H100", "how": "in turn"}
            done["numbers"][key] = Number(key, value, "", 0.05, True, measured).to_json()
        write_run(tmp_path / "s" / str(job), [f"pruning_ratio=r{job}"], done)
    asked = {"metric": "pruned/perplexity/bundled", "x": "pruned/efficiency/token_speedup"}
    plots.draw(read_study(tmp_path / "s", **asked), tmp_path)
    assert drawn["metric_by_speed"]["arguments"][1] == [(1.25, 20.0), (1.5, 22.0), (1.75, 30.0)]  # each is on the front
    assert drawn["metric_by_speed"]["reference"][1].x == 1.0
    assert drawn["score_by_speed"]["arguments"][1] == [(1.5, 65.0), (1.75, 50.0)]
    assert drawn["score_by_speed_64x512"]["arguments"][1] == [(3.0, 65.0), (4.0, 50.0)]
    assert drawn["score_by_speed"]["x"].label == "pruned/efficiency/token_speedup (higher is better)"


def test_a_percent_of_the_parameters_is_one_size_of_the_front(tmp_path, drawn):
    """84.2 and 84.1 percent are one size, of which the better one is on the front; 70 percent is another."""
    for job, (left, score) in enumerate([(842, 60.0), (841, 55.0), (700, 40.0)]):
        result = finished(tmp_path, 24 - job, 20.0, score, score)
        result["parameters"] = {"dense": 1000, "pruned": left}
        write_run(tmp_path / "s" / str(job), [f"method=m{job}"], result)
    plots.draw(read_study(tmp_path / "s"), tmp_path)
    _, best = drawn["score_by_speed"]["arguments"]
    assert best == [(70.0, 40.0), (84.2, 60.0)]


@pytest.mark.parametrize("devices", [("H100", "H100"), ("H100", "A100")])
def test_the_ratio_to_the_dense_model_is_drawn_if_it_is_one_devices(devices, tmp_path, drawn):
    for job, (device, speedup) in enumerate(zip(devices, (1.25, 1.5), strict=True)):
        done = finished(tmp_path, 24 - 6 * job, 20.0, 60.0 - job, 60.0 - job)
        write_run(tmp_path / "s" / str(job), [f"pruning_ratio=r{job}"], with_speedup(done, speedup, device))
    plots.draw(read_study(tmp_path / "s"), tmp_path)
    found, _ = drawn["score_by_speed"]["arguments"]
    label, reference = drawn["score_by_speed"]["x"].label, drawn["score_by_speed"]["reference"][1]
    if devices == ("H100", "H100"):
        assert [points(curve)[0][:2] for curve in found] == [(1.25, 60.0), (1.5, 59.0)]
        assert (reference.x, reference.y) == (1.0, 65.0)
        assert label == "pruned/efficiency/speedup (higher is better)"
    else:
        assert reference.x == 100.0
        assert label == "parameters left in percent (speed was measured on several devices)"


def test_looks_tell_three_options_apart_and_the_method_decides_the_colour(tmp_path):
    methods, recoveries, ratios = ("slm", "laco"), ("none", "lora"), ("r10", "r20")
    for job, (ratio, method, recovery) in enumerate(product(ratios, methods, recoveries)):
        overrides = [f"pruning_ratio={ratio}", f"method={method}", f"recovery={recovery}", "seed=1"]
        write_run(tmp_path / "s" / str(job), overrides, finished(tmp_path, 24, 20.0 + job))
    study = read_study(tmp_path / "s")
    keys = [*product(ratios, methods, recoveries)]
    looks = plots.series_looks(study, ["pruning_ratio", "method", "recovery"], keys)
    assert set(looks) == set(keys)
    assert len(set(looks.values())) == 8
    assert all(look.color == METHODS[method].color for (_, method, _), look in looks.items())
    assert all(look.line == RECOVERIES[recovery].line for (_, _, recovery), look in looks.items())
    # an option with one value tells nothing
    assert plots.series_looks(study, ["seed", "method"], [("1", "slm"), ("1", "laco")])["1", "slm"] == METHODS["slm"]
    assert plots.telling_options(study) == ["method", "pruning_ratio"]
