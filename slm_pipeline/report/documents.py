"""A study as text: Markdown, LaTeX, CSV, and plain for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slm_pipeline.report import leaderboard, winners
from slm_pipeline.report.runs_table import MOST_OPTIONS, ordered_options, short_jobs
from slm_pipeline.report.study import Study
from slm_pipeline.results.measurement import small_limit
from slm_pipeline.show.tables import Lines, Table, code, csv_text, latex_escaped, markdown_escaped, wrapped

MOST_RUNS = 20  # that a terminal shows one by one, and rows of any table there
_MOST_LINES = 8  # remarks there, and reasons why a run is not done
_MOST_BOARDS = 3


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


def text(study: Study, where: str = "summary.md and report.html") -> str:
    """What a person needs on the terminal: what is best, a row for each run of not too many, what failed and why.

    Tables have the columns that fit, unless they were chosen; jobs have short names.

    Args:
        where: the files that have all of it.
    """
    names = short_jobs([run.job for run in study.runs])
    study = replace(study, runs=[replace(run, job=name) for run, name in zip(study.runs, names, strict=True)])
    many = len(study.runs) > MOST_RUNS
    title = [study.question] if study.question else []
    shared = [f"All jobs: {' '.join(study.shared())}"] if study.shared() else []
    remarks = [*shared, *(line for line in study.remarks() if not line.startswith("Bold"))]
    lines = (*title, study.counts(), *_first(remarks, where))
    parts = ["".join(wrapped(line, "") for line in lines)]
    best = _best(study, MOST_RUNS)
    for heading, note, table in best[:_MOST_BOARDS]:
        above = f"{heading}\n{wrapped(note, '  ') if note else ''}"
        parts.append(above + _fitting(table, ["size", "", study.metric or "", "parameters", "run", "runs"], where))
    if len(best) > _MOST_BOARDS:
        others = len(best) - _MOST_BOARDS
        parts.append(f"The best of {others} more models or ways of measuring: {where}\n")
    if not (many and best):
        parts.append(("Runs\n" if best else "") + _runs(study, where))
        if averages := study.averages(study.shown_columns(costs=False)):
            parts.append(f"{study.averages_title()}\n{_fitting(averages, [*study.varied, study.metric or ''], where)}")
    if failed := study.unfinished():
        parts.append(f"Not done\n{Lines(_first(failed, where)).text()}")
    if measured := small_limit(run.summary for run in study.runs if run.summary) if many else study.measured():
        parts.append(f"How it was measured\n{Lines(measured).text()}")
    if many and best:
        parts.append(wrapped(f"All {len(study.runs)} runs, and how they were measured: {where}", ""))
    return "\n".join(parts)


def _runs(study: Study, where: str) -> str:
    """The table of runs, of which the metric stands beside the options."""
    columns = sorted(study.shown_columns(), key=lambda name: name != study.metric)
    unfinished = any(run.status != "done" for run in study.runs)
    table = study.table(columns, status=unfinished, reasons=False)
    if study.chosen is not None:
        return table.text()
    asked = [study.metric or "", study.x or "", study.sort_by or ""]
    first = ["job", "status", *asked, *ordered_options(study)[:MOST_OPTIONS]]
    return _fitting(table, first, where)


def _fitting(table: Table, first: Sequence[str], where: str) -> str:
    """The first rows and the columns that there is room for, and which others there are."""
    fitted, others = replace(table, rows=table.rows[:MOST_RUNS]).fitted(first)
    left = len(table.rows) - len(fitted.rows)
    more = f"  and {left} more: {where}\n" if left else ""
    return fitted.text() + more + (wrapped(f"also in {where}: {', '.join(others)}", "  ") if others else "")


def _first(lines: Sequence[str], where: str) -> list[str]:
    left = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], f"and {left} more: {where}"] if left > 1 else list(lines)


def _best(study: Study, most: int | None = None) -> list[tuple[str, str, Table]]:
    """Who is best, each with a title and a note: where last models differ, whichever model was a run's last.

    Args:
        most: rows; a board that would have more shows the first of each size alone.
    """
    if leaderboard.is_mixed(study):
        boards, found = leaderboard.leaderboards(study), []
        several = len(boards) > 1
        for board in (board for board in boards if board.tells):
            table = leaderboard.table(study, board)
            if most is not None and len(table.rows) > most:
                table = leaderboard.table(study, board, places=1)
            found.append((board.title(several=several), board.note, table))
        return found
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
