"""``sweeps=search``: Optuna's sweeper on a tiny model, its storage, its budget and its failures."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
import yaml
from conftest import run_slm

from slm_pipeline.jobs.runner import _finished_beside
from slm_pipeline.jobs.study import parts_of_search
from slm_pipeline.results.objective import OVER_BUDGET


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])


@pytest.fixture
def search(tmp_path: Path) -> list[str]:
    """Three trials on a random model of six layers, which 0.5 cuts to three and 0.9 to five."""
    (tmp_path / "text.txt").write_text("the river runs past the old mill and a tree " * 20)
    return [
        "-m", "sweeps=search", "model=random", "model.num_layers=6", "model.hidden_size=32",
        "model.intermediate_size=48", "calibration=text_file", f"calibration.path={tmp_path}/text.txt",
        "calibration.num_samples=2", "calibration.seq_len=16", f"evaluation.perplexity.corpora=[{tmp_path}/text.txt]",
        "evaluation.perplexity.window=64", "tracker=jsonl", f"output_dir={tmp_path}/out",
        "objective.metric=pruned/perplexity/text.txt", "study.metric=null", "study.sort_by=null",
        "hydra.sweeper.n_trials=3",
    ]  # fmt: skip


def trials(output_dir: Path) -> list[tuple[int, str, float | None]]:
    """(number, state, value) of each trial in the storage."""
    with sqlite3.connect(output_dir / "searches.db") as database:
        return database.execute(
            "select number, state, value from trials left join trial_values using (trial_id) order by number"
        ).fetchall()


def sweeps(output_dir: Path) -> list[Path]:
    return sorted((output_dir / "sweeps" / "search").iterdir())


def test_a_search_goes_on_where_it_ended_and_keeps_its_budget(search, tmp_path):
    """Within five layers everything counts by its perplexity; within four, thresholds that leave five do not."""
    within = [*search, "threshold.value=choice(0.5,0.9)", "method.merge_rule=official", "objective.max_layers=4"]
    assert run_slm(*within).status == 0
    first = trials(tmp_path / "out")
    assert [(number, state) for number, state, _ in first] == [(0, "COMPLETE"), (1, "COMPLETE"), (2, "COMPLETE")]
    outcome = run_slm(*within)
    assert outcome.status == 0, outcome.err
    assert trials(tmp_path / "out")[:3] == first
    values = [value for _, _, value in trials(tmp_path / "out")]
    assert len(values) == 6

    first_part, second_part = sweeps(tmp_path / "out")
    assert parts_of_search(first_part) == [first_part, second_part]  # whose devices must be one, see _finished_beside
    assert [len([*_finished_beside(part / "0")]) for part in (first_part, second_part)] == [5, 5]
    found = []
    for sweep in sweeps(tmp_path / "out"):
        for job in ("0", "1", "2"):
            summary = json.loads((sweep / job / "summary.json").read_text())
            layers = summary["num_layers"]["pruned"]
            (perplexity,) = summary["metrics"]["pruned"]["perplexity"].values()
            found.append((layers, OVER_BUDGET if layers > 4 else perplexity["perplexity"]))
    assert {layers for layers, _ in found} == {3, 5}
    assert values == pytest.approx([value for _, value in found])
    table = (sweeps(tmp_path / "out")[1] / "summary.md").read_text()
    assert "Budget of layers: 1 of 3 runs keep to it, and one of them is the best" in table
    best = yaml.safe_load((sweeps(tmp_path / "out")[1] / "optimization_results.yaml").read_text())
    assert best["best_params"] == {"threshold.value": 0.5}


def test_a_failing_trial_does_not_end_the_search(search, tmp_path):
    outcome = run_slm(*search, "threshold.value=choice(0.5,1.5)", "hydra.sweeper.n_trials=6")
    assert "threshold.value=1.5 must lie in [0, 1]" in outcome.err
    states = [state for _, state, _ in trials(tmp_path / "out")]
    assert len(states) == 6
    assert set(states) == {"COMPLETE", "FAIL"}
    (sweep,) = sweeps(tmp_path / "out")
    table = (sweep / "summary.md").read_text()
    assert f"6 jobs, {states.count('COMPLETE')} done, {states.count('FAIL')} FAILED" in table


def test_other_choices_need_another_search_and_another_model_is_one(search, tmp_path):
    once = [*search, "hydra.sweeper.n_trials=1", "method.merge_rule=official"]
    assert run_slm(*once, "threshold.value=choice(0.5,0.9)").status == 0
    outcome = run_slm(*once, "threshold.value=choice(0.5,0.6)")
    assert outcome.status == 2
    assert "a name of its own makes it another search: name=search_2" in outcome.err.splitlines()[-1]
    assert run_slm(*once, "threshold.value=choice(0.5,0.6)", "model.num_layers=8").status == 0
    done = [number for number, state, _ in trials(tmp_path / "out") if state == "COMPLETE"]
    assert done == [0, 0]  # the first of each search
    parts = [parts_of_search(part) for part in sweeps(tmp_path / "out")]
    assert [len(found) for found in parts] == [1, 1]


def test_a_search_in_which_nothing_succeeds(search, tmp_path):
    outcome = run_slm(*search, "threshold.value=1.5", "hydra.sweeper.n_trials=1")
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("error: no trial of the search has succeeded")
    assert "1 job, 1 FAILED" in (sweeps(tmp_path / "out")[0] / "summary.md").read_text()


def test_a_dry_run_says_what_is_known_of_a_search(search, tmp_path):
    outcome = run_slm(*search, "dry_run=true", "method.merge_rule=choice(mean,official)")
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("3 trials, 1 at a time, to minimize pruned/perplexity/text.txt")
    assert "threshold.value=range(0.5,0.95,step=0.01)" in outcome.out
    jobs = [line for line in outcome.out.splitlines() if line.startswith("#")]
    assert len(jobs) == 1
    assert "threshold.value=0.5 " in jobs[0]
    assert jobs[0].split()[-1] == "method.merge_rule=mean"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.metric=null", ["objective.metric="]),
        ("objective.metric=pruned/accuracy", ["'pruned/accuracy'", "num_layers", "pruned/perplexity/text.txt"]),
        ("objective.metric=recovered/perplexity/text.txt", ["'recovered/perplexity/text.txt'"]),
        ("objective.direction=up", ["'up'", "minimize, maximize"]),
        ("objective.max_layers=0", ["objective.max_layers=0", "at least 1"]),
        ("objective.max_layers=3 stages=[calibrate]", ["objective.max_layers needs the merge stage"]),
    ],
)
def test_an_objective_that_cannot_be(override, words, search, tmp_path):
    outcome = run_slm(*search, "threshold.value=choice(0.5)", *override.split(), "dry_run=true")
    assert outcome.status == 2
    for word in words:
        assert word in outcome.out + outcome.err
