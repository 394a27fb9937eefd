"""``slm-analyze``: look at a model without changing it; writes numbers and a picture, never a checkpoint.

slm-analyze dynamic-skip                                      how few layers would do, chosen for each sequence
slm-analyze dynamic-skip model=llama2_7b analysis.tolerance=0.01 analysis.plans=[plan.json]
slm-analyze similarity analysis.tasks=all                     how alike layers are, on each text
slm-analyze painters                                          middle layers skipped, repeated, reversed, in parallel

Options are written as for slm, and those of model and text are the same; slm-analyze ANALYSIS --help lists an
analysis's own. Each result has a folder of its own, OUTPUT_DIR/analysis/ANALYSIS/MODEL/TIME or hydra.run.dir=FOLDER.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.analysis.options import PREFIX, DynamicSkip, Options, Painters, Similarity, help_page, read
from slm_pipeline.analysis.token_metrics import TOKEN_METRICS
from slm_pipeline.cli import VERSION, errors_in_one_line
from slm_pipeline.commands.arguments import answer_shell, help_text
from slm_pipeline.config import CalibrationConfig
from slm_pipeline.config.overrides import parse_overrides
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


def dynamic_skip(words: list[str]) -> None:
    """Write dynamic_skip.json, .png and .svg, print the table. ``words`` is the command line after the analysis."""
    options, overrides = _read(DynamicSkip, "dynamic-skip", words)
    job, plans, out = _prepare("dynamic-skip", overrides, options.plans, num_samples=32, predicts=True)

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
    options, overrides = _read(Similarity, "similarity", words)
    command_line.use_plugins(overrides)
    metrics = _names("metrics", options.metrics, (*TOKEN_METRICS, "cka"))
    tasks = list(TASKS) if options.tasks == ["all"] else _names("tasks", options.tasks, tuple(TASKS), some=False)
    of_cka = ("estimator", "kernel", "bandwidth", "features", "minibatch", "raw")
    _refuse_idle(options, of_cka, "analysis.metrics=cka", idle="cka" not in metrics)
    _refuse_idle(options, ("bandwidth",), "analysis.kernel=rbf", idle=options.kernel != "rbf")
    _refuse_idle(options, ("limit", "per_option", "max_tokens"), "analysis.tasks", idle=not tasks)
    job, plans, out = _prepare("similarity", overrides, options.plans, num_samples=64)
    depth = job.source.num_layers
    if depth and (options.num_patches or 1) > depth:
        raise UserError(f"analysis.num_patches={options.num_patches} must be in 1..{depth}, the model's layers")
    sources = _calibration_sources(options, job)
    for task in tasks:
        task_source(job.evaluation.options.data, task, job.data_dir)  # fetches what is bundled
        task_fingerprint(job.evaluation.options.data, task, job.data_dir)  # looks at the rows of a folder

    from slm_pipeline.analysis import cka
    from slm_pipeline.analysis import similarity as analysis
    from slm_pipeline.models.loading import load_dense, load_dense_tokenizer
    from slm_pipeline.models.view import ModelView
    from slm_pipeline.show import heat_maps

    for name, allowed in (("estimator", cka.ESTIMATORS), ("kernel", cka.KERNELS), ("features", analysis.FEATURES)):
        _names(name, [getattr(options, name)], allowed)
    if options.minibatch is not None and options.minibatch < (least := cka.LEAST_ROWS[options.estimator]):
        raise UserError(f"analysis.minibatch={options.minibatch} must be at least {least}")
    if options.estimator == "official" and (options.kernel == "rbf" or not options.raw):
        raise UserError(
            "analysis.estimator=official cuts HSIC to whole numbers, which leaves nothing of those below 1: add"
            " analysis.raw=true, keep analysis.kernel=linear"
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
    options, overrides = _read(Painters, "painters", words)
    job, _, out = _prepare("painters", overrides, (), num_samples=8, predicts=True)
    depth = job.source.num_layers
    if depth and depth - 2 * options.keep_ends < 2:
        raise UserError(f"analysis.keep_ends={options.keep_ends} leaves fewer than 2 of {depth} layers in the middle")
    if options.corpus:
        try:
            corpora.corpus_fingerprint(options.corpus, job.data_dir)
        except UserError as error:
            raise UserError(str(error).replace("evaluation.perplexity.corpora", "analysis.corpus")) from error

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


def _read(options: type[Options], analysis: str, words: list[str]) -> tuple[Options, list[str]]:
    """The analysis's own options, and the overrides that are left for the job."""
    program = f"slm-analyze {analysis}"
    if flag := next((word for word in words if word.startswith("-")), None):
        name = flag.lstrip("-").partition("=")[0].replace("-", "_")
        example = (
            f"{PREFIX}{name}=..." if name in {one.name for one in dataclasses.fields(options)} else f"{PREFIX}NAME=..."
        )
        raise UserError(f"{flag}: options are written as for slm, {example}; see {program} --help")
    own = [word for word in words if word.lstrip("+").startswith(PREFIX)]
    return read(options, own, program), [word for word in words if word not in own]


def _prepare(
    analysis: str, overrides: Sequence[str], plan_files: Sequence[str], *, num_samples: int, predicts: bool = False
) -> tuple[Job, dict[str, Plan], Path]:
    """The job, the plans by path, and the folder for the results, all checked.

    Args:
        num_samples: default of calibration.num_samples; of 128 tokens.
        predicts: whether the next token is predicted.
    """
    plans = {path: Plan.read(Path(path)) for path in plan_files}
    defaults = [*_DEFAULTS, f"calibration.num_samples={num_samples}", "calibration.seq_len=128"]
    folder = "hydra.run.dir="
    others = [word for word in overrides if not word.startswith(folder)]
    job = command_line.compose_job(["slm-analyze", analysis], others, defaults)
    if predicts and job.config.calibration.seq_len < 2:
        raise UserError("calibration.seq_len=1 leaves no token to predict; it must be at least 2")
    for path, plan in plans.items():
        plan.check_model(job.source, path)
    given = [str(item.value()) for item in parse_overrides([word for word in overrides if word.startswith(folder)])]
    out = Path(given[-1]).expanduser() if given else _new_folder(job, analysis)
    check_output_root(str(out), option="hydra.run.dir")
    if os.path.lexists(out / f"{_file(analysis)}.json"):
        raise UserError(f"hydra.run.dir={given[-1]} has the result of another analysis; choose a new folder")
    return job, plans, out


def _new_folder(job: Job, analysis: str) -> Path:
    """``<output_dir>/analysis/<analysis>/<model>/<time>``"""
    model = re.sub(r"[^\w.-]+", "_", job.source.name).strip("._-") or "model"
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return Path(job.config.output_dir).expanduser() / "analysis" / _file(analysis) / model[:100] / now


def _file(analysis: str) -> str:
    return analysis.replace("-", "_")


def _calibration_sources(options: Similarity, job: Job) -> dict[str, CalibrationConfig]:
    """The calibration texts that are asked for, by name, checked."""
    configured = job.config.calibration
    names = _names("sources", options.sources, calibration.SOURCES, some=False) or [configured.source]
    found = {
        name: configured if name == configured.source else dataclasses.replace(configured, source=name, path=None)
        for name in names
    }
    for file in options.texts:
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
            f"analysis.corpus={corpus} has {len(tokens)} tokens; calibration.num_samples={size.num_samples} x"
            f" calibration.seq_len={size.seq_len} needs {needed}"
        )
    windows = tokens.view(size.num_samples, size.seq_len)
    return windows, {"corpus": corpus, **about, "num_samples": size.num_samples, "seq_len": size.seq_len}


def _names(option: str, given: Sequence[str], allowed: Sequence[str], *, some: bool = True) -> list[str]:
    """The names, each once. ``some``: there must be one."""
    if [name for name in given if name not in allowed] or (some and not given):
        raise UserError(f"{PREFIX}{option}={','.join(given)}: choose of {', '.join(allowed)}")
    return list(dict.fromkeys(given))


def _refuse_idle(options: Similarity, names: Sequence[str], needed: str, *, idle: bool) -> None:
    for name in names:
        if idle and getattr(options, name) != getattr(Similarity(), name):
            raise UserError(f"{PREFIX}{name} does nothing without {needed}")


def _header(analysis: str, words: Sequence[str], job: Job) -> dict[str, Any]:
    """How every analysis's JSON begins."""
    return {
        "format": 1,
        "command": shlex.join(["slm-analyze", analysis, *words]),
        "model": {"name": job.source.name, "fingerprint": job.source.fingerprint, "dtype": job.config.model.dtype},
    }


def _print(title: str, report: str, written: Sequence[Path]) -> None:
    print(f"{title}\n\n{report}\nwritten: {', '.join(map(str, written))}")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One that there is.

    Attributes:
        run: what does it, with the words of the command line behind its name.
        options: the class of its own options.
        about: what it shows, and its default text.
    """

    run: Callable[[list[str]], None]
    options: type[Any]
    about: str


ANALYSES = {
    "dynamic-skip": Analysis(
        dynamic_skip,
        DynamicSkip,
        "Loss of every sequence with 1, 2, ... evenly spaced layers, and the fewest that each sequence needs.\n"
        "Default text: calibration.num_samples=32 calibration.seq_len=128.",
    ),
    "similarity": Analysis(
        similarity,
        Similarity,
        "How alike the outputs of every two layers are on each text, and the runs of alike layers (patches).\n"
        "Default text: calibration.num_samples=64 calibration.seq_len=128.",
    ),
    "painters": Analysis(
        painters,
        Painters,
        "Loss when more and more of the middle layers are skipped, repeated, reversed, shuffled, swapped or run side\n"
        "by side. Default text: calibration.num_samples=8 calibration.seq_len=128.",
    ),
}


def _may_begin(name: str) -> list[str]:
    """How words after an analysis may begin, for a shell."""
    own = [f"{PREFIX}{option.name}=" for option in dataclasses.fields(ANALYSES[name].options)]
    return [*own, "model=", "calibration=", "seed="]


def main() -> None:
    """Console entry point."""
    answer_shell(ANALYSES, _may_begin)
    name, *words = sys.argv[1:] or [""]
    if name in ("", "-h", "--help"):
        with errors_in_one_line():
            print(help_text(__doc__))
        sys.exit(0 if name else 2)
    if name == "--version":
        print(VERSION)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_in_one_line():
        if name not in ANALYSES:
            raise UserError(f"unknown analysis {name!r}; there is: {', '.join(ANALYSES)}")
        analysis = ANALYSES[name]
        if "-h" in words or "--help" in words:
            print(f"{analysis.about}\n\n{help_page(analysis.options)}\n")
            print("and all of slm's: model=... calibration=... seed=...")
            return
        analysis.run(words)


if __name__ == "__main__":
    main()
