"""Runs of many kinds below one folder, as they lie in the outputs of somebody who has tried everything."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies import finished, perplexity, task, write_run

METHODS = ("slm", "come", "laco", "shortgpt", "sleb", "flap", "wanda_sp", "obs", "joint", "angular", "of_a_plugin")
RECOVERIES = ("none", "lora", "full", "distill")
STATES = ("done", "done", "done", "FAILED", "interrupted", "queued", "unreadable")
_PROVENANCE = {
    "git_commit": "0123456789abcdef", "device": "CPU x86_64", "argv": ["slm"],
    "versions": {"slm_pipeline": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.10.1"},
}  # fmt: skip


def write_mixed(
    folder: Path, number: int, *, method: str, recovery: str = "none", repair: str = "none", state: str = "done",
    model: str = "smollm2_135m", ratio: int = 20, seed: int = 0, study: str = "runs",
) -> Path:  # fmt: skip
    """One run of a kind; the more layers go and the less is won back, the worse its numbers."""
    run = folder / study / str(number)
    overrides = [f"method={method}", f"pruning_ratio=r{ratio}", f"model={model}", f"recovery={recovery}"]
    overrides += [f"repair={repair}", f"seed={seed}", *(["sweeps=" + study] if study != "runs" else [])]
    choices = {"method": method, "recovery": recovery, "repair": repair, "model": model, "pruning_ratio": f"r{ratio}"}
    config: dict[str, Any] = {
        "name": study,
        "seed": seed,
        "method": {"merge_rule": "mean"} if method in ("slm", "come", "laco") else {},
        "recovery": {"learning_rate": 0.001, "lora": {"r": 16}} if recovery == "lora" else {},
        "pruning_ratio": {"ratio": ratio / 100},
    }
    if recovery == "lora" and number % 2:
        overrides.append("recovery.learning_rate=0.001")
    result: dict[str, Any] | str | None = None
    if state == "done":
        result = _result(folder, number, method, recovery, repair, model, ratio, seed)
    elif state == "FAILED":
        result = "the pruned model's loss is nan in layer 12 of 30; method.damping=0.01 must be larger"
    write_run(run, overrides, result, config=config, choices=choices)
    if state == "unreadable":
        (run / "summary.json").write_text('{"stages": {')
    elif state == "queued":
        (run / "requeued").touch()
    elif isinstance(result, dict):
        os.utime(run / "summary.json", (1_795_000_000 + 3600 * number,) * 2)
        steps = [{"low": 20 - i, "high": 21, "similarity": 0.95 - i / 20, "accepted": i < 3} for i in range(5)]
        (run / "plan.json").write_text(json.dumps({"scores": {"steps": steps[: number % 4]}, "threshold": 0.8}))
    return run


def _result(
    folder: Path, number: int, method: str, recovery: str, repair: str, model: str, ratio: int, seed: int
) -> dict[str, Any]:
    layers = 30 - round(0.3 * ratio)
    worse = 15.234 * 1.08**ratio * (1 + 0.07 * (sum(map(ord, method)) % 7) + 0.01 * seed)
    score = 65 - ratio / 2 - sum(map(ord, method)) % 5
    done = finished(folder, layers, worse, score - 5, score + 5, model=model, method=method, seed=seed)
    done |= {"name": "mixed", "provenance": _PROVENANCE}
    done["parameters"] = {"dense": 134515008, "pruned": round(134515008 * (1 - ratio / 125))}
    if method in ("flap", "wanda_sp", "obs"):  # width: every layer stays
        done["layer_groups"] = [[i] for i in range(30)]
        done["num_layers"]["pruned"] = 30
    last = worse
    if repair != "none":
        last *= 0.7
        changes = {"lines": ["the last projections have new weights"], "marks": [], "idle_parameters": 0}
        done["repair"] = {"name": repair, "options": {}, "num_tokens": 8, "seconds": 1.0, "changes": changes}
        done["metrics"]["repaired"] = {"perplexity": {"bundled": perplexity(last)}}
    if recovery != "none":
        last *= 0.5
        scores = {"boolq": score - 1, "piqa": score + 8, "average": score + 3.5}
        done["metrics"]["recovered"] = {"zero_shot": scores, "perplexity": {"bundled": perplexity(last)}}
        done["details"]["evaluate_recovered"] = {
            "zero_shot": {"boolq": task(score - 1, 4.0), "piqa": task(score + 8, 3.0)}
        }
        done["recovery"] = {"name": recovery, "options": {}, "num_tokens": 100_000, "seconds": 300.0, "loss": "nats"}
        store = folder / "store" / f"{number}"
        store.mkdir(parents=True, exist_ok=True)
        curve = [{"step": step, "loss": 4.0 - step / 50 + ratio / 40} for step in range(10, 60, 10)]
        (store / "curve.json").write_text(json.dumps([*curve, {"step": 50, "eval_loss": 3.2 + ratio / 40}]))
        done["stages"]["recover"] = {"seconds": 300.0, "reused": False, "peak_memory_gb": 2.0, "path": str(store)}
    if number % 5 == 0:
        done["warnings"] = ["the calibration text is also an evaluation corpus"]
    return done


def forty(folder: Path) -> Path:
    """Forty runs of every method, recovery and state, of two models, some in studies."""
    states: Sequence[str] = ("done",) * 6 + ("FAILED", "done", "interrupted", "done", "done", "unreadable")
    for i in range(40):
        write_mixed(
            folder,
            i,
            method=METHODS[i % len(METHODS)],
            recovery=RECOVERIES[(i // 3) % 4],
            repair=("none", "none", "rescale", "refit")[(i // 2) % 4],
            state=states[i % len(states)],
            model="smollm2_135m" if i % 7 else "qwen3_4b",
            ratio=(10, 20, 30, 35)[i % 4],
            seed=i % 2,
            study="runs" if i < 24 else "methods",
        )
    return folder
