"""``slm-report`` as a person meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from studies import finished, write_run

from slm_pipeline.commands import report


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two jobs of ratios, and an output folder of a third run."""
    monkeypatch.chdir(tmp_path)
    for job, layers in enumerate((24, 20)):
        write_run(Path("ratios") / str(job), [f"pruning_ratio=r{job}"], finished(tmp_path, layers, 20.0 + job))
    write_run(Path("runs/slm/today"), ["seed=3"], finished(tmp_path, 24, 30.0))
    return tmp_path


@pytest.fixture
def slm_report(monkeypatch, capsys):
    """Run the command; returns its status and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slm-report", *arguments])
        status = 0
        try:
            report.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return (status, *capsys.readouterr())

    return run


def names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".hydra" not in path.parts
    )


def test_a_study_gets_everything_into_its_folder(study, slm_report):
    status, out, _ = slm_report("ratios")
    assert status == 0
    plots = ["layer_strips", "metric", "score_by_layers", "score_by_speed"]
    assert names(study / "ratios") == [
        "0/summary.json",
        "1/summary.json",
        *(f"plots/{name}.{kind}" for name in plots for kind in ("png", "svg")),
        "report.html",
        "summary.csv",
        "summary.md",
        "summary.tex",
    ]
    assert out.startswith("ratios: 2 jobs, 2 done\n")
    assert "  job  pruning_ratio  pruned/perplexity/bundled  num_layers  parameters" in out
    assert "status" not in out  # all are done
    assert out.splitlines()[-5:] == [
        "wrote ratios/summary.md",
        "wrote ratios/summary.csv",
        "wrote ratios/summary.tex",
        "wrote 8 pictures into ratios/plots",
        "wrote ratios/report.html: the page, to be opened in a browser",
    ]


def test_a_run_keeps_its_own_summary(study, slm_report):
    (study / "runs/slm/today/summary.md").write_text("its own")
    assert slm_report("runs/slm/today", "--format", "md")[0] == 0
    assert (study / "runs/slm/today/summary.md").read_text() == "its own"
    assert (study / "runs/slm/today/report/summary.md").read_text().startswith("# today: 1 job, 1 done\n")


def test_several_folders_go_into_report(study, slm_report):
    status, out, _ = slm_report("ratios", "runs", "--format", "csv,latex", "--sort-by", "pruned/perplexity/bundled")
    assert status == 0
    assert names(study / "report") == ["summary.csv", "summary.tex"]
    assert [line.split(",")[0] for line in (study / "report/summary.csv").read_text().splitlines()] == [
        "job",
        "ratios/0",
        "ratios/1",
        "runs/slm/today",
    ]
    assert slm_report("ratios", "--out", "elsewhere", "--format", "md", "--columns", "num_layers")[0] == 0
    assert "pruned/perplexity/bundled |" not in (study / "elsewhere/summary.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "error: absent is not a directory of runs\n"),
        (["ratios/0/.hydra"], "error: no runs in ratios/0/.hydra: expected folders with summary.json"),
        (
            ["ratios", "--metric", "accuracy"],
            "error: metric='accuracy' is not a column of this table; columns: num_layers,",
        ),
        (["ratios", "--columns", "layers,depth"], "error: columns='depth' is not a column of this table"),
        (["ratios", "--series", "method"], "error: series='method' is not an option of these runs"),
        (["ratios", "--format", "pdf"], "error: --format: 'pdf' is not one of md, csv, latex, html"),
        (["ratios", "--out", "ratios/0/summary.json"], "error: --out='ratios/0/summary.json': "),
    ],
)
def test_mistakes_are_one_line(study, slm_report, arguments, message):
    status, out, err = slm_report(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (study / "ratios" / "summary.md").exists()
