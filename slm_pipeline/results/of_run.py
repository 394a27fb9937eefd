"""The numbers of a run, from its summary.json: those of its measures, and what the job itself did and took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slm_pipeline.results import before
from slm_pipeline.results.number import PERCENT, Number, by_key
from slm_pipeline.surgery.changes import Changes
from slm_pipeline.surgery.ops.resize import NARROWER

Summary = Mapping[str, Any]  # what summary.json holds


def numbers_of(summary: Summary) -> dict[str, Number]:
    """Every number of a run by its key; what was not measured is absent."""
    if "numbers" in summary:
        found = {key: Number.from_json(key, said) for key, said in summary["numbers"].items()}
        shares = {number.key: number for number in of_ratio(summary)}  # which earlier versions left to `pruning_ratio`
        return before.with_limits({**found, **{key: share for key, share in shares.items() if key not in found}})
    job = of_job(summary)
    took = [number for number in job if number.cost]
    numbers = [*(number for number in job if not number.cost), *before.measured(summary), *took]
    return before.with_limits(by_key(numbers))


def of_job(summary: Summary) -> list[Number]:
    """What the job did and took: layers and parameters left, threshold, seconds, the recovery's tokens."""
    found = [*of_pruning(summary), *of_ratio(summary)]
    if "plan_seconds" in summary:
        found.append(Number("plan_seconds", summary["plan_seconds"], "seconds", higher_is_better=False, cost=True))
    if repair := summary.get("repair"):
        found += of_repair(repair)
    if recovery := summary.get("recovery"):
        found.append(Number("recovery/num_tokens", recovery["num_tokens"], "tokens"))
        found.append(Number("recovery/seconds", recovery["seconds"], "seconds", higher_is_better=False, cost=True))
        if (peak := summary["stages"].get("recover", {}).get("peak_memory_gb")) is not None:
            found.append(Number("recovery/peak_memory_gb", peak, "GB", higher_is_better=False, cost=True))
    seconds = sum(stage["seconds"] for stage in summary["stages"].values() if not stage["reused"])
    return [*found, Number("seconds", seconds, "seconds", higher_is_better=False, cost=True)]


def of_repair(result: Mapping[str, Any]) -> list[Number]:
    """What a repair took and, where it measured that, how far the model was from the dense one before and after it; of
    its stage's result or of summary.json's ``repair``."""
    found = [
        Number(f"repair/kl_{name}", of_one["kl"], "nats", higher_is_better=False, detail=True)
        for name, of_one in result.get("divergence", {}).items()
    ]
    return [*found, Number("repair/seconds", result["seconds"], "seconds", higher_is_better=False, cost=True)]


def of_pruning(result: Mapping[str, Any]) -> list[Number]:
    """Layers and parameters left, the threshold, and how far the model is from the dense one on text that a search has
    kept to itself, of a summary.json or of the merge stage's result."""
    found = []
    if "num_layers" in result:
        found.append(Number("num_layers", result["num_layers"]["pruned"], "layers", higher_is_better=False))
    if "parameters" in result:
        found.append(Number("parameters", parameters_at_work(result), "parameters", higher_is_better=False))
    if latency := result.get("latency"):
        names = ("device", "mode", "batch_size", "context")
        measured = {"how": f"by the times of single blocks on {latency['device']}"}
        measured |= {name: latency[name] for name in names}
        found.append(Number("predicted_speedup", latency["predicted"], "", None, True, measured))
    if held_out := result.get("held_out"):
        found.append(Number("merge/kl_held_out", held_out["kl"], "nats", higher_is_better=False, detail=True))
    if result.get("threshold") is not None:
        found.append(Number("threshold", result["threshold"], detail=True))
    return found


def of_ratio(summary: Summary) -> list[Number]:
    """The shares of the dense model that were asked for and that went, each with what it is a share of in its name:
    of its layers, or of all its parameters, embeddings included."""
    ratio = summary.get("pruning_ratio") or {}
    asked, of = ratio.get("asked"), ratio.get("of")
    shares = {f"asked_of_{of}": asked if isinstance(asked, float) else None}
    shares |= {f"got_of_{name}": ratio.get(f"got_{name}") for name in ("layers", "parameters")}
    return [
        Number(f"pruning_ratio/{name}", 100 * share, PERCENT, detail=name != "got_of_parameters")
        for name, share in shares.items()
        if share is not None
    ]


def zeroed_parameters(summary: Summary) -> int:
    """Parameters that the pruned checkpoint holds and that do nothing, such as those of sublayers that were removed."""
    return Changes.of(summary).idle_parameters


def parameters_at_work(summary: Summary) -> int:
    """Parameters of the pruned model: what ratios, columns and axes count, whatever else the checkpoint holds."""
    return int(summary["parameters"]["pruned"]) - zeroed_parameters(summary)


def ratio_missed(summary: Summary) -> str | None:
    """What was asked and what came of it, where the two are further apart than rounding to whole layers takes them."""
    ratio, layers = summary.get("pruning_ratio") or {}, summary.get("num_layers")
    asked, of = ratio.get("asked"), ratio.get("of")
    if layers is None or not isinstance(asked, float) or of not in ("layers", "parameters"):
        return None
    got = ratio[f"got_{of}"]
    in_part = any(mark.label == NARROWER or mark.part != "whole" for mark in Changes.of(summary).marks)
    if of == "layers" and (in_part or layers["pruned"] == layers["dense"]):  # as many parameters as these layers have
        return None
    rounding = 0.5 / layers["dense"] if of == "layers" else 0.01
    if abs(got - asked) <= rounding + 1e-4:
        return None
    return f"asked {100 * asked:.4g}% of the {of}, got {100 * got:.4g}%"
