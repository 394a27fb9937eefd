"""A study as text: Markdown, LaTeX, CSV, and plain for the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slm_pipeline.report import leaderboard, winners
from slm_pipeline.report.study import Study
from slm_pipeline.show.tables import Lines, Table, code, csv_text, latex_escaped, markdown_escaped, wrapped

MOST_RUNS = 40  # that a terminal shows one by one


def markdown(study: Study) -> str:
    """Question, remarks, tables, how it was measured."""
    counts = markdown_escaped(study.counts())
    title = f"# {markdown_escaped(study.question)}\n\n{counts}\n" if study.question else f"# {counts}\n"
    columns = study.shown_columns()
    shared = [f"All jobs: {code(' '.join(study.shared()))}\n"] if study.shared() else []
    remarks = (f"{markdown_escaped(line)}\n" for line in study.remarks())
    parts = [title, *shared, *remarks]
    best = _best(study)
    for heading, note, table in best:
        parts += [f"## {markdown_escaped(heading)}\n", *([f"{markdown_escaped(note)}\n"] if note else [])]
        parts.append(table.markdown())
    parts += ["## Runs\n"] if best else []
    parts.append(study.table(columns).markdown())
    if averages := study.averages(study.shown_columns(costs=False)):
        parts += [f"## {markdown_escaped(study.averages_title())}\n", averages.markdown()]
    if measured := study.measured():
        parts += ["## How it was measured\n", Lines(measured).markdown()]
    return "\n".join(parts)


def text(study: Study) -> str:
    """The same for the terminal, where the metric stands beside the options: other columns may follow far below."""
    columns = sorted(study.shown_columns(), key=lambda name: name != study.metric)
    unfinished = any(run.status != "done" for run in study.runs)
    title = [study.question] if study.question else []
    shared = [f"All jobs: {' '.join(study.shared())}"] if study.shared() else []
    remarks = [*shared, *(line for line in study.remarks() if not line.startswith("Bold"))]
    parts = ["".join(wrapped(line, "") for line in (*title, study.counts(), *remarks))]
    best = _best(study)
    parts += [f"{heading}\n{wrapped(note, '  ') if note else ''}{table.text()}" for heading, note, table in best]
    runs = study.table(columns, status=unfinished)
    left = len(runs.rows) - MOST_RUNS
    more = f"  and {left} more, in summary.md and report.html\n" if left > 0 else ""
    parts.append(("Runs\n" if best else "") + replace(runs, rows=runs.rows[:MOST_RUNS]).text() + more)
    if averages := study.averages(study.shown_columns(costs=False)):
        parts.append(f"{study.averages_title()}\n{averages.text()}")
    if measured := study.measured():
        parts.append(f"How it was measured\n{Lines(measured).text()}")
    return "\n".join(parts)


def _best(study: Study) -> list[tuple[str, str, Table]]:
    """Who is best, each with a title and a note: where last models differ, whichever model was a run's last."""
    if leaderboard.is_mixed(study):
        boards = leaderboard.leaderboards(study)
        several = len(boards) > 1
        return [(b.title(several=several), b.note, leaderboard.table(study, b)) for b in boards if b.tells]
    best = winners.table(study)
    return [(winners.title(study), "", best)] if best else []


def latex(study: Study) -> str:
    """A ``table`` for each table, to be read with ``\\input``; needs the package booktabs."""
    columns = study.shown_columns(costs=False)
    unique = len(study.groups(study.options)) == len(study.runs)
    unfinished = any(run.status != "done" for run in study.runs)
    table = study.table(columns, job=not unique, status=unfinished, reasons=False)
    caption = study.question or study.counts()
    parts = ["% Needs \\usepackage{booktabs}\n", _latex_float(study, caption, "", table)]
    if averages := study.averages(columns):
        parts.append(_latex_float(study, f"{caption} {study.averages_title()}.", "-averaged", averages))
    return "\n".join(parts)


def _latex_float(study: Study, caption: str, label: str, table: Table) -> str:
    below = [line for line in study.remarks() if line.startswith("Dense model")] + study.measured(costs=False)
    note = "; ".join(latex_escaped(line) for line in below)
    name = "".join(character if character.isalnum() else "-" for character in study.name)
    lines = [
        "\\begin{table}",
        "\\centering",
        "\\small",
        f"\\caption{{{latex_escaped(caption)}}}",
        f"\\label{{tab:{name}{label}}}",
        table.latex().rstrip(),
        *(["", "\\smallskip", f"\\parbox{{\\linewidth}}{{\\footnotesize {note}.}}"] if note else []),
        "\\end{table}",
    ]
    return "".join(f"{line}\n" for line in lines)


def values(study: Study) -> tuple[list[str], list[list[Any]]]:
    """Columns and a row for each run, in full precision; None where there is no value."""
    numbers = study.columns if study.chosen is None else study.shown_columns()
    uncertain = {name for found in study.numbers for name, number in found.items() if number.stderr is not None}
    head = ["job", "status", "reason", *study.options]
    for name in numbers:
        head += [name, f"{name} stderr"] if name in uncertain else [name]
    rows = []
    for i, run in enumerate(study.runs):
        row: list[Any] = [run.job, run.status, run.reason or None, *(run.option(name) for name in study.options)]
        for name in numbers:
            number = study.numbers[i].get(name)
            row.append(None if number is None else number.value)
            row += [None if number is None else number.stderr] if name in uncertain else []
        rows.append([*row, str(run.path)])
    return [*head, "path"], rows


def csv(study: Study) -> str:
    """`values` for programs."""
    return csv_text(*values(study))
