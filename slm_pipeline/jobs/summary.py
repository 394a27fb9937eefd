"""summary.json, summary.md and the pictures of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_pipeline.config import PruningRatioConfig
from slm_pipeline.errors import only_warned_about
from slm_pipeline.export import exported
from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.stages.evaluate import Evaluate
from slm_pipeline.jobs.stages.merge import load_plan
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.machine import provenance
from slm_pipeline.report.run import write_summary_md
from slm_pipeline.results.number import Number, by_key
from slm_pipeline.results.of_run import numbers_of, of_job, parameters_at_work
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.files import write_json, write_text
from slm_pipeline.store.run_folder import BEFORE
from slm_pipeline.surgery.changes import Changes
from slm_pipeline.surgery.plan import Plan, merged_windows

FORMAT = 1


def build(
    job: Job,
    results: Mapping[str, Artifact],
    evaluations: Mapping[str, Evaluate],
    reused: Mapping[str, bool],
    warnings: list[str],
) -> dict[str, Any]:
    """The content of summary.json, from the stages that ran or were reused; what was not run is absent.

    Args:
        results: of each stage, by its name.
        evaluations: those of the stages that are evaluations.
        reused: whether each result had been there before.
    """
    records = {name: artifact.record() for name, artifact in results.items()}
    config = job.config
    summary: dict[str, Any] = {
        "format": FORMAT,
        "name": config.name,
        "command": job.command,
        "model": job.source.name,
        "fingerprint": job.source.fingerprint_of_weights,
        "method": job.method.name,
        "seed": config.seed,
    }
    if "calibrate" in records:
        summary["calibration"] = records["calibrate"]["result"]
    if job.repair is not None and "repair" in records:
        found = {
            key: value for key, value in records["repair"]["result"].items() if key not in ("checkpoint", "layers")
        }
        summary["repair"] = {"options": dataclasses.asdict(job.repair), **found}
    if job.recovery is not None and "recover" in records:
        options = dataclasses.asdict(job.recovery)
        summary["recovery"] = {"name": job.recovery.name, "options": options, **records["recover"]["result"]}
    if "merge" in records:
        summary |= _pruning(job, load_plan(results["merge"]), records["merge"]["result"])
    of_measures, details = _measured(job, results, evaluations)
    if metrics := _metrics(details):
        summary["metrics"] = metrics
    if details:
        summary["details"] = details
    if speed := {target: found["efficiency"] for target, found in _by_target(details).items() if "efficiency" in found}:
        summary["efficiency"] = speed
    summary["stages"] = {
        name: {
            "seconds": record["seconds"],
            "reused": reused[name],
            "peak_memory_gb": record["peak_memory_gb"],
            "path": str(results[name].path),
            **({"warnings": record["warnings"]} if record.get("warnings") else {}),
        }
        for name, record in records.items()
    }
    job_numbers = of_job(summary)
    took = [number for number in job_numbers if number.cost]
    numbers = by_key([*(number for number in job_numbers if not number.cost), *of_measures, *took])
    summary["numbers"] = {key: number.to_json() for key, number in numbers.items()}
    if checkpoint := _checkpoint(results):
        summary["checkpoint"] = str(checkpoint)
    summary["warnings"] = list(warnings)
    summary["provenance"] = provenance.collect()
    return summary


def write(
    summary: dict[str, Any],
    results: Mapping[str, Artifact],
    run_dir: Path,
    tracker: Tracker,
    warnings: list[str],
    *,
    draw: bool = True,
) -> None:
    """Write summary.json; then, as far as that is possible, draw the pictures, write summary.md, log and print.

    Args:
        warnings: of the whole run, to which what is not possible is added.
    """
    file = run_dir / "summary.json"
    write_json(file, {**summary, "pictures": []})  # the result: what fails from here on does not undo it
    with only_warned_about(f"{BEFORE} was not removed"):
        (run_dir / BEFORE).unlink(missing_ok=True)
    if "merge" in results:
        with only_warned_about("plan.json was not written"):
            load_plan(_last_plan(results)).write(run_dir / "plan.json")
    if "checkpoint" in summary:
        with only_warned_about("model_card.md was not written"):
            write_text(run_dir / "model_card.md", f"{exported.find(run_dir).card('FOLDER')}\n")
    pictures = _draw(summary, results, run_dir) if draw else []
    summary["pictures"] = [picture.name for picture in pictures]
    summary["warnings"] = list(warnings)
    text = ""
    with only_warned_about("summary.md was not written"):
        text = write_summary_md(run_dir, summary)
    for picture in pictures:
        if picture.suffix == ".png":
            tracker.image(picture.stem, picture)
    numbers = numbers_of(summary)
    if rows := [[n.target, n.quantity, n.value, n.stderr, n.unit, n.direction] for n in numbers.values() if n.target]:
        tracker.table("numbers", ["model", "number", "value", "stderr", "unit", "better"], rows)
    tracker.summary(numbers)
    with only_warned_about("the table was not printed"):
        print(text, flush=True)
    summary["warnings"] = list(warnings)
    with only_warned_about("summary.json lacks pictures and late warnings"):
        write_json(file, summary)


def _pruning(job: Job, plan: Plan, result: Mapping[str, Any]) -> dict[str, Any]:
    ratio = job.config.pruning_ratio
    layers, parameters = result["num_layers"], result["parameters"]
    pruning: dict[str, Any] = {
        "threshold": plan.threshold,
        "pruning_ratio": {
            "asked": _asked(ratio),
            "of": ratio.of,
            "got_layers": round(1 - layers["pruned"] / layers["dense"], 4),
            "got_parameters": round(1 - parameters_at_work(result) / parameters["dense"], 4),
        },
        "num_layers": layers,
        "parameters": parameters,
        "layer_groups": plan.layer_groups,
        "dropped": plan.dropped,
    }
    pruning |= {name: result[name] for name in ("latency", "held_out") if name in result}
    changes = Changes.of(result)
    pruning |= {"changes": changes.to_json(with_facts=False), **changes.facts}
    if "seconds" in plan.scores:
        pruning["plan_seconds"] = plan.scores["seconds"]
        if "num_evaluated" in plan.scores:
            pruning["windows"] = {name: plan.scores[f"num_{name}"] for name in ("evaluations", "evaluated")}
    if "fit" in plan.scores:
        pruning["fit"] = plan.scores["fit"]
    if "exact" in plan.scores:
        pruning["threshold_is_highest"] = plan.scores["exact"]
    return pruning


def _asked(ratio: PruningRatioConfig) -> Any:
    given = {"num_layers": ratio.num_layers, "speedup": ratio.speedup}
    return ratio.ratio if ratio.ratio is not None else {k: v for k, v in given.items() if v is not None} or None


def _measured(
    job: Job, results: Mapping[str, Artifact], evaluations: Mapping[str, Evaluate]
) -> tuple[list[Number], dict[str, Any]]:
    """Every measure's numbers, totals behind the parts, and by ``evaluate_<model>``, measure and part what it found."""
    numbers: list[Number] = []
    details: dict[str, Any] = {}
    for target in job.evaluation.of:
        for measure in job.evaluation.active:
            done = {
                stage.part: stage
                for stage in evaluations.values()
                if stage.target == target and stage.measure is measure and stage.name in results
            }
            found = {}
            for part, stage in done.items():
                result = results[stage.name].record()["result"]
                found[part] = result["found"]
                numbers += stage.numbers(results[stage.name])
                of_target = details.setdefault(f"evaluate_{target}", {})
                if part:
                    of_target.setdefault(measure.name, {})[part] = result["found"]
                else:
                    of_target[measure.name] = {**result["found"], **of_target.get(measure.name, {})}
                if "overlap" in result:
                    of_target.setdefault("overlap", {})[measure.label(part)] = result["overlap"]
            if found:
                measured = {"measure": measure.name}
                totals = (replace(n, measured={**measured, **n.measured}) for n in measure.totals(found))
                numbers += [number.below(target) for number in totals]
    return numbers, details


def _by_target(details: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("evaluate_"): found for name, found in details.items()}


def _metrics(details: Mapping[str, Any]) -> dict[str, Any]:
    """Scores and perplexities of each model in the form that scripts of before numbers had keys read."""
    metrics: dict[str, Any] = {}
    for target, found in _by_target(details).items():
        if zero_shot := found.get("zero_shot"):
            values = {task: result["score"] for task, result in zero_shot.items()}
            average = sum(values.values()) / len(values)
            metrics.setdefault(target, {})["zero_shot"] = {**values, "average": average}
        if perplexity := found.get("perplexity"):
            metrics.setdefault(target, {})["perplexity"] = {
                corpus: {"corpus": corpus, **result} for corpus, result in perplexity.items()
            }
    return metrics


def _checkpoint(results: Mapping[str, Artifact]) -> Path | None:
    """Folder of the last model that was made and kept."""
    last = results.get("recover", results.get("repair", results.get("merge")))
    return last.path / "model" if last is not None and (last.path / "model").is_dir() else None


def _last_plan(results: Mapping[str, Artifact]) -> Artifact:
    """The result whose plan leads to the last model: with what the repair added, if there was one."""
    return results.get("repair", results["merge"])


def _draw(summary: Mapping[str, Any], results: Mapping[str, Artifact], run_dir: Path) -> list[Path]:
    """The files of every picture that could be drawn."""
    drawn: list[Path] = []
    for name, draw in (
        ("layer_similarity", _draw_similarity),
        ("search_steps", _draw_search),
        ("layer_groups", _draw_layers),
        ("recovery_loss", _draw_recovery),
    ):
        with only_warned_about(f"no picture {name}"):
            drawn += draw(summary, results, run_dir / name)
    return drawn


def _draw_similarity(summary: Mapping[str, Any], results: Mapping[str, Artifact], path_stem: Path) -> list[Path]:
    from slm_pipeline.show.heat_maps import LABELS, heat_maps

    if "calibrate" not in results:
        return []
    values = json.loads((results["calibrate"].path / "similarity.json").read_text(encoding="utf-8"))
    panels = [
        {"title": LABELS[metric], "metric": metric, "matrix": values[metric], "patches": values["patches"][metric]}
        for metric in ("cosine", "cka")
    ]
    done = []
    if "merge" in results:
        plan = load_plan(results["merge"])
        windows = merged_windows(plan.layer_groups)
        done = [{"name": plan.method, "windows": windows, "dropped": plan.dropped}]
    about = f"{summary['model']}: layer similarity on the calibration text"
    return heat_maps(panels, path_stem, title=about, plans=done)


def _draw_search(summary: Mapping[str, Any], results: Mapping[str, Artifact], path_stem: Path) -> list[Path]:
    from slm_pipeline.show import pictures

    plan = load_plan(results["merge"]) if "merge" in results else None
    if plan is not None and plan.scores.get("trace"):
        return pictures.search_candidates(plan.scores["trace"], path_stem, title=_title(summary))
    if plan is None or not plan.scores.get("steps"):
        return []
    return pictures.search_steps(plan.scores["steps"], plan.threshold, path_stem, title=_title(summary))


def _draw_layers(summary: Mapping[str, Any], results: Mapping[str, Artifact], path_stem: Path) -> list[Path]:
    from slm_pipeline.show import pictures

    plan = load_plan(_last_plan(results)) if "merge" in results else None
    if plan is None or not plan.ops:
        return []
    marks = Changes.of(summary.get("repair", summary)).marks
    return pictures.layer_strip(plan.layer_groups, plan.dropped, plan.model["num_layers"], path_stem, marks=marks)


def _draw_recovery(summary: Mapping[str, Any], results: Mapping[str, Artifact], path_stem: Path) -> list[Path]:
    from slm_pipeline.show import pictures

    if "recover" not in results:
        return []
    curve = json.loads((results["recover"].path / "curve.json").read_text(encoding="utf-8"))
    if not curve:
        return []
    return pictures.loss_curve(curve, path_stem, title=_title(summary), loss=summary["recovery"]["loss"])


def _title(summary: Mapping[str, Any]) -> str:
    return f"{summary['model']}, {summary['method']}"
