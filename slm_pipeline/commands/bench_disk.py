"""``slm-bench disk``: a checkpoint written, verified and read, beside what plain transformers takes for it.

slm-bench disk                          SmolLM2
slm-bench disk model=llama2_7b          another model

What is written is the dense model. Ours reads the checkpoint back and compares it; loading checks every weight. Files
come from memory if they fit into it: each side runs once before it is timed, and the faster of two runs counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from slm_pipeline.commands.bench_results import QUIET, Result, leave, table
from slm_pipeline.commands.bench_stages import scratch
from slm_pipeline.jobs import command_line
from slm_pipeline.machine import memory

_DEFAULTS = ["method=none", "pruning_ratio=none", "recovery=none", *QUIET]


def disk(words: list[str]) -> None:
    """Measure and print; ``words`` is the command line: overrides as for slm."""
    from slm_pipeline.models import checkpoint
    from slm_pipeline.models.loading import load_checkpoint, load_dense

    job = command_line.compose_job(["slm-bench", "disk"], words, _DEFAULTS)
    config = job.config.model
    model, tokenizer = load_dense(job.source)
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    held = [model]  # what is saved goes, and comes back from the checkpoint
    del model
    with scratch(words, "disk") as folder:
        plain, own = folder / "plain", folder / "own"
        saved = _faster_of_two(
            lambda: held.append(checkpoint.save(held.pop(), tokenizer, own, card="", config=config)),
            lambda: held[0].save_pretrained(plain),
        )
        device = str(held.pop().device)
        memory.free()
        loaded = _faster_of_two(lambda: load_checkpoint(own, config), lambda: _plain_load(plain, device))
    results = []
    for what, (ours, theirs) in (("saved and verified", saved), ("loaded and checked", loaded)):
        how = f"{theirs:.2f} s by transformers alone, {ours:.2f} s; {gigabytes:.2f} GB"
        results.append(Result(what, theirs / ours, how=how))
        results.append(Result(what, gigabytes / ours, "GB/s", how=how))
    print(table(results))
    leave("disk", job, words, results)


def _plain_load(folder: Any, device: str) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device)


def _faster_of_two(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float]:
    def seconds(run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    ours(), theirs()
    runs = [(seconds(ours), seconds(theirs)) for _ in range(2)]
    return min(run[0] for run in runs), min(run[1] for run in runs)
