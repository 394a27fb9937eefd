"""LaTeX and CSV of a study."""

from __future__ import annotations

import csv
import io
import re

from slm_pipeline.report import documents
from slm_pipeline.report.study import read_study


def test_csv_has_a_row_for_each_run_with_every_number_and_its_error(sweep):
    rows = list(csv.DictReader(io.StringIO(documents.csv(read_study(sweep)))))
    head = list(rows[0])
    assert head[:4] == ["job", "status", "reason", "pruning_ratio"]
    assert head[-1] == "path"
    for column in (
        "dense/perplexity/bundled",
        "dense/boolq",
        "dense/boolq stderr",
        "pruned/piqa",
        "pruned/average stderr",
    ):
        assert column in head
    assert [row["job"] for row in rows] == ["0", "1", "2", "10"]
    assert float(rows[0]["dense/perplexity/bundled"]) == 15.234
    assert float(rows[0]["seconds"]) == 42.0
    assert (rows[2]["pruned/boolq"], rows[2]["pruned/boolq stderr"], rows[2]["pruned/average stderr"]) == (
        "40.0",
        "4.0",
        "2.5",
    )
    assert (rows[1]["status"], rows[1]["reason"], rows[1]["num_layers"]) == ("FAILED", "ratio=2 must be below 1", "")


def test_values_are_numbers_not_text(sweep):
    columns, rows = documents.values(read_study(sweep))
    assert rows[2][columns.index("num_layers")] == 24
    assert rows[1][columns.index("num_layers")] is None
    assert all(len(row) == len(columns) for row in rows)


def test_chosen_columns_are_the_ones_shown(sweep):
    study = read_study(sweep, columns=["num_layers", "pruned/piqa"])
    columns, _ = documents.values(study)
    assert columns == [
        "job",
        "status",
        "reason",
        "pruning_ratio",
        "num_layers",
        "pruned/piqa",
        "pruned/piqa stderr",
        "path",
    ]
    assert "| job | pruning_ratio | num_layers | pruned/piqa | status" in documents.markdown(study)


def test_latex_keeps_what_a_paper_needs(seeds):
    latex = documents.latex(read_study(seeds))
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 2
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert r"\caption{How sure is it?}" in latex
    assert r"method & seed & num\_layers & parameters & pruned/perplexity/bundled & pruned/average & status \\" in latex
    assert r"slm & 0 & 24 & 100.0M & \textbf{20.00} & 55.0 $\pm$2.5 & done \\" in latex
    assert r"slm & 2 &  &  &  &  & FAILED \\" in latex
    assert r"slm & 2 of 3 & 24 & 100.0M & \textbf{23.00 $\pm$4.24} & 55.0 $\pm$0.0 \\" in latex
    assert "Dense model: perplexity/bundled 15.23, average 65.0; perplexity bundled: 8184" in latex
    assert "seconds" not in latex  # what it took is not what came of it
    assert "\\label{tab:seeds}" in latex


def test_latex_of_runs_that_no_option_tells_apart_names_the_jobs(sweep):
    for path in sweep.glob("*/.hydra/overrides.yaml"):
        path.write_text("- model=tiny_model\n")
    latex = documents.latex(read_study(sweep))
    assert r"job & num\_layers &" in latex
    assert "tiny_model" not in latex


def test_the_terminal_gets_the_same_in_plain_text(seeds):
    text = documents.text(read_study(seeds))
    assert text.isascii()
    assert "  job  method  seed  pruned/perplexity/bundled  num_layers  parameters  pruned/average  status\n" in text
    assert "  also in summary.md and report.html: seconds\n" in text
    assert re.search(r"\n    2  slm        2 +FAILED\n", text)
    assert "Not done\n  job 2: FAILED: loss is nan" in text
    assert "2 of 3          24      100.0M               23.00 +-4.24" in text
    assert "**" not in text
    assert "`" not in text
