"""Runs' summaries small enough to check by hand, and the folders that jobs leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from slm_pipeline.results.number import Number
from slm_pipeline.results.of_run import numbers_of


def task(score: float, stderr: float | None, limit: int | None = 20) -> dict[str, Any]:
    return {
        "metric": "acc",
        "score": score,
        "stderr": stderr,
        "num_examples": limit or 3270,
        "limit": limit,
        "batch_size": 16,
        "lm_eval_version": "0.4.13",
    }


def perplexity(value: float, **changes: Any) -> dict[str, Any]:
    return {"perplexity": value, "num_tokens": 8184, "window": 1024, "stride": None, "bos": False, **changes}


def dense_only(folder: Path) -> dict[str, Any]:
    """The summary of a run that scored the dense model, and gave the pruned one a perplexity alone."""
    return {
        "format": 1,
        "name": "first",
        "command": "slm name=first pruning_ratio=r20 'model.path=/a b'",
        "model": "smollm2_135m",
        "method": "slm",
        "threshold": 0.81,
        "seed": 7,
        "num_layers": {"dense": 30, "pruned": 24},
        "parameters": {"dense": 134515008, "pruned": 113276160},
        "layer_groups": [[i] for i in range(20)] + [[20, 21, 22, 23]] + [[24], [25]] + [[29]],
        "dropped": [26, 27, 28],
        "metrics": {
            "dense": {
                "zero_shot": {"boolq": 60.0, "piqa": 70.0, "average": 65.0},
                "perplexity": {"bundled": perplexity(15.234)},
            },
            "pruned": {"perplexity": {"bundled": perplexity(123456.0)}},
        },
        "details": {"evaluate_dense": {"zero_shot": {"boolq": task(60.0, 11.2), "piqa": task(70.0, 6.0)}}},
        "stages": {
            "calibrate": {"seconds": 3.21, "reused": True, "peak_memory_gb": 1.5, "path": str(folder / "c")},
            "merge": {"seconds": 30.0, "reused": False, "peak_memory_gb": 2.25, "path": str(folder / "m")},
            "evaluate_dense": {"seconds": 12.0, "reused": False, "peak_memory_gb": 1.0, "path": str(folder / "e")},
        },
        "checkpoint": str(folder / "m" / "model"),
        "warnings": ["the calibration text is also an evaluation corpus"],
        "pictures": ["layers.png", "layers.svg"],
    }


def finished(
    folder: Path, layers: int, value: float, boolq: float = 50.0, piqa: float = 60.0, **changes: Any
) -> dict[str, Any]:
    """The summary of a run that left so many layers, with these numbers of its pruned model."""
    done = dense_only(folder)
    done["num_layers"]["pruned"] = layers
    done["parameters"]["pruned"] = 100_000_000 + layers
    done["layer_groups"] = [[i] for i in range(layers - 1)] + [list(range(layers - 1, 30))]
    done["dropped"] = []
    scores = {"boolq": boolq, "piqa": piqa, "average": (boolq + piqa) / 2}
    done["metrics"]["pruned"] = {"zero_shot": scores, "perplexity": {"bundled": perplexity(value)}}
    done["details"]["evaluate_pruned"] = {"zero_shot": {"boolq": task(boolq, 4.0), "piqa": task(piqa, 3.0)}}
    return {**done, **changes}


def write_run(
    folder: Path,
    overrides: Sequence[str],
    result: Mapping[str, Any] | str | None,
    *,
    config: Mapping[str, Any] | None = None,
    choices: Mapping[str, str | None] | None = None,
) -> None:
    """A run's folder as a job leaves it; ``result`` is its summary, why it failed, or None if it was interrupted.

    Numbers get their keys here, from what a version wrote that had none.
    """
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(dict(config or {})))
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": {"runtime": {"choices": choices or {}}}}))
    if isinstance(result, str):
        (folder / "failure.json").write_text(json.dumps({"error": result, "type": "UserError"}))
    elif result is not None:
        (folder / "summary.json").write_text(json.dumps(with_numbers(result)))


def with_numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary of before numbers had keys, and its numbers under their keys."""
    return {**summary, "numbers": {key: number.to_json() for key, number in numbers_of(summary).items()}}


def with_speedup(summary: Mapping[str, Any], speedup: float, device: str) -> dict[str, Any]:
    """The same, where the pruned model was timed in turn with the dense one."""
    measured = {"measure": "efficiency", "part": "", "device": device, "how": f"{device}, in turn"}
    number = Number("pruned/efficiency/speedup", speedup, "", 0.05, True, measured)
    done = with_numbers(summary)
    return {**done, "numbers": {**done["numbers"], number.key: number.to_json()}}
