"""The report of a study on disk: tables, plots, and one page with all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError
from slm_pipeline.report import documents
from slm_pipeline.report.analyses import Analysis
from slm_pipeline.report.runs import any_left
from slm_pipeline.report.study import Study, read_study
from slm_pipeline.store.files import write_text

log = logging.getLogger(__name__)

FORMATS = ("md", "csv", "latex", "html")


@dataclass(frozen=True)
class Written:
    """A study's numbers, and the files that were made of them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]  # for each run its values, None where there is none
    files: Sequence[Path]  # the pictures too
    text: str  # for the terminal

    @property
    def pictures(self) -> list[Path]:
        """The PNGs."""
        return [path for path in self.files if path.suffix == ".png"]


def write_summary(directory: Path) -> str:
    """Write ``<directory>/summary.md``, the table of all jobs of a sweep so far, and return it. Draws nothing.

    Raises:
        UserError: there is no run, or it cannot be written.
    """
    text = documents.markdown(read_study(directory))
    write_text(directory / "summary.md", text)
    return text


def write_summary_so_far(directory: Path) -> None:
    """`write_summary` after a job; at most every 5 seconds while jobs are left, perhaps hundreds.

    A table that cannot be written is a warning: the job is done, or has an error of its own to show.
    """
    file = directory / "summary.md"
    try:
        if file.exists() and time.time() - file.stat().st_mtime < 5 and any_left(directory):
            return
        write_summary(directory)
    except Exception as error:
        log.warning("cannot write %s: %s: %s", file, type(error).__name__, error)


def write_study(directory: Path) -> Written:
    """Write the whole report of a sweep into its folder, as its configuration wants it."""
    return write_report(read_study(directory), directory)


def write_report(
    study: Study, out: Path, formats: Sequence[str] = FORMATS, analyses: Sequence[Analysis] = ()
) -> Written:
    """Write summary.md, summary.csv, summary.tex and report.html into ``out``, and the plots into ``out``/plots.

    Args:
        formats: of `FORMATS`; the plots come with html.
        analyses: shown on the page, below the plots.
    """
    columns, rows = documents.values(study)
    texts = {
        "md": ("summary.md", documents.markdown),
        "csv": ("summary.csv", documents.csv),
        "latex": ("summary.tex", documents.latex),
    }
    files = []
    for name, function in (texts[kind] for kind in FORMATS if kind in formats and kind in texts):
        files.append(_write(out / name, function(study)))
    if "html" in formats:
        from slm_pipeline.report import page, per_run, plots

        pictures = [*plots.draw(study, out / "plots"), *per_run.draw(study, out / "plots")]
        files.append(_write(out / "report.html", page.html(study, pictures, analyses)))
        files += [path for picture in pictures for path in picture.files]
    pages = {"md": "summary.md", "html": "report.html"}
    where = " and ".join(name for kind, name in pages.items() if kind in formats) or "the report with --format md"
    return Written(columns, rows, files, documents.text(study, where))


def _write(file: Path, text: str) -> Path:
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    return file
