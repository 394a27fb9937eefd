"""A study as one self-contained HTML page: no network, no other file, and nothing in it can run but its own script.

Here the study becomes plain values; `page.html.j2` says where they stand, `page.js` sorts, filters and groups them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import slm_pipeline
from slm_pipeline.errors import only_warned_about, printable
from slm_pipeline.report.analyses import Analysis
from slm_pipeline.report.leaderboard import PLACES, TIED, Board, label, leaderboards
from slm_pipeline.report.plots import Picture
from slm_pipeline.report.runs import text_of
from slm_pipeline.report.runs_table import (
    MOST_OPTIONS,
    choices_of,
    columns_of,
    groups_of,
    made_with,
    menu_of,
    parts_of,
    row_of,
    short_jobs,
    signed,
)
from slm_pipeline.report.study import Study
from slm_pipeline.results.measurement import small_limit
from slm_pipeline.results.of_run import parameters_at_work
from slm_pipeline.show.dark import with_dark_colors
from slm_pipeline.show.tables import Table

_HERE = Path(__file__).resolve().parent


def html(study: Study, pictures: Sequence[Picture], analyses: Sequence[Analysis] = ()) -> str:
    """The whole page.

    Args:
        pictures: their SVGs are read and become part of the page.
        analyses: what `slm-analyze` left beside the runs, with its pictures.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    columns = columns_of(study)
    boards = leaderboards(study)
    cautions = small_limit(run.summary for run in study.runs if run.summary)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, finalize=_for_people,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    averages = study.averages(sorted(study.shown_columns(costs=False), key=lambda name: name != study.metric))
    return environment.get_template("page.html.j2").render(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=Markup(style),
        script=Markup(script),
        title=study.question or study.name,
        counts=study.counts(),
        cautions=[signed(line) for line in cautions],
        facts=_facts(study),
        boards=[_board(study, board, several=len(boards) > 1) for board in boards if board.tells],
        columns=columns,
        groups=groups_of(columns),
        has_metric=study.metric is not None,
        choices=choices_of(study, columns),
        menu=menu_of(columns),
        rows=[row_of(study, i, columns, name) for i, name in enumerate(short_jobs([run.job for run in study.runs]))],
        averages={"title": signed(study.averages_title()), "table": _readable(averages)} if averages else None,
        plots=_figures(pictures),
        analyses=[{"title": one.title, "command": one.command, "plots": _figures(one.pictures)} for one in analyses],
        notes=[
            ("About these runs", [*_shared(study), *map(signed, study.remarks())]),
            ("How it was measured", [signed(line) for line in study.measured() if line not in cautions]),
            ("Made with", made_with(study.runs)),
        ],
        version=slm_pipeline.__version__,
    )


def _for_people(value: Any) -> Any:
    """Text in one line without control characters; what is markup already stays as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _shared(study: Study) -> list[str]:
    return [f"All jobs: {' '.join(study.shared())}"] if study.shared() else []


def _facts(study: Study) -> list[tuple[str, str, str]]:
    """The best run in large print, unless sizes differ: then there is none."""
    if len(study.winners) != 1 or study.metric is None:
        return []
    winner = study.winners[0]
    best = winner.best.runs[0]
    run, metric = study.runs[best], winner.best.metric
    dense = study.dense.get(f"dense/{metric.quantity}")
    direction = "highest" if metric.higher_is_better else "lowest"
    facts = []
    if len(study.runs) > 1:
        told = [name for name in study.varied if run.option(name) not in (None, "")]
        options = ", ".join(f"{name} {text_of(run.option(name))}" for name in told[:MOST_OPTIONS])
        jobs = job_of(study, winner.best.runs)
        tied = f"; {len(winner.tied)} more that noise does not tell from it" if winner.tied else ""
        facts.append(("Best run", options or f"job {run.job}", f"job {jobs}{tied}"))
    compared = direction if dense is None else f"dense model {dense.shown(dense.value)}"
    facts.append((study.metric, signed(str(metric)), compared))
    summary = run.summary or {}
    for name in ("num_layers", "parameters"):
        if name in summary:
            kind = study.kinds[name]
            was = summary[name]["dense"]
            left = parameters_at_work(summary) if name == "parameters" else summary[name]["pruned"]
            kept = f"of {kind.shown(was)}, {100 * left / was:.1f}% left"
            kept += " at work" if left < summary[name]["pruned"] else ""
            facts.append((kind.unit, kind.shown(left), kept))
    return facts


def _board(study: Study, board: Board, *, several: bool) -> dict[str, Any]:
    repeated = any(len(place.choice.runs) > 1 for size in board.sizes for place in size.places[:PLACES])
    heads = ["size", "", board.quantity, "run", *(["runs"] if repeated else [])]
    numbers = (False, False, True, False, True)
    rows = []
    for size in board.sizes:
        for rank, place in enumerate(size.places[:PLACES], 1):
            choice, first = place.choice, rank == 1
            value, error = parts_of(choice.metric)
            bold = " best" if (first or place.ties) and size.on_front else ""
            cells = [
                _text(size.name if first else "", "size"),
                _text(TIED if place.ties else f"{rank}.", "quiet"),
                _text(value, f"number{bold}", error),
                _text(label(study, choice), f"wide{bold}", f"{choice.metric.target}, job {job_of(study, choice.runs)}"),
                *([_text(str(len(choice.runs)), "number")] if repeated else []),
            ]
            rows.append({"cells": cells, "first": first})
    table = {"heads": [{"text": t, "number": n} for t, n in zip(heads, numbers, strict=False)], "rows": rows}
    return {"title": board.title(several=several), "note": board.note, "table": table}


def job_of(study: Study, runs: Sequence[int]) -> str:
    """What the first is called, and how many more there are."""
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{short_jobs([run.job for run in study.runs])[runs[0]]}{more}"


def _text(text: str, classes: str = "", small: str = "") -> dict[str, str]:
    return {"text": signed(text), "classes": classes, "small": signed(small)}


def _readable(table: Table) -> dict[str, Any]:
    """A table that is only read."""
    flush = [
        all(row[i][:1] in tuple("+-0123456789") or not row[i] for row in table.rows) for i in range(len(table.columns))
    ]
    heads = [{"text": column, "number": number} for column, number in zip(table.columns, flush, strict=True)]
    rows = []
    for i, row in enumerate(table.rows):
        cells = [
            _text(cell, " ".join([*(["number"] if flush[j] else []), *(["best"] if (i, j) in table.bold else [])]))
            for j, cell in enumerate(row)
        ]
        rows.append({"cells": cells, "first": False})
    return {"heads": heads, "rows": rows}


def _figures(pictures: Sequence[Picture]) -> list[dict[str, str]]:
    """Their SVGs as data, or their PNGs where there is no SVG; one that cannot be read is a warning."""
    found = []
    for picture in pictures:
        with only_warned_about(f"no picture {picture.title} on the page"):
            file = min(picture.files, key=lambda path: path.suffix != ".svg")
            if file.suffix == ".svg":
                kind, content = "svg+xml", with_dark_colors(file.read_text(encoding="utf-8")).encode()
            else:
                kind, content = "png", file.read_bytes()
            source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
            found.append({"title": picture.title, "source": source})
    return found
