"""One run: summary.md, and the same as text for the terminal. Reads JSON only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slm_pipeline.results.columns import change, perplexity
from slm_pipeline.results.measurement import (
    Summary,
    corpus_labels,
    measurement,
    metrics_of,
    parameters_at_work,
    small_limit,
    standard_errors,
    task_details,
)
from slm_pipeline.show.numerals import count
from slm_pipeline.show.tables import Lines, Table, code_block, in_order, markdown_escaped, wrapped
from slm_pipeline.store.files import write_text
from slm_pipeline.surgery.changes import Changes
from slm_pipeline.surgery.plan import format_fit, format_groups


def write_summary_md(run_dir: Path, summary: Summary) -> str:
    """Write ``<run_dir>/summary.md``.

    Args:
        run_dir: the run's folder, with whatever it already holds (plan.json, W&B files).
        summary: the content of summary.json.

    Returns:
        The same for the terminal: plain text in lines of at most `WIDTH` columns, save for paths that are longer. It
        leaves out the score-by-score table and the command, and shows paths from the working directory.
    """
    title, counts = _headline(summary)
    sections = _sections(summary, run_dir, str)
    columns, scores = score_table(summary)
    sections["Scores one by one"] = Table(columns, [[_cell(value) for value in row] for row in scores])
    parts = [f"# {markdown_escaped(title)}\n", f"{counts}\n"]
    parts += [f"## {name}\n\n{body.markdown()}" for name, body in sections.items() if body]
    parts += [f"## Command\n\n{code_block(summary['command'], 'bash')}"]
    write_text(run_dir / "summary.md", "\n".join(parts))

    parts = [wrapped(title, "") + wrapped(counts, "")]
    parts += [f"{name}\n{body.text()}" for name, body in _sections(summary, run_dir, _from_here).items() if body]
    return "\n".join(parts)


def score_table(summary: Summary) -> tuple[list[str], list[list[Any]]]:
    """Every zero-shot score with its standard error (both in percent, None if unknown), as columns and rows."""
    rows = [
        [target, task, found["score"], found["stderr"], found["metric"], found["num_examples"]]
        for target in metrics_of(summary)
        for task, found in task_details(summary, target).items()
    ]
    return ["model", "task", "score", "stderr", "metric", "examples"], rows


def _headline(summary: Summary) -> tuple[str, str]:
    threshold = f", threshold {summary['threshold']:g}" if summary.get("threshold") is not None else ""
    title = f"{summary['name']}: {summary['model']}, {summary['method']}{threshold}, seed {summary['seed']}"
    if "num_layers" not in summary:
        return title, "nothing merged in this run"
    layers, parameters, at_work = summary["num_layers"], summary["parameters"], parameters_at_work(summary)
    working = {"dense": parameters["dense"], "pruned": at_work}
    return title, (
        f"layers {layers['dense']} -> {layers['pruned']} ({change(layers)}), parameters"
        f" {count(parameters['dense'])} -> {count(parameters['pruned'])} ({change(parameters)})"
        + (f", {count(at_work)} of them at work ({change(working)})" if at_work < parameters["pruned"] else "")
    )


def _sections(summary: Summary, run_dir: Path, shown: Callable[[Path], str]) -> dict[str, Table | Lines]:
    """Title and content in reading order; empty where the run has nothing to say."""
    return {
        "Results (scores in percent, perplexity: lower is better)": _result_table(summary),
        "How it was measured": Lines([*measurement(summary), *small_limit([summary])]),
        "Efficiency": _efficiency_table(summary),
        "Layers (braces: merged into one)": Lines(_layers(summary)),
        "Recovery": Lines(_recovery(summary)),
        "Stages": _stage_table(summary, shown),
        "Warnings": Lines(summary["warnings"]),
        "Files": Lines(_files(summary, run_dir, shown)),
    }


def _result_table(summary: Summary) -> Table:
    """A row for each model, and below it the standard errors of its scores."""
    metrics = metrics_of(summary)
    tasks = in_order(task for found in metrics.values() for task in found.get("zero_shot", {}))
    corpora = in_order(corpus for found in metrics.values() for corpus in found.get("perplexity", {}))
    rows = []
    for target, found in metrics.items():
        scores, perplexities = found.get("zero_shot", {}), found.get("perplexity", {})
        row = [f"{scores[task]:.1f}" if task in scores else "" for task in tasks]
        row += [perplexity(perplexities[corpus]["perplexity"]) if corpus in perplexities else "" for corpus in corpora]
        rows.append([target, *row])
        if errors := standard_errors(summary, target):
            row = [f"+-{errors[task]:.1f}" if task in errors else "" for task in tasks]
            rows.append(["", *row, *("" for _ in corpora)])
    return Table(["model", *tasks, *(f"perplexity {label}" for label in corpus_labels(corpora).values())], rows)


def _efficiency_table(summary: Summary) -> Table:
    measured = summary.get("efficiency", {})
    names = ("latency_seconds", "tokens_per_second", "weights_gb", "peak_memory_gb")
    rows = [
        [target, *("" if found[name] is None else f"{found[name]:.4g}" for name in names)]
        for target, found in measured.items()
    ]
    return Table(["model", "latency in s", "tokens per s", "weights in GB", "peak memory in GB"], rows)


def _layers(summary: Summary) -> list[str]:
    if "layer_groups" not in summary:
        return []
    lines = [format_groups(summary["layer_groups"])]
    if summary["dropped"]:
        lines.append("dropped: " + ", ".join(map(str, summary["dropped"])))
    lines += Changes.of(summary).lines
    if "fit" in summary:
        lines.append(f"linear map in their place: {format_fit(summary['fit'])}")
    if not summary.get("threshold_is_highest", True):
        lines.append(
            f"threshold {summary['threshold']:g} reaches the pruning ratio, but a higher one may too:"
            " threshold.exhaustive=true finds out"
        )
    return lines


def _recovery(summary: Summary) -> list[str]:
    found = summary.get("recovery")
    if found is None:
        return []
    numbers = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    shown = (f"{name.replace('_', ' ')} {v if isinstance(v, int) else format(v, '.4g')}" for name, v in numbers.items())
    return [f"{found['name']}: " + ", ".join(shown)]


def _stage_table(summary: Summary, shown: Callable[[Path], str]) -> Table:
    rows = [
        [
            stage,
            f"{found['seconds']:.1f}",
            "yes" if found["reused"] else "no",
            f"{found['peak_memory_gb']:.2f}",
            shown(Path(found["path"])),
        ]
        for stage, found in summary["stages"].items()
    ]
    return Table(["stage", "seconds", "reused", "peak GB", "path"], rows)


def _files(summary: Summary, run_dir: Path, shown: Callable[[Path], str]) -> list[str]:
    lines = [f"checkpoint: {shown(Path(summary['checkpoint']))}"] if summary.get("checkpoint") else []
    lines += [f"plan: {shown(run_dir / 'plan.json')}"] if (run_dir / "plan.json").exists() else []
    lines += [f"pictures: {', '.join(summary['pictures'])}"] if summary["pictures"] else []
    lines += [f"W&B: wandb sync {shown(path)}" for path in sorted(run_dir.glob("wandb/offline-run-*"))]
    lines += [f"W&B: {shown(path)}" for path in sorted(run_dir.glob("wandb/run-*"))]
    return [*lines, f"all of it: {shown(run_dir)}"]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _from_here(path: Path) -> str:
    """The path from the working directory, if it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
