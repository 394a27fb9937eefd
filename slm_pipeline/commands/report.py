"""``slm-report``: tables, plots and one page on a run, a study, several studies, or any folder with runs below it.

slm-report outputs/sweeps/thresholds/TIME
slm-report outputs/sweeps/ratios/TIME outputs/sweeps/methods/TIME --x layers --series method --out report
slm-report outputs                                  all there is: the best at each size of each model
slm-report outputs/runs --sort-by "average recovered" --format csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slm_pipeline.cli import errors_in_one_line
from slm_pipeline.commands.arguments import parsed
from slm_pipeline.config import plugins
from slm_pipeline.errors import UserError
from slm_pipeline.jobs.job import check_output_root
from slm_pipeline.report.analyses import read_analyses
from slm_pipeline.report.study import read_study
from slm_pipeline.report.write import FORMATS, write_report


def main() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(
        prog="slm-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a run, a sweep, or a tree of them")
    parser.add_argument("--sort-by", metavar="COLUMN", help="the best run first; or an option, in its order")
    parser.add_argument("--metric", metavar="COLUMN", help="the number that answers the study's question")
    parser.add_argument("--x", metavar="COLUMN_OR_OPTION", help="what the metric is drawn against")
    parser.add_argument("--series", type=_names, metavar="OPTION,...", help="options whose values name the curves")
    parser.add_argument("--columns", type=_names, metavar="COLUMN,...", help="the numbers to show; default: all")
    parser.add_argument(
        "--format",
        type=_names,
        metavar="md,csv,latex,html",
        default=list(FORMATS),
        help="default: all; html draws plots",
    )
    parser.add_argument(
        "--plugins", type=_names, metavar="PACKAGE,...", default=[], help="packages whose plots are drawn too"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: DIR; for one run DIR/report; for several DIRs ./report"
    )
    given = parsed(parser)
    with errors_in_one_line():
        if unknown := [name for name in given.format if name not in FORMATS]:
            raise UserError(f"--format: {unknown[0]!r} is not one of {', '.join(FORMATS)}")
        plugins.use(given.plugins)
        study = read_study(
            *given.directories,
            metric=given.metric,
            x=given.x,
            series=given.series,
            sort_by=given.sort_by,
            columns=given.columns,
        )
        out = given.out or _default_out(given.directories, [run.path for run in study.runs])
        check_output_root(str(out), option="--out")
        written = write_report(study, out, given.format, read_analyses(*given.directories))
        print(written.text)
        pictures = [path for path in written.files if path.parent != out]
        for path in written.files:
            if path not in pictures and path.suffix != ".html":
                print(f"wrote {path}")
        if pictures:
            print(f"wrote {len(pictures)} pictures into {out / 'plots'}")
        if "html" in given.format:
            print(f"wrote {out / 'report.html'}: the page, to be opened in a browser")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _default_out(directories: list[Path], runs: list[Path]) -> Path:
    """A run keeps its own summary.md."""
    if len(directories) > 1:
        return Path("report")
    return directories[0] / "report" if runs == directories else directories[0]


if __name__ == "__main__":
    main()
