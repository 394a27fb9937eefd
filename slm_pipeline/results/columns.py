"""The numbers by which runs are compared: their columns, how each is written, and which of two is better."""

from __future__ import annotations

from collections.abc import Mapping

from slm_pipeline.config import TARGETS
from slm_pipeline.results.measurement import (
    Summary,
    corpus_labels,
    metrics_of,
    parameters_at_work,
    standard_errors,
)
from slm_pipeline.show.numerals import count

# Of a model's efficiency: the key in summary.json, and the column for each of dense, pruned and recovered.
_EFFICIENCY = {
    "tokens_per_second": "tokens per second",
    "latency_seconds": "latency seconds",
    "weights_gb": "weights GB",
    "peak_memory_gb": "peak GB",
}


def measures(summary: Summary) -> dict[str, float]:
    """The numbers of a run by column: ``layers``, ``perplexity bundled pruned``, ``piqa pruned``, ``average pruned``...

    Scores are in percent; ``parameters`` are those at work. What was not measured is absent.
    """
    found: dict[str, float] = {}
    if "num_layers" in summary:
        found["layers"] = summary["num_layers"]["pruned"]
    if "parameters" in summary:
        found["parameters"] = parameters_at_work(summary)
    if summary.get("threshold") is not None:
        found["threshold"] = summary["threshold"]
    for target, metrics in metrics_of(summary).items():
        perplexities = metrics.get("perplexity", {})
        for corpus, label in corpus_labels(perplexities).items():
            found[f"perplexity {label} {target}"] = perplexities[corpus]["perplexity"]
        for task, score in metrics.get("zero_shot", {}).items():
            found[f"{task} {target}"] = score
        for key, column in _EFFICIENCY.items():
            if (measured := summary.get("efficiency", {}).get(target, {}).get(key)) is not None:
                found[f"{column} {target}"] = measured
    if "plan_seconds" in summary:
        found["plan seconds"] = summary["plan_seconds"]
    if "recovery" in summary:
        found["tokens"] = summary["recovery"]["num_tokens"]
        found["recovery seconds"] = summary["recovery"]["seconds"]
        if (peak := summary["stages"].get("recover", {}).get("peak_memory_gb")) is not None:
            found["recovery GB"] = peak
    found["seconds"] = sum(stage["seconds"] for stage in summary["stages"].values() if not stage["reused"])
    return found


def flat_metrics(summary: Summary) -> dict[str, float]:
    """What runs are compared by: ``num_layers``, ``pruned/average``, ``pruned/perplexity/<corpus>`` and the like."""
    flat: dict[str, float] = {}
    if "num_layers" in summary:
        flat["num_layers"] = summary["num_layers"]["pruned"]
    if "parameters" in summary:
        flat["parameters"] = parameters_at_work(summary)
    for target, found in metrics_of(summary).items():
        flat |= {f"{target}/{task}": score for task, score in found.get("zero_shot", {}).items()}
        perplexities = found.get("perplexity", {})
        for corpus, label in corpus_labels(perplexities).items():
            flat[f"{target}/perplexity/{label}"] = perplexities[corpus]["perplexity"]
    return flat


def errors(summary: Summary) -> dict[str, float]:
    """Standard errors of the scores among `measures`, in percentage points, where they are known."""
    return {
        f"{task} {target}": error
        for target in metrics_of(summary)
        for task, error in standard_errors(summary, target).items()
    }


def parted(column: str) -> tuple[str, str]:
    """``piqa pruned`` -> (``piqa``, ``pruned``); (column, "") if it is of no one model."""
    quantity, _, target = column.rpartition(" ")
    return (quantity, target) if target in TARGETS else (column, "")


def is_score(column: str) -> bool:
    """Whether it is a task's score or their average."""
    quantity, target = parted(column)
    return bool(target) and not quantity.startswith("perplexity ") and quantity not in _EFFICIENCY.values()


def higher_is_better(column: str) -> bool:
    """True for scores and tokens per second; lower is better for everything else, perplexity above all."""
    return is_score(column) or parted(column)[0] == "tokens per second"


def is_detail(column: str) -> bool:
    """Whether it is left to CSV and HTML, so that the other tables fit a page."""
    quantity, _ = parted(column)
    return (is_score(column) and quantity != "average") or quantity in (
        "threshold", "latency seconds", "weights GB", "peak GB",
    )  # fmt: skip


def is_cost(column: str) -> bool:
    """Whether it says what the experiment took, not what came of it: left out of a paper's table."""
    return column in ("plan seconds", "recovery seconds", "recovery GB", "seconds")


def shown(column: str, value: float, error: float | None = None) -> str:
    """The number as people read it, with its error if there is one."""
    quantity, _ = parted(column)
    if quantity in ("parameters", "tokens"):
        text = count(round(value))
    elif quantity.startswith("perplexity "):
        text = perplexity(value)
    elif quantity in ("threshold", "latency seconds", "weights GB", "peak GB", "tokens per second"):
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    elif is_score(column) or quantity in ("plan seconds", "recovery GB"):
        text = f"{value:.1f}"
    elif quantity == "layers":
        text = f"{value:g}" if value == int(value) else f"{value:.1f}"
    else:
        text = f"{value:.0f}"
    return text if error is None else f"{text} +-{_shown_error(column, error)}"


def _shown_error(column: str, error: float) -> str:
    if error and parted(column)[0].startswith("perplexity ") and error < 0.1:
        return f"{error:.2g}"
    return shown(column, error)


def perplexity(value: float) -> str:
    """Two decimals, or three digits where those would be noise."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def change(counts: Mapping[str, int]) -> str:
    """``{"dense": 30, "pruned": 24}`` -> ``-20.0%``."""
    return f"{100 * (counts['pruned'] / counts['dense'] - 1):+.1f}%"
