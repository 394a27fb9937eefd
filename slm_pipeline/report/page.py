"""A study as one self-contained HTML page: no network, no other file, and nothing in it can run but its own script."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Sequence
from html import escape as html_escaped
from pathlib import Path
from typing import Any

from slm_pipeline.errors import printable
from slm_pipeline.report.plots import Picture
from slm_pipeline.report.runs import Run
from slm_pipeline.report.study import Study, text_of
from slm_pipeline.results.number import parted
from slm_pipeline.results.of_run import parameters_at_work
from slm_pipeline.show.tables import Table, in_order
from slm_pipeline.surgery.plan import format_groups

_HERE = Path(__file__).resolve().parent
_MOST = 12  # columns up to which the tasks are shown one by one from the start


def html(study: Study, pictures: Sequence[Picture]) -> str:
    """The whole page.

    Args:
        pictures: their SVGs are read and become part of the page.
    """
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = study.question or study.name
    body = [
        f"<header><h1>{escape(title)}</h1><p class=quiet>{escape(study.counts())}</p></header>",
        _facts(study),
        _notes(study),
        _section("Runs", _tools(study) + _runs(study)),
    ]
    if averages := study.averages(study.shown_columns(costs=False)):
        body.append(_section(study.averages_title(), _plain(averages)))
    if pictures:
        body.append(_section("Plots", f"<div class=plots>\n{''.join(map(_figure, pictures))}</div>"))
    body.append("<footer>Made by slm-report. A row opens to show a run's command, layers and warnings.</footer>")
    return (
        '<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<meta name=viewport content="width=device-width">\n'
        f'<meta http-equiv=Content-Security-Policy content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n"
        + "\n".join(body)
        + f"\n<script>{script}</script>\n</html>\n"
    )


def escape(text: str) -> str:
    """Plain text for HTML, in one line."""
    return html_escaped(printable(text))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>"


def _notes(study: Study) -> str:
    """What is to be known before the table is read, in small print."""
    remarks = [f"All jobs: {' '.join(study.shared())}"] if study.shared() else []
    remarks += study.remarks()
    parts = [
        f"<section><h2>{title}</h2><ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul></section>"
        for title, lines in (("About these runs", remarks), ("How it was measured", study.measured()))
        if lines
    ]
    return f"<div class=notes>{''.join(parts)}</div>" if parts else ""


def _text(text: str) -> str:
    return escape(text).replace("+-", "\N{PLUS-MINUS SIGN}")


def _facts(study: Study) -> str:
    """The best run in large print."""
    if not study.best_runs or study.metric is None:
        return ""
    best = min(study.best_runs)
    run, metric = study.runs[best], study.numbers[best][study.metric]
    dense = study.dense.get(f"dense/{metric.quantity}")
    direction = "highest" if metric.higher_is_better else "lowest"
    facts = []
    if len(study.runs) > 1:
        options = ", ".join(f"{name} {text_of(run.option(name))}" for name in study.varied)
        facts.append(("Best run", options or f"job {run.job}", f"job {run.job}"))
    compared = direction if dense is None else f"dense model {dense.shown(dense.value)}"
    facts.append((study.metric, str(metric), compared))
    summary = run.summary or {}
    for name in ("num_layers", "parameters"):
        if name in summary:
            kind = study.kinds[name]
            was = summary[name]["dense"]
            left = parameters_at_work(summary) if name == "parameters" else summary[name]["pruned"]
            kept = f"of {kind.shown(was)}, {100 * left / was:.1f}% left"
            kept += " at work" if left < summary[name]["pruned"] else ""
            facts.append((kind.unit, kind.shown(left), kept))
    cells = (
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(note)}</small></dd></div>"
        for name, value, note in facts
    )
    return f"<dl class=facts>{''.join(cells)}</dl>"


def _columns(study: Study) -> list[str]:
    return study.shown_columns(details=True)


def _is_compact(study: Study) -> bool:
    return len(study.options) + len(_columns(study)) > _MOST


def _tools(study: Study) -> str:
    parts = [
        '<label>Filter <input type=search id=filter placeholder="words in any cell"></label>',
        f"<span id=count class=quiet aria-live=polite>{len(study.runs)} of {len(study.runs)} runs</span>",
    ]
    if any(_is_extra(study, name) for name in _columns(study)):
        checked = "" if _is_compact(study) else " checked"
        parts.append(f"<label><input type=checkbox id=details{checked}> tasks one by one and other details</label>")
    return f"<div class=tools>{''.join(parts)}</div>\n"


def _is_extra(study: Study, column: str) -> bool:
    """Whether it shows with the details alone."""
    return study.chosen is None and study.kinds[column].detail and column not in (study.metric, study.sort_by)


def _runs(study: Study) -> str:
    """The sortable table: a body for each run, of its row and of one that opens."""
    columns = _by_model(_columns(study))
    head = ["job", *study.options, *columns, "status"]
    bodies = [_body(study, i, columns, len(head) + 1) for i in range(len(study.runs))]
    compact = " compact" if _is_compact(study) else ""
    return (
        f'<div class=scroll>\n<table class="runs{compact}">\n<thead>{_group_row(study, columns)}'
        f"<tr><th class=opener></th>{''.join(_head(study, name, i + 1) for i, name in enumerate(head))}</tr></thead>\n"
        + "\n".join(bodies)
        + "\n</table>\n</div>"
    )


def _by_model(columns: Sequence[str]) -> list[str]:
    """The columns of a model side by side; before and after them those of none, as they came."""
    of = [parted(name)[0] for name in columns]
    targets = in_order(target for target in of if target)
    first = next((i for i, target in enumerate(of) if target), len(columns))
    plain = [name for name in columns[first:] if not parted(name)[0]]
    grouped = [name for target in targets for name in columns if parted(name)[0] == target]
    return [*columns[:first], *grouped, *plain]


def _group_row(study: Study, columns: Sequence[str]) -> str:
    """Above the columns of a model its name."""
    cells = ["<th></th>"] * (2 + len(study.options))
    for target, members in itertools.groupby(columns, key=lambda name: parted(name)[0]):
        names = list(members)
        plain = sum(not _is_extra(study, name) for name in names)
        if target:  # the script changes the width as details come and go
            now, detail = (plain, not plain) if _is_compact(study) else (len(names), not plain)
            classes = _classes(group=True, detail=detail)
            cells.append(
                f"<th{classes} colspan={now or len(names)} data-compact={plain or len(names)} data-whole={len(names)}>"
                f"<span>{escape(target)}</span></th>"
            )
        else:
            cells += [f"<th{_classes(detail=_is_extra(study, name))}></th>" for name in names]
    return f"<tr>{''.join(cells)}<th></th></tr>\n"


def _classes(**given: bool) -> str:
    names = " ".join(name for name, wanted in given.items() if wanted)
    return f' class="{names}"' if names else ""


def _head(study: Study, name: str, cell: int) -> str:
    number = name in study.columns
    classes = _classes(number=number, metric=name == study.metric, detail=number and _is_extra(study, name))
    first = "descending" if study.is_higher_better(name) else "ascending"
    now = "none"
    if name == study.sort_by:
        now = first
    label = parted(name)[1] if number else name
    return (
        f'<th scope=col{classes} aria-sort={now} data-cell={cell} data-first={first} data-column="{escape(name)}">'
        f'<button type=button title="{escape(name)}: sort">{escape(label)}</button></th>'
    )


def _body(study: Study, i: int, columns: Sequence[str], width: int) -> str:
    run, found = study.runs[i], study.numbers[i]
    cells = ["<td class=opener><button type=button aria-expanded=false aria-label=Details></button></td>"]
    cells.append(_cell(run.job, run.job))
    for name in study.options:
        value = run.option(name)
        cells.append(_cell(text_of(value), "" if value is None else str(value), number=isinstance(value, (int, float))))
    for name in columns:
        is_best = name == study.metric and i in study.best_runs and len(study.runs) > 1
        classes = {"number": True, "detail": _is_extra(study, name), "best": is_best}
        if name in found:
            number = found[name]
            error = "" if number.stderr is None else f" \N{PLUS-MINUS SIGN}{number.shown_error(number.stderr)}"
            small = f"<small>{error}</small>" if error else ""
            shown = escape(number.shown(number.value))
            cells.append(f"<td{_classes(**classes)} data-value={number.value!r}>{shown}{small}</td>")
        else:
            cells.append(f'<td{_classes(**classes)} data-value=""></td>')
    failed = " failed" if run.status in ("FAILED", "unreadable") else ""
    cells.append(f'<td class="state{failed}" data-value="{escape(run.state)}">{escape(run.state)}</td>')
    more = f"<tr class=more hidden><td colspan={width}>{_more(run)}</td></tr>"
    return f"<tbody>\n<tr class=run>{''.join(cells)}</tr>\n{more}\n</tbody>"


def _cell(text: str, value: str, *, number: bool = False) -> str:
    return f'<td{_classes(number=number)} data-value="{escape(value)}">{escape(text)}</td>'


def _more(run: Run) -> str:
    """What a row opens to: the command, the layers, warnings and what took how long."""
    facts: list[tuple[str, str]] = [("folder", f"<code>{escape(str(run.path))}</code>")]
    if run.reason:
        facts.append(("failure", f"<span class=failed>{escape(run.reason)}</span>"))
    summary: Any = run.summary or {}
    if "command" in summary:
        facts.append(("command", f"<code>{escape(summary['command'])}</code>"))
    elif run.overrides:
        facts.append(("overrides", f"<code>{escape(' '.join(run.overrides))}</code>"))
    if "layer_groups" in summary:
        facts.append(("layers", f"<code>{escape(format_groups(summary['layer_groups']))}</code>"))
        if summary.get("dropped"):
            facts.append(("dropped", f"<code>{', '.join(map(str, summary['dropped']))}</code>"))
    if summary.get("warnings"):
        facts.append(("warnings", f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in summary['warnings'])}</ul>"))
    if stages := summary.get("stages"):
        spent = (
            f"<li>{escape(name)}: {stage['seconds']:.1f} s{' (reused)' if stage['reused'] else ''}</li>"
            for name, stage in stages.items()
        )
        facts.append(("stages", f"<ul>{''.join(spent)}</ul>"))
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{content}</dd>' for name, content in facts)}</dl>"


def _plain(table: Table) -> str:
    """A table that is only read."""
    flush = [
        all(row[i][:1] in tuple("+-0123456789") or not row[i] for row in table.rows) for i in range(len(table.columns))
    ]
    head = "".join(
        f"<th scope=col{_classes(number=f)}>{escape(c)}</th>" for c, f in zip(table.columns, flush, strict=True)
    )
    rows = []
    for i, row in enumerate(table.rows):
        cells = (
            f"<td{_classes(number=flush[j], best=(i, j) in table.bold)}>{_text(cell)}</td>"
            for j, cell in enumerate(row)
        )
        rows.append(f"<tbody><tr>{''.join(cells)}</tr></tbody>")
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead>{''.join(rows)}</table></div>"


def _figure(picture: Picture) -> str:
    (svg,) = [path for path in picture.files if path.suffix == ".svg"]
    data = base64.b64encode(svg.read_bytes()).decode()
    return f'<figure><img alt="{escape(picture.title)}" src="data:image/svg+xml;base64,{data}"></figure>\n'
