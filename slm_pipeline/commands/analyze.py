"""``slm-analyze``: look at a model without changing it; writes numbers and a picture, never a checkpoint.

slm-analyze dynamic-skip                                      how few layers would do, chosen for each sequence
slm-analyze dynamic-skip model=llama2_7b --tolerance 0.01 --plan plan.json
slm-analyze similarity --tasks all --plan plan.json           how alike layers are, and where a plan merged them
slm-analyze painters                                          middle layers skipped, repeated, reversed, in parallel

slm-analyze ANALYSIS --help lists what an analysis takes; model and text are chosen as for slm.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from slm_pipeline.analysis.token_metrics import TOKEN_METRICS
from slm_pipeline.cli import VERSION, errors_in_one_line
from slm_pipeline.config import CalibrationConfig
from slm_pipeline.data import calibration, corpora
from slm_pipeline.data.tasks import task_fingerprint, task_source
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.zero_shot import TASKS
from slm_pipeline.jobs import command_line
from slm_pipeline.jobs.job import Job, check_output_root
from slm_pipeline.store.files import write_json
from slm_pipeline.surgery.plan import Plan, merged_windows

if TYPE_CHECKING:
    from torch import Tensor

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

    def add_plans(self, what: str) -> None:
        self.add_argument(
            "--plan", type=Path, action="append", default=[], dest="plans", metavar="PATH", help=f"a plan.json {what}"
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
    parser.add_plans("to compare with")
    options = parser.parse_intermixed_args(words)
    if not 0 <= options.tolerance < math.inf:
        raise UserError(f"--tolerance={options.tolerance} must be a number of at least 0")
    job, plans, out = _prepare("dynamic-skip", options, num_samples=32, predicts=True)

    from slm_pipeline.analysis import dynamic_skip as analysis
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.show import pictures

    model, tokenizer = load_dense(job.source)
    samples = job.calibration.sample(tokenizer)
    losses, plan_losses = analysis.measure(ModelView(model), samples.input_ids, list(plans.values()))
    found = analysis.summarize(losses, plan_losses, plans, options.tolerance)
    text, about = _calibration_text(job.config.calibration, samples)
    write_json(out / "dynamic_skip.json", _header("dynamic-skip", words, job) | {"calibration": text} | found)
    about = f"{job.source.name}, {about}"
    written = [out / "dynamic_skip.json", *pictures.dynamic_skip(found, out / "dynamic_skip", title=about)]
    _print(f"{about}, {job.config.model.dtype}", analysis.report(found), written)


def similarity(words: list[str]) -> None:
    """Write similarity.json and pictures of each metric's maps, print the tables."""
    parser = _Parser(
        "similarity",
        "How alike the outputs of every two layers are on each text, and the runs of alike layers (patches). "
        "Default text: calibration.num_samples=64 calibration.seq_len=128.",
    )
    parser.add_argument(
        "--metric", default="cosine,cka", metavar="NAMES", help="of cosine,cka (default: both), or a plugin's"
    )
    parser.add_argument("--estimator", default="unbiased", help="CKA: unbiased (default), biased or official")
    parser.add_argument("--kernel", default="linear", help="CKA: linear (default) or rbf")
    parser.add_argument("--bandwidth", type=float, default=1.0, help="rbf: so many median distances (default 1)")
    parser.add_argument(
        "--features", default="mean_pooled", help="CKA, what a row is: mean_pooled (default), tokens or flattened"
    )
    parser.add_argument("--minibatch", type=int, help="CKA: rows at a time (default 64; 256 tokens)")
    parser.add_argument("--raw", action="store_true", help="CKA: do not scale each token's state to length 1 first")
    parser.add_argument("--sources", metavar="NAMES", help="calibration sources (default: that of calibration=)")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help="one more text, a file")
    parser.add_argument("--tasks", metavar="NAMES", help="zero-shot tasks (evaluation.data), or all")
    parser.add_argument("--limit", type=int, default=64, help="the first so many examples of a task (default 64)")
    parser.add_argument(
        "--per-option",
        action="store_true",
        help="a text for each answer option, as lm-eval scores them and the paper measured; such rows are not"
        " independent (default: a text for each example, with all its options)",
    )
    parser.add_argument("--max-tokens", type=int, default=512, help="examples are cut to so many (default 512)")
    parser.add_argument("--num-patches", type=int, help="of each map (default: as many as fit it best)")
    parser.add_plans("whose merged and dropped layers are drawn on the maps")
    options = parser.parse_intermixed_args(words)
    command_line.use_plugins(options.overrides)
    metrics = _names("--metric", options.metric, (*TOKEN_METRICS, "cka"))
    tasks = list(TASKS) if options.tasks == "all" else _names("--tasks", options.tasks, tuple(TASKS))
    for option, least in (("limit", 1), ("max-tokens", 1), ("num-patches", 1)):
        _at_least(options, option, least)
    of_cka = ("estimator", "kernel", "bandwidth", "features", "minibatch", "raw")
    _refuse_idle(parser, options, of_cka, "--metric cka", idle="cka" not in metrics)
    _refuse_idle(parser, options, ("bandwidth",), "--kernel rbf", idle=options.kernel != "rbf")
    _refuse_idle(parser, options, ("limit", "per-option", "max-tokens"), "--tasks", idle=not tasks)
    if not 0 < options.bandwidth < math.inf:
        raise UserError(f"--bandwidth={options.bandwidth} must be a number above 0")
    job, plans, out = _prepare("similarity", options, num_samples=64)
    depth = job.source.num_layers
    if depth and (options.num_patches or 1) > depth:
        raise UserError(f"--num-patches={options.num_patches} must be in 1..{depth}, the model's layers")
    sources = _calibration_sources(options, job)
    for task in tasks:
        task_source(job.evaluation.options.data, task, job.data_dir)  # fetches what is bundled
        task_fingerprint(job.evaluation.options.data, task, job.data_dir)  # looks at the rows of a folder

    from slm_pipeline.analysis import cka
    from slm_pipeline.analysis import similarity as analysis
    from slm_pipeline.models.loading import load_dense, load_dense_tokenizer
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.show import heat_maps

    _names("--estimator", options.estimator, cka.ESTIMATORS, one=True)
    _names("--kernel", options.kernel, cka.KERNELS, one=True)
    _names("--features", options.features, analysis.FEATURES, one=True)
    _at_least(options, "minibatch", cka.LEAST_ROWS[options.estimator])
    if options.estimator == "official" and (options.kernel == "rbf" or not options.raw):
        raise UserError(
            "--estimator=official cuts HSIC to whole numbers, which leaves nothing of those below 1: add --raw, keep"
            " --kernel linear"
        )
    settings = analysis.Settings(
        metrics=tuple(metrics),
        features=options.features,
        minibatch=options.minibatch or analysis.MINIBATCH[options.features],
        estimator=options.estimator,
        kernel=options.kernel,
        bandwidth_factor=options.bandwidth,
        unit_length=not options.raw,
    )
    tokenizer = load_dense_tokenizer(job.source)
    texts = [analysis.calibration_text(name, text, tokenizer, job.data_dir) for name, text in sources.items()]
    texts += [
        analysis.task_text(
            task,
            tokenizer,
            data=job.evaluation.options.data,
            data_dir=job.data_dir,
            limit=options.limit,
            per_option=options.per_option,
            max_tokens=options.max_tokens,
        )
        for task in tasks
    ]
    for text in texts:
        analysis.check_rows(text, settings)
    view = ModelView(load_dense(job.source)[0])
    measured = {text.name: analysis.measure(view, text, settings) for text in texts}
    found = analysis.summarize({name: maps for name, (maps, _) in measured.items()}, plans, options.num_patches)
    about = {text.name: {**text.about, **measured[text.name][1]} for text in texts}
    header = _header("similarity", words, job)
    write_json(out / "similarity.json", header | {"settings": dataclasses.asdict(settings), "texts": about} | found)
    written = [out / "similarity.json"]
    done = [
        {"name": plan.method, "windows": merged_windows(plan.layer_groups), "dropped": plan.dropped}
        for plan in plans.values()
    ]
    title = f"{job.source.name}, {job.config.model.dtype}"
    for metric in metrics:
        colours = {"metric": metric, "label": analysis.label(metric)}
        panels = [{"title": name, **colours, **maps[metric]} for name, maps in found["maps"].items()]
        about_metric = analysis.describe(metric, settings)
        written += heat_maps.heat_maps(panels, out / metric, title=f"{title}: {about_metric}", plans=done)
    lines = [f"{name}: {analysis.describe_counts(counts)}" for name, (_, counts) in measured.items()]
    labels = [analysis.describe(metric, settings) for metric in metrics]
    _print("\n".join([title, *labels, *lines]), analysis.report(found), written)


def painters(words: list[str]) -> None:
    """Write painters.json, .png and .svg, print the table."""
    parser = _Parser(
        "painters",
        "Loss when more and more of the middle layers are skipped, repeated, reversed, shuffled, swapped or run side"
        " by side. Default text: calibration.num_samples=8 calibration.seq_len=128.",
    )
    parser.add_argument("--keep-ends", type=int, default=1, help="layers at each end that stay (default 1)")
    parser.add_argument("--ranges", type=int, default=8, help="at most so many ranges of layers (default 8)")
    parser.add_argument("--loops", type=int, default=3, help="of the looped parallel variant (default 3)")
    parser.add_argument("--orders", type=int, default=3, help="random orders that are averaged (default 3)")
    parser.add_argument(
        "--corpus", metavar="NAME", help="a perplexity corpus (bundled, wikitext2, c4, ptb or a file) for the text"
    )
    options = parser.parse_intermixed_args(words)
    for option, least in (("keep-ends", 0), ("ranges", 1), ("loops", 1), ("orders", 1)):
        _at_least(options, option, least)
    job, _, out = _prepare("painters", options, num_samples=8, predicts=True)
    depth = job.source.num_layers
    if depth and depth - 2 * options.keep_ends < 2:
        raise UserError(f"--keep-ends={options.keep_ends} leaves fewer than 2 of {depth} layers in the middle")
    if options.corpus:
        try:
            corpora.corpus_fingerprint(options.corpus, job.data_dir)
        except UserError as error:
            raise UserError(str(error).replace("evaluation.perplexity.corpora", "--corpus")) from error

    from slm_pipeline.analysis import painters as analysis
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.show import pictures

    model, tokenizer = load_dense(job.source)
    text = job.config.calibration
    if options.corpus:
        input_ids, about = _corpus_windows(options.corpus, text, tokenizer, job)
        place = f"{text.num_samples} x {text.seq_len} tokens of the corpus {options.corpus}"
    else:
        samples = job.calibration.sample(tokenizer)
        input_ids = samples.input_ids
        about, place = _calibration_text(text, samples)
    found = analysis.measure(
        ModelView(model),
        input_ids,
        keep_ends=options.keep_ends,
        num_ranges=options.ranges,
        loops=options.loops,
        orders=options.orders,
        seed=job.config.seed,
    )
    write_json(out / "painters.json", _header("painters", words, job) | {"text": about} | found)
    title = f"{job.source.name}, {place}"
    written = [out / "painters.json", *pictures.painters(found, out / "painters", title=title)]
    _print(f"{title}, {job.config.model.dtype}", analysis.report(found), written)


def _prepare(
    analysis: str, options: argparse.Namespace, *, num_samples: int, predicts: bool = False
) -> tuple[Job, dict[str, Plan], Path]:
    """The job, the plans by path, and the folder for the results, all checked.

    Args:
        num_samples: default of calibration.num_samples; of 128 tokens.
        predicts: whether the next token is predicted.
    """
    plans = {str(path): Plan.read(path) for path in getattr(options, "plans", [])}
    defaults = [*_DEFAULTS, f"calibration.num_samples={num_samples}", "calibration.seq_len=128"]
    job = command_line.compose_job(["slm-analyze", analysis], options.overrides, defaults)
    if predicts and job.config.calibration.seq_len < 2:
        raise UserError("calibration.seq_len=1 leaves no token to predict; it must be at least 2")
    for path, plan in plans.items():
        plan.check_model(job.source, path)
    out = (options.out or Path(job.config.output_dir) / "analysis" / analysis.replace("-", "_")).expanduser()
    check_output_root(str(out), option="--out")
    return job, plans, out


def _calibration_sources(options: argparse.Namespace, job: Job) -> dict[str, CalibrationConfig]:
    """The calibration texts that are asked for, by name, checked."""
    configured = job.config.calibration
    names = _names("--sources", options.sources, calibration.SOURCES) or [configured.source]
    found = {
        name: configured if name == configured.source else dataclasses.replace(configured, source=name, path=None)
        for name in names
    }
    for file in map(str, options.text):
        found[file] = dataclasses.replace(configured, source="text_file", path=file)
    for text in found.values():
        calibration.Calibration(text, job.data_dir).check(job)
    return found


def _calibration_text(config: CalibrationConfig, samples: calibration.Samples) -> tuple[dict[str, Any], str]:
    """What the samples are, as JSON and in words."""
    values = {
        "source": config.source,
        "mode": samples.mode,
        "num_samples": config.num_samples,
        "seq_len": config.seq_len,
        "seed": config.seed,
        "fingerprint": samples.fingerprint,
    }
    return values, f"{config.num_samples} x {config.seq_len} tokens of {config.source}"


def _corpus_windows(corpus: str, size: CalibrationConfig, tokenizer: Any, job: Job) -> tuple[Tensor, dict[str, Any]]:
    """The first num_samples x seq_len tokens of a perplexity corpus, cut in order; and what they are, as JSON."""
    needed = size.num_samples * size.seq_len
    tokens, about = corpora.corpus_tokens(
        tokenizer, corpus, window=size.seq_len, max_tokens=needed, data_dir=job.data_dir
    )
    if len(tokens) < needed:
        raise UserError(
            f"--corpus={corpus} has {len(tokens)} tokens; calibration.num_samples={size.num_samples} x"
            f" calibration.seq_len={size.seq_len} needs {needed}"
        )
    windows = tokens.view(size.num_samples, size.seq_len)
    return windows, {"corpus": corpus, **about, "num_samples": size.num_samples, "seq_len": size.seq_len}


def _names(option: str, text: str | None, allowed: Sequence[str], *, one: bool = False) -> list[str]:
    """The names in a list with commas, each once."""
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    wrong = [name for name in names if name not in allowed]
    if wrong or (one and len(names) != 1) or (text is not None and not names):
        raise UserError(f"{option}={text}: {'choose one' if one else 'choose'} of {', '.join(allowed)}")
    return names


def _at_least(options: argparse.Namespace, option: str, least: int) -> None:
    value = getattr(options, option.replace("-", "_"))
    if value is not None and value < least:
        raise UserError(f"--{option}={value} must be at least {least}")


def _refuse_idle(
    parser: _Parser, options: argparse.Namespace, names: Sequence[str], needed: str, *, idle: bool
) -> None:
    for name in names:
        key = name.replace("-", "_")
        if idle and getattr(options, key) != parser.get_default(key):
            raise UserError(f"--{name} does nothing without {needed}")


def _header(analysis: str, words: Sequence[str], job: Job) -> dict[str, Any]:
    """How every analysis's JSON begins."""
    return {
        "format": 1,
        "command": shlex.join(["slm-analyze", analysis, *words]),
        "model": {"name": job.source.name, "fingerprint": job.source.fingerprint, "dtype": job.config.model.dtype},
    }


def _print(title: str, report: str, written: Sequence[Path]) -> None:
    print(f"{title}\n\n{report}\nwritten: {', '.join(map(str, written))}")


ANALYSES: dict[str, Callable[[list[str]], None]] = {
    "dynamic-skip": dynamic_skip,
    "similarity": similarity,
    "painters": painters,
}


def main() -> None:
    """Console entry point."""
    name, *words = sys.argv[1:] or [""]
    if name in ("", "-h", "--help"):
        print(__doc__)
        sys.exit(0 if name else 2)
    if name == "--version":
        print(VERSION)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_in_one_line():
        if name not in ANALYSES:
            raise UserError(f"unknown analysis {name!r}; there is: {', '.join(ANALYSES)}")
        ANALYSES[name](words)


if __name__ == "__main__":
    main()
