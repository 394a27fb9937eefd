"""One run: summary.md, and the same as text for the terminal. Reads JSON only."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_pipeline.results.measurement import measurement, small_limit
from slm_pipeline.results.number import Number, change
from slm_pipeline.results.of_run import Summary, numbers_of, parameters_at_work
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
    sections["Numbers one by one"] = number_table(summary)
    parts = [f"# {markdown_escaped(title)}\n", f"{counts}\n"]
    parts += [f"## {name}\n\n{body.markdown()}" for name, body in sections.items() if body]
    parts += [f"## Command\n\n{code_block(summary['command'], 'bash')}"]
    write_text(run_dir / "summary.md", "\n".join(parts))

    parts = [wrapped(title, "") + wrapped(counts, "")]
    parts += [f"{name}\n{body.text()}" for name, body in _sections(summary, run_dir, _from_here).items() if body]
    return "\n".join(parts)


def number_table(summary: Summary) -> Table:
    """Every number of a model, one by one, with its standard error and unit."""
    rows = [
        [number.target, number.quantity, _plain(number.value), _plain(number.stderr), number.unit]
        for number in numbers_of(summary).values()
        if number.target
    ]
    return Table(["model", "number", "value", "stderr", "unit"], rows)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


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
        + _asked(summary)
    )


def _asked(summary: Summary) -> str:
    """What the pruning ratio asked for and what came of it, in the same unit; empty if nothing was asked."""
    ratio = summary.get("pruning_ratio") or {}
    asked, of = ratio.get("asked"), ratio.get("of")
    if isinstance(asked, dict):
        return f"; asked {asked['num_layers']} layers, got {summary['num_layers']['pruned']}"
    if asked is None or of not in ("layers", "parameters"):
        return ""
    got = f"{100 * ratio['got_parameters']:.4g}%"
    if of == "layers":  # for methods of width it is as many parameters as these layers have
        of_layers = f"{100 * ratio['got_layers']:.4g}% of them and" if ratio["got_layers"] else "none of them but"
        got = f"{of_layers} {got} of the parameters"
    return f"; asked {100 * asked:.4g}% of the {of}, got {got}"


def _sections(summary: Summary, run_dir: Path, shown: Callable[[Path], str]) -> dict[str, Table | Lines]:
    """Title and content in reading order; empty where the run has nothing to say."""
    return {
        **_result_tables(summary),
        "How it was measured": Lines([*measurement(summary), *small_limit([summary])]),
        "Layers (braces: merged into one)": Lines(_layers(summary)),
        "Repair": Lines(_repair(summary)),
        "Recovery": Lines(_recovery(summary)),
        "Stages": _stage_table(summary, shown),
        "Warnings": Lines(summary["warnings"]),
        "Files": Lines(_files(summary, run_dir, shown)),
    }


def _result_tables(summary: Summary) -> dict[str, Table]:
    """For each measure a table, by its title: a row for each model, and below it the standard errors."""
    numbers = [number for number in numbers_of(summary).values() if number.target]
    tables = {}
    for measure in in_order(str(number.measured.get("measure", "")) for number in numbers):
        own = [number for number in numbers if number.measured.get("measure", "") == measure]
        title, head = _heads(measure, own)
        rows = []
        for target in in_order(number.target for number in own):
            of = {number.quantity: number for number in own if number.target == target}
            rows.append([target, *(of[key].shown(of[key].value) if key in of else "" for key in head)])
            if any(number.stderr is not None for number in of.values()):
                rows.append(["", *(_error(of.get(key)) for key in head)])
        tables[title] = Table(["model", *head.values()], rows)
    return tables


def _error(number: Number | None) -> str:
    return "" if number is None or number.stderr is None else f"+-{number.shown_error(number.stderr)}"


def _heads(measure: str, numbers: Sequence[Number]) -> tuple[str, dict[str, str]]:
    """The title of a measure's table, with the unit and the direction that all its columns share, and quantity -> head
    of column, with what they do not share."""
    kinds = {number.quantity: number for number in numbers}
    same = len({(number.unit, number.higher_is_better) for number in kinds.values()}) == 1
    names = {key: key.removeprefix(f"{measure}/") for key in kinds}
    part = "/".join(os.path.commonprefix([name.split("/")[:-1] for name in names.values()]))
    heads = {}
    for key, number in kinds.items():
        name = names[key].removeprefix(f"{part}/") if part else names[key]
        heads[key] = name if same else " ".join(filter(None, [name, _in_brackets(number, short=True)]))
    name = " ".join(filter(None, [measure.replace("_", "-"), part]))
    about = _in_brackets(next(iter(kinds.values()))) if same else ""
    return " ".join(filter(None, [name[:1].upper() + name[1:] or "Results", about])), heads


def _in_brackets(number: Number, *, short: bool = False) -> str:
    """``(%, higher is better)``, or ``(%, higher)``."""
    unit = number.unit if number.unit != number.measured.get("measure") else ""
    direction = number.direction if short else f"{number.direction} is better" if number.direction else ""
    inside = ", ".join(filter(None, [unit, direction]))
    return f"({inside})" if inside else ""


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


def _repair(summary: Summary) -> list[str]:
    found = summary.get("repair")
    if found is None:
        return []
    said = [f"{found['num_tokens']} tokens"] if "num_tokens" in found else []
    if kl := {name: of["kl"] for name, of in found.get("divergence", {}).items()}:
        said.append(f"KL from the dense model {kl['pruned']:.4g} -> {kl['repaired']:.4g} nats a token on text held out")
    said.append(f"{found['seconds']:.1f} seconds")
    before = Changes.of(summary).lines
    return [f"{found['name']}: " + ", ".join(said), *(ln for ln in Changes.of(found).lines if ln not in before)]


def _recovery(summary: Summary) -> list[str]:
    found = summary.get("recovery")
    if found is None:
        return []
    numbers = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    shown = (f"{name.replace('_', ' ')} {v if isinstance(v, int) else format(v, '.4g')}" for name, v in numbers.items())
    return [f"{found['name']}: " + ", ".join(shown)]


def _stage_table(summary: Summary, shown: Callable[[Path], str]) -> Table:
    """A row for each stage; the parts of a model's evaluation are one."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for name, found in summary["stages"].items():
        parts.setdefault(name.partition("/")[0], []).append(found)
    rows = []
    for stage, several in parts.items():
        reused = sum(found["reused"] for found in several)
        some = "yes" if reused == len(several) else f"{reused} of {len(several)}" if reused else "no"
        path = Path(several[0]["path"])
        rows.append(
            [
                stage,
                f"{sum(found['seconds'] for found in several):.1f}",
                some,
                f"{max(found['peak_memory_gb'] for found in several):.2f}",
                shown(path if len(several) == 1 else path.parent),
            ]
        )
    return Table(["stage", "seconds", "reused", "peak GB", "path"], rows)


def _files(summary: Summary, run_dir: Path, shown: Callable[[Path], str]) -> list[str]:
    lines = [f"checkpoint: {shown(Path(summary['checkpoint']))}"] if summary.get("checkpoint") else []
    lines += [f"plan: {shown(run_dir / 'plan.json')}"] if (run_dir / "plan.json").exists() else []
    lines += [f"pictures: {', '.join(summary['pictures'])}"] if summary["pictures"] else []
    lines += [f"W&B: wandb sync {shown(path)}" for path in sorted(run_dir.glob("wandb/offline-run-*"))]
    lines += [f"W&B: {shown(path)}" for path in sorted(run_dir.glob("wandb/run-*"))]
    return [*lines, f"all of it: {shown(run_dir)}"]


def _from_here(path: Path) -> str:
    """The path from the working directory, if it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
