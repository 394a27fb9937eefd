"""``slm-analyze``: look at a model without changing it; writes numbers and a picture, never a checkpoint.

slm-analyze dynamic-skip                                      how few layers would do, chosen for each sequence
slm-analyze dynamic-skip model=llama2_7b --tolerance 0.01 --plan plan.json

slm-analyze ANALYSIS --help lists what an analysis takes; model and text are chosen as for slm.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from slm_pipeline import cli
from slm_pipeline.artifacts import write_json
from slm_pipeline.errors import UserError
from slm_pipeline.job import check_output_root
from slm_pipeline.surgery.plan import Plan

_DEFAULTS = ["method=none", "recovery=none", "evaluation=none", "tracker=jsonl"]


class _Parser(argparse.ArgumentParser):
    """Options of one analysis, between Hydra's overrides. A mistake is a `UserError`."""

    def __init__(self, analysis: str, description: str):
        super().__init__(prog=f"slm-analyze {analysis}", description=description, allow_abbrev=False)
        self.add_argument(
            "overrides", nargs="*", metavar="OVERRIDE", help="as for slm: model=... calibration.seq_len=..."
        )
        self.add_argument(
            "--out", type=Path, metavar="FOLDER", help=f"default: <output_dir>/analysis/{analysis.replace('-', '_')}"
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def dynamic_skip(words: list[str]) -> None:
    """Write dynamic_skip.json, .png and .svg, print the table. ``words`` is the command line after the analysis."""
    parser = _Parser(
        "dynamic-skip",
        "Loss of every sequence with 1, 2, ... evenly spaced layers, and the fewest that each sequence needs. "
        "Default text: calibration.num_samples=32 calibration.seq_len=128.",
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="allowed increase of the loss, 0.01: 1%% (default 0)"
    )
    parser.add_argument(
        "--plan",
        type=Path,
        action="append",
        default=[],
        dest="plans",
        metavar="PATH",
        help="a plan.json to compare with",
    )
    options = parser.parse_intermixed_args(words)
    if not 0 <= options.tolerance < math.inf:
        raise UserError(f"--tolerance={options.tolerance} must be a number of at least 0")
    plans = {str(path): Plan.read(path) for path in options.plans}
    defaults = [*_DEFAULTS, "calibration.num_samples=32", "calibration.seq_len=128"]
    job = cli.compose_job(["slm-analyze", "dynamic-skip"], options.overrides, defaults)
    if job.config.calibration.seq_len < 2:
        raise UserError("calibration.seq_len=1 leaves no token to predict; it must be at least 2")
    for path, plan in plans.items():
        plan.check_model(job.source, path)
    out = (options.out or Path(job.config.output_dir) / "analysis" / "dynamic_skip").expanduser()
    check_output_root(str(out), option="--out")

    from slm_pipeline.analysis import dynamic_skip as analysis
    from slm_pipeline.analysis import pictures
    from slm_pipeline.data.calibration import sample
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView

    model, tokenizer = load_dense(job.source)
    samples = sample(job.config.calibration, tokenizer, job.data_dir)
    losses, plan_losses = analysis.measure(ModelView(model), samples.input_ids, list(plans.values()))
    found = analysis.summarize(losses, plan_losses, plans, options.tolerance)
    text = job.config.calibration
    settings = {
        "format": 1,
        "command": shlex.join(["slm-analyze", "dynamic-skip", *words]),
        "model": {"name": job.source.name, "fingerprint": job.source.fingerprint, "dtype": job.config.model.dtype},
        "calibration": {
            "source": text.source,
            "mode": samples.mode,
            "num_samples": text.num_samples,
            "seq_len": text.seq_len,
            "seed": text.seed,
            "fingerprint": samples.fingerprint,
        },
    }
    about = f"{job.source.name}, {text.num_samples} x {text.seq_len} tokens of {text.source}"
    write_json(out / "dynamic_skip.json", settings | found)
    written = [out / "dynamic_skip.json", *pictures.dynamic_skip(found, out / "dynamic_skip", title=about)]
    print(f"{about}, {job.config.model.dtype}\n\n{analysis.report(found)}\nwritten: {', '.join(map(str, written))}")


ANALYSES: dict[str, Callable[[list[str]], None]] = {"dynamic-skip": dynamic_skip}


def main() -> None:
    """Console entry point."""
    name, *words = sys.argv[1:] or [""]
    if name in ("", "-h", "--help"):
        print(__doc__)
        sys.exit(0 if name else 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with cli.errors_in_one_line():
        if name not in ANALYSES:
            raise UserError(f"unknown analysis {name!r}; there is: {', '.join(ANALYSES)}")
        ANALYSES[name](words)


if __name__ == "__main__":
    main()
