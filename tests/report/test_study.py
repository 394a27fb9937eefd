"""Many runs side by side: what they share, where they differ, what is best and what is averaged."""

from __future__ import annotations

import json
import math
import os
import re

import pytest
from studies import finished, perplexity, with_speedup, write_run

from slm_pipeline.errors import UserError
from slm_pipeline.report import documents
from slm_pipeline.report.page import html
from slm_pipeline.report.study import _on_another_text, mean_and_deviation, read_study
from slm_pipeline.report.write import write_summary_so_far


def cells(markdown: str, number: int = 0) -> list[list[str]]:
    """The rows of the number-th table."""
    blocks = [block for block in markdown.split("\n\n") if block.startswith("|")]
    rows = blocks[number].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in [rows[0], *rows[2:]]]


def test_a_study_has_a_row_for_each_job_and_says_shared_things_once(sweep):
    text = documents.markdown(read_study(sweep))
    assert text.startswith("# ratio: 4 jobs, 2 done, 1 FAILED, 1 interrupted\n")
    assert "All jobs: `model=tiny`\n" in text
    assert "Dense model: perplexity/bundled 15.23, average 65.0\n" in text
    assert "Metric: pruned/perplexity/bundled, lower is better\n\nBold: the best\n" in text
    numbers = ["num_layers", "parameters", "pruned/perplexity/bundled", "pruned/average", "seconds"]
    assert cells(text) == [
        ["job", "pruning_ratio", *numbers, "status"],
        ["0", "r0", "27", "100.0M", "30.50", "55.0 +-2.5", "42.0", "done"],
        ["1", "r1", "", "", "", "", "", "FAILED: ratio=2 must be below 1"],
        ["2", "r2", "24", "100.0M", "**20.25**", "45.0 +-2.5", "42.0", "done"],
        ["10", "r10", "", "", "", "", "", "interrupted"],
    ]
    assert "- zero-shot boolq, piqa: lm-eval 0.4.13, the first 20 examples of each task, batch size 16\n" in text
    assert text.count("20 examples a task: +-11 points") == 1


def test_the_best_stands_first_and_the_failed_last(sweep):
    def order(column: str) -> list[str]:
        return [run.job for run in read_study(sweep, sort_by=column).runs]

    assert order("pruned/average") == ["0", "2", "1", "10"]
    assert order("num_layers") == ["2", "0", "1", "10"]
    assert order("pruning_ratio") == ["0", "1", "10", "2"]
    assert "Sorted by num_layers, best first" in documents.markdown(read_study(sweep, sort_by="num_layers"))


@pytest.mark.parametrize("key", ["sort_by", "metric", "x"])
def test_an_unknown_column_is_an_error_that_lists_the_columns(sweep, key):
    allowed = "columns: num_layers, parameters, threshold, dense/perplexity/bundled, .*, pruned/average, seconds"
    with pytest.raises(UserError, match=f"{key}='accuracy' is not a column of this table; {allowed}"):
        read_study(sweep, **{key: "accuracy"})
    with pytest.raises(UserError, match="columns='accuracy' is not a column"):
        read_study(sweep, columns=["num_layers", "accuracy"])
    with pytest.raises(
        UserError, match="series='method' is not an option of these runs; they differ in: pruning_ratio"
    ):
        read_study(sweep, series=["method"])


def test_a_column_that_is_nearly_one_is_answered_with_it(sweep):
    with pytest.raises(
        UserError, match=r"metric='prund/average' is not a column of this table \(did you mean pruned/av"
    ):
        read_study(sweep, metric="prund/average")


def test_a_wish_of_the_configuration_that_cannot_be_met_is_a_note(tmp_path):
    study = {"question": "Why?", "metric": "recovered/average", "x": "num_layers", "series": ["recovery.rank"]}
    for job in range(2):
        config = {"name": "why", "study": {**study, "sort_by": "recovered/average"}}
        write_run(tmp_path / "why" / str(job), [f"seed={job}"], finished(tmp_path, 20, 20.0 + job), config=config)
    found = read_study(tmp_path / "why")
    assert (found.metric, found.sort_by, found.x, found.series) == ("pruned/perplexity/bundled", None, "num_layers", [])
    text = documents.markdown(found)
    assert text.startswith("# Why?\n\nwhy: 2 jobs, 2 done\n")
    assert "sort_by='recovered/average' is not a column of this table" in text
    assert "metric='recovered/average' is not a column of this table" in text
    assert "series='recovery.rank' is not an option of these runs" in text


def test_a_preset_column_is_that_of_the_one_text_that_was_measured(tmp_path):
    study = {"metric": "pruned/perplexity/wikitext2", "sort_by": "pruned/perplexity/wikitext2"}
    for job, value in enumerate((21.0, 20.0)):
        done = finished(tmp_path, 20, value)
        write_run(tmp_path / "why" / str(job), [f"seed={job}"], done, config={"name": "why", "study": study})
    found = read_study(tmp_path / "why")
    assert (found.metric, found.sort_by, found.notes) == (*["pruned/perplexity/bundled"] * 2, [])
    assert [run.job for run in found.runs] == ["1", "0"]
    assert _on_another_text("pruned/fidelity/a/kl", ["pruned/fidelity/b/kl", "dense/fidelity/a/kl"]) == (
        "pruned/fidelity/b/kl"
    )
    assert _on_another_text("pruned/fidelity/a/kl", ["pruned/fidelity/b/top1_agreement"]) is None
    assert _on_another_text("pruned/efficiency/8x128/latency", ["pruned/efficiency/1x128/latency"]) is None
    with pytest.raises(UserError, match="metric='pruned/perplexity/wikitext2' is not a column"):  # asked for by name
        read_study(tmp_path / "why", metric="pruned/perplexity/wikitext2")
    done["metrics"]["pruned"]["perplexity"] = {"c4": perplexity(20.0), "bundled": perplexity(21.0)}
    write_run(tmp_path / "why" / "2", ["seed=2"], done, config={"name": "why", "study": study})
    assert any("'pruned/perplexity/wikitext2' is not a column" in note for note in read_study(tmp_path / "why").notes)


def test_a_study_of_failures_alone_is_a_table(sweep):
    for job in ("0", "2", "10"):
        for path in (sweep / job).glob("summary.json"):
            path.unlink()
    text = documents.markdown(read_study(sweep, sort_by="num_layers"))
    assert cells(text)[0] == ["job", "pruning_ratio", "status"]
    assert [row[-1] for row in cells(text)[1:]] == [
        "interrupted",
        "FAILED: ratio=2 must be below 1",
        *2 * ["interrupted"],
    ]
    assert "sort_by='num_layers': no run is done yet" in text
    (sweep / "2" / "failure.json").write_text(json.dumps({"error": "killed", "type": "KeyboardInterrupt"}))
    assert "4 jobs, 2 FAILED, 2 interrupted" in documents.markdown(read_study(sweep))


def test_seeds_are_averaged_and_the_failed_one_is_counted(seeds):
    study = read_study(seeds)
    assert (study.options, study.repeated, study.varied) == (["method", "seed"], ["seed"], ["method"])
    text = documents.markdown(study)
    assert text.startswith("# How sure is it?\n\nseeds: 6 jobs, 5 done, 1 FAILED\n")
    assert cells(text) == [
        ["parameters", "method", "runs", "pruned/perplexity/bundled", "note"],
        ["100.0M", "slm", "2", "23.00 +-4.24", "tied with laco"],
    ]
    assert [row[3] for row in cells(text, 1)[1:]] == ["24", "24", "", "20", "20", "20"]
    assert "## Averaged over seed: mean +- standard deviation of the runs that are done\n" in text
    deviation = math.sqrt((4 + 1 + 9) / 2)  # of 30, 31, 35 around 32
    assert cells(text, 2) == [
        ["method", "runs done", "num_layers", "parameters", "pruned/perplexity/bundled", "pruned/average"],
        ["slm", "2 of 3", "24", "100.0M", "**23.00 +-4.24**", "55.0 +-0.0"],
        ["laco", "3 of 3", "20", "100.0M", f"**32.00 +-{deviation:.2f}**", "55.0 +-0.0"],
    ]


def test_a_seed_that_is_drawn_is_no_repetition(seeds):
    assert read_study(seeds, x="seed").repeated == []
    assert "Averaged" not in documents.markdown(read_study(seeds, x="seed"))


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 3.0]) == (2.0, math.sqrt(2.0))
    assert mean_and_deviation([5.0]) == (5.0, None)


def test_merged_studies_differ_in_what_their_files_chose(seeds, tmp_path):
    """A study that fixed the method in its file, beside one that swept it on the command line."""
    config = {"name": "other", "seed": 0, "study": {"question": "What else?", "metric": "pruned/average"}}
    for job, ratio in enumerate(("r10", "r20")):
        overrides = [f"pruning_ratio={ratio}", "sweeps=other"]
        choices = {"method": "come", "pruning_ratio": ratio, "sweeps": "other"}
        write_run(
            tmp_path / "other" / str(job), overrides, finished(tmp_path, 27, 18.0), config=config, choices=choices
        )
    study = read_study(seeds, tmp_path / "other")
    assert study.name == "seeds, other"
    assert study.options == ["name", "method", "seed", "pruning_ratio"]
    assert [run.option("method") for run in study.runs] == [*3 * ["slm"], *3 * ["laco"], *2 * ["come"]]
    assert (study.question, study.metric, study.series) == (None, "pruned/perplexity/bundled", ["method"])


def test_settings_that_hold_for_some_jobs_name_them(tmp_path):
    for job in range(3):
        result = finished(tmp_path, 24, 20.0)
        if job == 1:
            result["metrics"]["pruned"]["perplexity"]["bundled"]["window"] = 2048
        write_run(tmp_path / "s" / str(job), [f"seed={job}"], result)
    study = read_study(tmp_path / "s")
    ways = [f"pruned/perplexity/bundled[window={window}]" for window in (1024, 2048)]
    assert study.metric == ways[0]  # that of most runs
    assert [name for name in study.columns if "perplexity" in name] == ["dense/perplexity/bundled", *ways]
    assert [study.value(run, ways[1]) for run in range(3)] == [None, 20.0, None]
    assert study.best_runs == {0, 2}  # what was measured otherwise does not compete
    assert study.notes == [f"pruned/perplexity/bundled was measured in 2 ways, which do not compare: {', '.join(ways)}"]
    assert read_study(tmp_path / "s", metric=ways[1], sort_by="pruned/perplexity/bundled").metric == ways[1]
    lines = study.measured()
    assert "jobs 0, 2: perplexity bundled: 8184 tokens scored, windows of 1024 tokens, not overlapping, no BOS" in lines
    assert "zero-shot boolq, piqa: lm-eval 0.4.13, the first 20 examples of each task, batch size 16" in lines


def test_ties_for_the_best_are_all_bold_and_a_score_is_best_when_high(sweep, tmp_path):
    """Of 20 examples: Newcombe's interval of 50 - 40 is -19.3..37.0, that of 50 - 20 begins at 0.5."""
    study = read_study(sweep, metric="pruned/boolq")
    assert study.best_runs == {0, 2}
    assert "pruned/boolq" in study.shown_columns()  # though it is a detail
    text = documents.markdown(study)
    assert "Metric: pruned/boolq, higher is better, guessing scores 50.0\n" in text
    assert "Bold: the best, and what noise does not tell from it\n" in text
    assert "**50.0 +-4.0**" in text
    assert "**40.0 +-4.0**" in text
    write_run(tmp_path / "ratio" / "11", ["pruning_ratio=r11"], finished(tmp_path, 24, 20.0, boolq=20.0))
    assert read_study(sweep, metric="pruned/boolq").best_runs == {0, 2}
    tied = documents.markdown(read_study(sweep, metric="seconds"))
    assert [row[6] for row in cells(tied, 1)[1:]] == ["**42.0**", "", "**42.0**", "", "**42.0**"]


def test_where_things_go_is_nothing_that_runs_share_or_differ_in(tmp_path):
    for job in range(2):
        overrides = [
            f"seed={job}",
            "sweeps=seeds",
            "+output_dir=/a",
            f"hydra.sweep.dir=/b/{job}",
            "evaluation.limit=20",
        ]
        write_run(tmp_path / "s" / str(job), [*overrides, "tracker=jsonl"], finished(tmp_path, 24, 20.0))
    study = read_study(tmp_path / "s")
    assert (study.options, study.shared()) == (["seed"], ["sweeps=seeds", "evaluation.limit=20"])


def test_the_table_is_not_written_after_each_of_many_small_jobs(tmp_path):
    """Written at once if it is old, or if no job is left; else the next one will."""
    write_run(tmp_path / "0", ["seed=1"], finished(tmp_path, 24, 30.0))
    (tmp_path / "study.json").write_text(json.dumps({"format": 1, "command": "slm", "jobs": [["seed=1"], ["seed=2"]]}))
    write_summary_so_far(tmp_path)
    table = (tmp_path / "summary.md").read_text()
    assert "2 jobs, 1 done, 1 interrupted" in table
    (tmp_path / "0" / "summary.json").unlink()
    write_summary_so_far(tmp_path)
    assert (tmp_path / "summary.md").read_text() == table  # a second has not passed
    os.utime(tmp_path / "summary.md", (1000, 1000))
    write_summary_so_far(tmp_path)
    assert "2 jobs, 2 interrupted" in (tmp_path / "summary.md").read_text()
    (tmp_path / "0" / "failure.json").write_text(json.dumps({"error": "x", "type": "UserError"}))
    write_run(tmp_path / "1", ["seed=2"], "y")
    write_summary_so_far(tmp_path)
    assert "2 jobs, 2 FAILED" in (tmp_path / "summary.md").read_text()  # the last one


def test_a_table_that_cannot_be_written_does_not_fail_the_job(tmp_path, caplog):
    write_run(tmp_path / "0", ["seed=1"], finished(tmp_path, 24, 30.0))
    (tmp_path / "summary.md").mkdir()
    os.utime(tmp_path / "summary.md", (1000, 1000))
    write_summary_so_far(tmp_path)
    assert "cannot write" in caplog.text
    assert "IsADirectoryError" in caplog.text


def test_a_run_over_the_budget_of_layers_is_never_the_best(tmp_path):
    for job, (layers, value) in enumerate([(27, 20.0), (24, 30.0), (22, 40.0)]):
        config = {"objective": {"max_layers": 24}}
        write_run(
            tmp_path / "s" / str(job), [f"threshold.value={job}"], finished(tmp_path, layers, value), config=config
        )
    study = read_study(tmp_path / "s")
    assert study.best_runs == {1}
    text = documents.markdown(study)
    assert "Budget of layers: 2 of 3 runs keep to it, and one of them is the best" in text
    assert "**30.00**" in text
    assert "**20.00**" not in text
    page = html(study, [])
    assert re.findall(r"<td class=\"number best\"[^>]*>([0-9.]+)", page) == ["30.00"]
    assert "<dt>Best run</dt><dd>threshold.value 1" in page.replace("threshold.value 1.0", "threshold.value 1")


def test_an_average_over_the_budget_is_never_the_best_and_perhaps_there_is_none(tmp_path):
    jobs = [("slm", 27, 20.0), ("slm", 27, 21.0), ("laco", 24, 30.0), ("laco", 24, 31.0)]
    for job, (method, layers, value) in enumerate(jobs):
        config = {"objective": {"max_layers": 24}}
        folder = tmp_path / "s" / str(job)
        write_run(folder, [f"method={method}", f"seed={job % 2}"], finished(tmp_path, layers, value), config=config)
    averages = read_study(tmp_path / "s").averages(["pruned/perplexity/bundled"]).markdown()
    assert "**30.50 +-0.71**" in averages
    assert "**20.50" not in averages
    for job, (method, layers, value) in enumerate([("slm", 24, 19.0), *jobs[1:]]):
        config = {"objective": {"max_layers": 24}}
        folder = tmp_path / "t" / str(job)
        write_run(folder, [f"method={method}", f"seed={job % 2}"], finished(tmp_path, layers, value), config=config)
    averages = read_study(tmp_path / "t").averages(["pruned/perplexity/bundled"]).markdown()
    assert "**30.50 +-0.71**" in averages  # not 20.00 +-1.41, of which one run is over the budget
    text = documents.markdown(read_study(tmp_path / "s" / "0", tmp_path / "s" / "1"))
    assert "Budget of layers: 0 of 2 runs keep to it\n" in text


def test_the_newest_of_several_attempts_counts(tmp_path):
    """Of two that are done the later, else the last in the table."""
    write_run(tmp_path / "s" / "0", ["seed=1"], "out of memory")
    write_run(tmp_path / "s" / "1", ["seed=2"], "out of memory")
    write_run(tmp_path / "s" / "2", ["seed=1"], None)
    assert read_study(tmp_path / "s").newest == [False, True, True]


def test_shared_windows_are_said_once_and_where_seconds_are_shown(tmp_path):
    for job, evaluated in enumerate([20, 15, 12]):
        result = finished(tmp_path, 24, 20.0, windows={"evaluations": 20, "evaluated": evaluated})
        write_run(tmp_path / "s" / str(job), [f"threshold.value={job}"], result)
    study = read_study(tmp_path / "s")
    said = "jobs 1, 2: plan_seconds: without the windows that an earlier search had evaluated"
    assert [line for line in study.measured() if "plan_seconds" in line] == [said]
    assert "plan_seconds" not in documents.latex(study)


def test_a_job_that_was_repeated_counts_once_in_an_average(tmp_path):
    """Seeds 1 and 2; of seed 1 an older run with another number, and a newer one that failed."""
    jobs = [("seed=1", 90.0, 1000), ("seed=1", 20.0, 3000), ("seed=2", 30.0, 2000), ("seed=1", "out of memory", 4000)]
    for job, (seed, value, when) in enumerate(jobs):
        folder = tmp_path / "s" / str(job)
        write_run(folder, ["method=slm", seed], value if isinstance(value, str) else finished(tmp_path, 24, value))
        if not isinstance(value, str):
            os.utime(folder / "summary.json", (when, when))
    study = read_study(tmp_path / "s")
    assert study.newest == [False, True, True, False]
    averages = cells(study.averages(["pruned/perplexity/bundled"]).markdown())
    assert averages == [["runs done", "pruned/perplexity/bundled"], ["2 of 2", "25.00 +-7.07"]]
    assert study.averages_title().endswith("; 2 other runs of the same jobs left out")


def test_speeds_of_two_devices_are_shown_and_not_compared(tmp_path):
    jobs = [(2.0, "H100", "r10"), (3.0, "A100", "r10"), (1.5, "H100", "r20")]
    for job, (speedup, device, ratio) in enumerate(jobs):
        config = {"study": {"metric": "pruned/efficiency/speedup", "sort_by": "pruned/efficiency/speedup"}}
        done = with_speedup(finished(tmp_path, 24, 20.0), speedup, device)
        write_run(tmp_path / "s" / str(job), [f"pruning_ratio={ratio}", f"seed={job}"], done, config=config)
    study = read_study(tmp_path / "s")
    said = "pruned/efficiency/speedup' was measured on H100 and on A100: they cannot be compared"
    assert (study.metric, study.sort_by) == ("pruned/perplexity/bundled", None)
    assert [note.partition("=")[0] for note in study.notes if said in note] == ["sort_by", "metric"]
    assert "efficiency: measured on H100 and on A100, so not to be compared across them" in study.remarks()
    (speed,) = read_study(tmp_path / "s", columns=["pruned/efficiency/speedup"]).shown_columns()
    assert [row[3] for row in study.table([speed]).rows] == ["2 +-0.05", "3 +-0.05", "1.5 +-0.05"]
    assert [row[-1] for row in study.averages([speed]).rows] == ["", "1.5"]
    for key in ("metric", "x", "sort_by"):
        with pytest.raises(UserError, match=said):
            read_study(tmp_path / "s", **{key: speed})
    alone = read_study(tmp_path / "s" / "0", tmp_path / "s" / "2")
    assert (alone.metric, alone.runs[0].job) == ("pruned/efficiency/speedup", "0")
