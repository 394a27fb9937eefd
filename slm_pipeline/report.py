"""Tables that people read: one run as summary.md and on the terminal, many runs as one table. Reads JSON only."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from slm_pipeline.artifacts import write_text
from slm_pipeline.errors import UserError
from slm_pipeline.surgery.plan import format_groups

WIDTH = 100  # columns of the text for the terminal

Summary = Mapping[str, Any]  # what summary.json holds


@dataclass(frozen=True)
class Table:
    """Cells as text. A column of numbers is set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def markdown(self) -> str:
        """A pipe table, aligned in its source too."""
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        widths, right = self._layout(escaped)
        rule = ["-" * (width - 1) + ":" if flush else "-" * width for width, flush in zip(widths, right, strict=True)]
        return "".join(f"| {' | '.join(_pad(row, widths, right))} |\n" for row in (escaped[0], rule, *escaped[1:]))

    def text(self) -> str:
        """Aligned columns; those that do not fit in `WIDTH` follow below, the first column repeated."""
        cells = [list(row) for row in (self.columns, *self.rows)]
        widths, right = self._layout(cells)
        blocks: list[list[int]] = [[0]]
        for column in range(1, len(widths)):
            if len(blocks[-1]) > 1 and sum(widths[i] + 2 for i in [*blocks[-1], column]) > WIDTH:
                blocks.append([0])
            blocks[-1].append(column)
        lines = []
        for block in blocks:
            for row in cells:
                padded = _pad([row[i] for i in block], [widths[i] for i in block], [right[i] for i in block])
                lines.append("  " + "  ".join(padded).rstrip())
        return "".join(f"{line}\n" for line in lines if line.strip())

    @staticmethod
    def _layout(cells: Sequence[Sequence[str]]) -> tuple[list[int], list[bool]]:
        columns = list(zip(*cells, strict=True))
        widths = [max(3, *map(len, column)) for column in columns]
        return widths, [all(cell[0] in "+-0123456789" for cell in column[1:] if cell) for column in columns]


def _pad(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [c.rjust(width) if flush else c.ljust(width) for c, width, flush in zip(row, widths, right, strict=True)]


@dataclass(frozen=True)
class Lines:
    """Some lines, each a fact of its own."""

    lines: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.lines)

    def markdown(self) -> str:
        return "".join(f"- {line}\n" for line in self.lines)

    def text(self) -> str:
        return "".join(_wrapped(line, "  ") for line in self.lines)


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
    parts = [f"# {title}\n", f"{counts}\n"]
    parts += [f"## {name}\n\n{body.markdown()}" for name, body in sections.items() if body]
    parts += [f"## Command\n\n```bash\n{summary['command']}\n```\n"]
    write_text(run_dir / "summary.md", "\n".join(parts))

    parts = [_wrapped(title, "") + _wrapped(counts, "")]
    parts += [f"{name}\n{body.text()}" for name, body in _sections(summary, run_dir, _from_here).items() if body]
    return "\n".join(parts)


def score_table(summary: Summary) -> tuple[list[str], list[list[Any]]]:
    """Every zero-shot score with its standard error (both in percent, None if unknown), as columns and rows."""
    rows = [
        [target, task, found["score"], found["stderr"], found["metric"], found["num_examples"]]
        for target in _metrics(summary)
        for task, found in _task_details(summary, target).items()
    ]
    return ["model", "task", "score", "stderr", "metric", "examples"], rows


def flat_metrics(summary: Summary) -> dict[str, float]:
    """What runs are compared by: ``num_layers``, ``pruned/average``, ``pruned/perplexity/<corpus>`` and the like."""
    flat: dict[str, float] = {}
    for name in ("num_layers", "parameters"):
        if name in summary:
            flat[name] = summary[name]["pruned"]
    for target, found in _metrics(summary).items():
        flat |= {f"{target}/{task}": score for task, score in found.get("zero_shot", {}).items()}
        for corpus, value in found.get("perplexity", {}).items():
            flat[f"{target}/perplexity/{Path(corpus).name}"] = value["perplexity"]
    return flat


def _headline(summary: Summary) -> tuple[str, str]:
    threshold = f", threshold {summary['threshold']:g}" if summary.get("threshold") is not None else ""
    title = f"{summary['name']}: {summary['model']}, {summary['method']}{threshold}, seed {summary['seed']}"
    if "num_layers" not in summary:
        return title, "nothing merged in this run"
    layers, parameters = summary["num_layers"], summary["parameters"]
    return title, (
        f"layers {layers['dense']} -> {layers['pruned']} ({_change(layers)}), parameters"
        f" {_count(parameters['dense'])} -> {_count(parameters['pruned'])} ({_change(parameters)})"
    )


def _sections(summary: Summary, run_dir: Path, shown: Callable[[Path], str]) -> dict[str, Table | Lines]:
    """Title and content in reading order; empty where the run has nothing to say."""
    return {
        "Results (scores in percent, perplexity: lower is better)": _result_table(summary),
        "How it was measured": Lines(_measurement(summary)),
        "Efficiency": _efficiency_table(summary),
        "Layers (braces: merged into one)": Lines(_layers(summary)),
        "Recovery": Lines(_recovery(summary)),
        "Stages": _stage_table(summary, shown),
        "Warnings": Lines(summary["warnings"]),
        "Files": Lines(_files(summary, run_dir, shown)),
    }


def _metrics(summary: Summary) -> Mapping[str, Any]:
    metrics: Mapping[str, Any] = summary.get("metrics", {})
    return metrics


def _task_details(summary: Summary, target: str) -> Mapping[str, Any]:
    scores: Mapping[str, Any] = summary.get("details", {}).get(f"evaluate_{target}", {}).get("zero_shot", {})
    return scores


def _result_table(summary: Summary) -> Table:
    """A row for each model, and below it the standard errors of its scores."""
    metrics = _metrics(summary)
    tasks = _in_order(task for found in metrics.values() for task in found.get("zero_shot", {}))
    corpora = _in_order(corpus for found in metrics.values() for corpus in found.get("perplexity", {}))
    rows = []
    for target, found in metrics.items():
        scores, perplexities = found.get("zero_shot", {}), found.get("perplexity", {})
        row = [f"{scores[task]:.1f}" if task in scores else "" for task in tasks]
        row += [_perplexity(perplexities[corpus]["perplexity"]) if corpus in perplexities else "" for corpus in corpora]
        rows.append([target, *row])
        if errors := _standard_errors(summary, target):
            row = [f"+-{errors[task]:.1f}" if task in errors else "" for task in tasks]
            rows.append(["", *row, *("" for _ in corpora)])
    return Table(["model", *tasks, *(f"perplexity {Path(corpus).name}" for corpus in corpora)], rows)


def _standard_errors(summary: Summary, target: str) -> dict[str, float]:
    """Standard error of each score, and of their average as of independent numbers; in percentage points."""
    details = _task_details(summary, target)
    errors = {task: found["stderr"] for task, found in details.items() if found["stderr"] is not None}
    if errors and len(errors) == len(details):
        errors["average"] = math.sqrt(sum(error**2 for error in errors.values())) / len(errors)
    return errors


def _measurement(summary: Summary) -> list[str]:
    """Settings behind the numbers. Models measured alike share a line; else each line says whose it is."""
    said: dict[str, list[str]] = {}
    for target, found in _metrics(summary).items():
        lines = _zero_shot_settings(_task_details(summary, target))
        lines += [_perplexity_settings(corpus, value) for corpus, value in found.get("perplexity", {}).items()]
        for line in lines:
            said.setdefault(line, []).append(target)
    everyone = list(_metrics(summary))
    lines = [line if targets == everyone else f"{', '.join(targets)}: {line}" for line, targets in said.items()]
    return lines + _efficiency_settings(summary) + _small_limit([summary])


def _zero_shot_settings(details: Mapping[str, Any]) -> list[str]:
    tasks_of: dict[tuple[Any, ...], list[str]] = {}
    for task, found in details.items():
        tasks_of.setdefault((found["lm_eval_version"], found["limit"], found["batch_size"]), []).append(task)
    lines = []
    for (version, limit, batch_size), tasks in tasks_of.items():
        examples = "all examples" if limit is None else f"the first {limit} examples of each task"
        which = "zero-shot" if len(tasks_of) == 1 else f"zero-shot {', '.join(tasks)}"
        lines.append(f"{which}: lm-eval {version}, {examples}, batch size {batch_size}")
    return lines


def _perplexity_settings(corpus: str, found: Mapping[str, Any]) -> str:
    overlap = "not overlapping" if found["stride"] is None else f"the last {found['stride']} tokens of each scored"
    bos = "BOS before each" if found["bos"] else "no BOS"
    split = f" ({found['split']})" if found.get("split") else ""
    tokens = f"{found['num_tokens']} tokens scored"
    return f"perplexity {corpus}{split}: {tokens}, windows of {found['window']} tokens, {overlap}, {bos}"


def _small_limit(summaries: Iterable[Summary]) -> list[str]:
    """Says how far a score on part of a task can be off, so that nobody takes it for the real one."""
    scores = [
        found
        for summary in summaries
        for target in _metrics(summary)
        for found in _task_details(summary, target).values()
        if found["limit"] is not None and found["stderr"] is not None
    ]
    if not scores:
        return []
    fewest = min(found["num_examples"] for found in scores)
    worst = max(found["stderr"] for found in scores)
    return [
        f"{fewest} examples a task: +-{worst:.0f} points (one standard error) on a score; use evaluation=zero_shot for"
        " real numbers"
    ]


def _efficiency_table(summary: Summary) -> Table:
    measured = summary.get("efficiency", {})
    names = ("latency_seconds", "tokens_per_second", "weights_gb", "peak_memory_gb")
    rows = [
        [target, *("" if found[name] is None else f"{found[name]:.4g}" for name in names)]
        for target, found in measured.items()
    ]
    return Table(["model", "latency in s", "tokens per s", "weights in GB", "peak memory in GB"], rows)


def _efficiency_settings(summary: Summary) -> list[str]:
    return _in_order(
        f"efficiency: {found['device']}, {found['dtype']}, batch size {found['batch_size']}, {found['output_len']} new"
        f" tokens, mean of {found['num_runs'] - found['num_warmup']} runs after {found['num_warmup']} to warm up"
        for found in summary.get("efficiency", {}).values()
    )


def _layers(summary: Summary) -> list[str]:
    if "layer_groups" not in summary:
        return []
    lines = [format_groups(summary["layer_groups"])]
    if summary["dropped"]:
        lines.append("dropped: " + ", ".join(map(str, summary["dropped"])))
    lines += sublayer_lines(summary.get("sublayers", {}))
    if not summary.get("threshold_is_highest", True):
        lines.append(
            f"threshold {summary['threshold']:g} reaches the pruning ratio, but a higher one may too:"
            " threshold.exhaustive=true finds out"
        )
    return lines


def sublayer_lines(missing: Mapping[str, Any]) -> list[str]:
    """Which sublayers are missing, and how the checkpoint says so; nothing if ``missing`` is empty.

    Args:
        missing: export, attention and mlp (original layers), and parameters in them.
    """
    if not missing:
        return []
    names = (("attention", "attention"), ("mlp", "feed-forward"))
    lost = [f"{name} of {', '.join(map(str, missing[key]))}" for key, name in names if missing[key]]
    count = _count(missing["parameters"])
    if missing["export"] == "stock":
        how = (
            f"the checkpoint has the dense model's class and {count} parameters that do nothing (zeroed projections):"
            " nothing is faster or smaller; method.export=custom leaves them out"
        )
    else:
        how = (
            f"the checkpoint leaves their {count} parameters out; it brings modeling_pruned.py and loads with"
            " trust_remote_code=True only"
        )
    return [f"dropped: {'; '.join(lost)}", how]


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


def read_runs(directory: Path) -> list[dict[str, Any]]:
    """Every run in or below ``directory``, finished or not, in the order of their folders' names (2 before 10).

    Returns:
        For each: ``job`` (its folder, from ``directory``), ``path``, ``overrides`` (of the command line), ``status``
        (``"done"``, ``"FAILED"`` or ``"unfinished"``), ``reason`` (why it failed, else empty) and ``summary`` (what
        summary.json holds, else None).

    Raises:
        UserError: there is no such directory.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory of runs")
    runs = []
    for folder, subfolders, files in os.walk(directory):
        if ".hydra" in subfolders or "summary.json" in files or "failure.json" in files:
            subfolders.clear()  # runs do not nest
            path = Path(folder)
            job = path.name if path == directory else str(path.relative_to(directory))
            runs.append({"job": job, "path": path, **_read_run(path)})
    return sorted(runs, key=lambda run: [(int(part) if part.isdigit() else -1, part) for part in run["path"].parts])


def _read_run(path: Path) -> dict[str, Any]:
    overrides_file = path / ".hydra" / "overrides.yaml"
    run = {
        "overrides": list(OmegaConf.load(overrides_file)) if overrides_file.exists() else [],
        "status": "unfinished",
        "reason": "",
        "summary": None,
    }
    if (path / "summary.json").exists():
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return {**run, "status": "done", "summary": summary}
    if (path / "failure.json").exists():
        failure = json.loads((path / "failure.json").read_text(encoding="utf-8"))
        return {**run, "status": "FAILED", "reason": " ".join(failure["error"].split())}
    return run


def study_table(rows: Sequence[Mapping[str, Any]], sort_by: str | None = None) -> str:
    """Many runs as one Markdown table, a row for each.

    What all runs share (overrides, the dense model's numbers) stands above the table once.

    Args:
        rows: what `read_runs` returns.
        sort_by: a column; the best run first, that is the highest average, else the lowest number; runs without a
            number last. None keeps the order, and so does any column while no run has finished.

    Raises:
        UserError: no such column.
    """
    measures = [_measures(run["summary"]) if run["summary"] else {} for run in rows]
    names = _in_order(name for found in measures for name in found)
    if sort_by is not None and names and sort_by not in names:
        raise UserError(f"sort_by={sort_by!r} is not a column of this table; columns: {', '.join(names)}")
    finished = [found for found in measures if found]
    first = rows[0]["overrides"] if len(rows) > 1 else []
    shared = [item for item in first if all(item in run["overrides"] for run in rows)]
    dense = [name for name in names if name.endswith(" dense")]
    same = [name for name in dense if len(rows) > 1 and len({found.get(name) for found in finished}) == 1]
    columns = [name for name in names if name not in same]

    order = list(range(len(rows)))
    if sort_by in names:
        sign = -1 if sort_by.startswith("average") else 1
        order.sort(key=lambda i: (sort_by not in measures[i], sign * measures[i].get(sort_by, 0)))
    cells = []
    for i in order:
        run, found = rows[i], measures[i]
        overrides = " ".join(item for item in run["overrides"] if item not in shared)
        values = [_shown_measure(name, found[name]) if name in found else "" for name in columns]
        status = f"{run['status']}: {run['reason']}" if run["reason"] else run["status"]
        cells.append([run["job"], overrides, *values, status])
    above = [f"All jobs: `{' '.join(shared)}`"] if shared else []
    above += ["Dense model: " + ", ".join(_dense_measure(name, finished[0][name]) for name in same)] if same else []
    above += [f"Sorted by {sort_by}, best first"] if sort_by in names else []
    above += _small_limit(run["summary"] for run in rows if run["summary"])
    return "".join(f"{line}\n\n" for line in above) + Table(["job", "overrides", *columns, "status"], cells).markdown()


def write_study(directory: Path, sort_by: str | None = None) -> str:
    """Write ``<directory>/summary.md``, the table of all jobs of a sweep, and return it.

    Raises:
        UserError: nothing there has run, or there is no column ``sort_by``.
    """
    runs = read_runs(directory)
    if not runs:
        raise UserError(f"no runs in {directory}: expected folders with summary.json, failure.json or .hydra")
    counts = {status: sum(run["status"] == status for run in runs) for status in ("done", "FAILED", "unfinished")}
    state = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    text = f"# {directory.resolve().name}: {len(runs)} jobs, {state}\n\n{study_table(runs, sort_by)}"
    write_text(directory / "summary.md", text)
    return text


def _measures(summary: Summary) -> dict[str, float]:
    """The numbers of a run that a study compares, by column name."""
    found: dict[str, float] = {
        column: summary[key]["pruned"]
        for column, key in (("layers", "num_layers"), ("parameters", "parameters"))
        if key in summary
    }
    for target, metrics in _metrics(summary).items():
        for corpus, value in metrics.get("perplexity", {}).items():
            found[f"perplexity {Path(corpus).name} {target}"] = value["perplexity"]
        if "average" in metrics.get("zero_shot", {}):
            found[f"average {target}"] = metrics["zero_shot"]["average"]
    if "plan_seconds" in summary:
        found["plan seconds"] = summary["plan_seconds"]
    if "recovery" in summary:
        found["tokens"] = summary["recovery"]["num_tokens"]
        found["recovery seconds"] = summary["recovery"]["seconds"]
        found["recovery GB"] = summary["stages"]["recover"]["peak_memory_gb"]
    found["seconds"] = sum(stage["seconds"] for stage in summary["stages"].values() if not stage["reused"])
    return found


def _shown_measure(name: str, value: float) -> str:
    if name in ("parameters", "tokens"):
        return _count(int(value))
    if name.startswith("perplexity"):
        return _perplexity(value)
    return f"{value:.1f}" if name.startswith(("average", "plan seconds", "recovery GB")) else f"{value:.0f}"


def _dense_measure(name: str, value: float) -> str:
    return f"{name.removesuffix(' dense')} {_shown_measure(name, value)}"


def _in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of first appearance."""
    return list(dict.fromkeys(names))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _count(number: int) -> str:
    """A number of parameters: 6.74B, 134.5M, or in full below a million."""
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else str(number)


def _change(counts: Mapping[str, int]) -> str:
    return f"{100 * (counts['pruned'] / counts['dense'] - 1):+.1f}%"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _from_here(path: Path) -> str:
    """The path from the working directory, if it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _wrapped(line: str, indent: str) -> str:
    lines = textwrap.wrap(
        line,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "".join(f"{part}\n" for part in lines)
