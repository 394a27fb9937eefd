"""Every width method on every family, alone and after a depth method, as one study: python tests/width_study.py

Each row is a whole run of `slm` at 20 % of the layers' parameters: calibrated, pruned, saved, recovered with LoRA,
evaluated with fidelity. Then its checkpoints are loaded again: the pruned one must compute what its plan makes of the
dense model, and the recovered one generate the same with and without a cache. Small random models, on a CPU, rows side
by side in several processes; `--models smollm2_135m` takes the bundled weights. Exit status 1 if a row fails.

    python tests/width_study.py --processes 64 --folder study && slm-report study/runs
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

RANDOM = ["model=random", "model.num_layers=10", "model.hidden_size=64", "model.intermediate_size=160", "seed=0"]
HEADS = ["model.num_heads=8", "model.num_kv_heads=4"]
MODELS = {
    "llama_mha": [*RANDOM, "model.architecture=llama", "model.num_heads=8", "model.num_kv_heads=8"],
    "llama_gqa": [*RANDOM, *HEADS, "model.architecture=llama"],
    **{
        name: [*RANDOM, *HEADS, f"model.architecture={name}"]
        for name in ("qwen3", "gemma3_text", "phi3", "opt", "gpt_neox")
    },
    "smollm2_135m": ["model=smollm2_135m", "model.dtype=float32"],
}
METHODS: dict[str, list[str]] = {
    "wanda_sp": [],
    "flap": [],
    "llm_pruner": [],
    "fisher_mask": [],
    "head_importance": ["sublayers=both"],  # heads alone have less than a fifth
    "kcm": [],
    "obs": [],
    "nystrom": [],
}
FIRST = ("none", "slm", "angular")
HEAD = ("model", "method", "after", "class", "asked", "got", "KL pruned", "KL recovered", "seconds", "status")
Row = tuple[str, str, str]  # model, width method, depth method before it


def overrides(row: Row, data: Path, folder: Path) -> list[str]:
    """Of `slm`."""
    model, method, first = row
    if first == "none":
        chosen = [f"method={method}", *(f"method.{option}" for option in METHODS[method])]
    else:
        chosen = ["method=combined", f"method@method.first={first}", f"method@method.second={method}"]
        chosen += ["method.first.share=0.5", *(f"method.second.{option}" for option in METHODS[method])]
    return [
        *MODELS[model], *chosen, f"name={'-'.join(row)}", "model.device=cpu", f"output_dir={folder}",
        f"data_dir={data}", "calibration=text_file", "calibration.path=text.txt", "calibration.num_samples=8",
        "calibration.seq_len=32", "recovery.source=file", "recovery.path=alpaca.json", "recovery.validation_size=4",
        "recovery.max_steps=2", "recovery.batch_size=4", "recovery.micro_batch_size=2", "recovery.warmup_steps=1",
        "recovery.dtype=float32", "evaluation=perplexity", "evaluation.perplexity.corpora=[text.txt]",
        "evaluation.perplexity.window=128", "evaluation.perplexity.max_tokens=1024",
        "evaluation.fidelity.corpora=[text.txt]", "evaluation.fidelity.window=128",
        "evaluation.fidelity.max_tokens=1024", "tracker=jsonl", "pictures=false",
    ]  # fmt: skip


def run(row: Row, data: Path, folder: Path) -> list[str]:
    """The row of the table; raises whatever is wrong with it."""
    from conftest import run_slm

    started = time.monotonic()
    outcome = run_slm(*overrides(row, data, folder))
    assert outcome.status == 0, outcome.err.strip()
    (file,) = (folder / "runs" / "-".join(row)).glob("*/summary.json")
    summary = json.loads(file.read_text(encoding="utf-8"))
    kind = check_checkpoints(summary, row, data, folder)
    numbers = summary["numbers"]
    layers, got = summary["num_layers"], numbers["pruning_ratio/got_of_parameters"]["value"]
    assert layers["pruned"] < layers["dense"] if row[2] != "none" else layers["pruned"] == layers["dense"]
    kl = [numbers[f"{model}/fidelity/text.txt/kl"]["value"] for model in ("pruned", "recovered")]
    asked = f"{numbers['pruning_ratio/asked_of_layers']['value']:.0f}% of layers"
    seconds = f"{time.monotonic() - started:.0f}"
    return [*row, kind, asked, f"{got:.1f}% of parameters", *(f"{value:.3g}" for value in kl), seconds, "ok"]


def check_checkpoints(summary: dict[str, Any], row: Row, data: Path, folder: Path) -> str:
    """Load them, compare and generate; the class of the pruned model."""
    import torch
    from transformers import AutoModelForCausalLM

    from slm_pipeline import compose
    from slm_pipeline.models.loading import load_checkpoint, load_dense
    from slm_pipeline.models.source import describe
    from slm_pipeline.surgery.apply import apply
    from slm_pipeline.surgery.plan import Plan

    config = compose(overrides(row, data, folder)).config.model
    dense, _ = load_dense(describe(config))
    merged = Path(summary["stages"]["merge"]["path"])
    ids = torch.arange(3, 27)[None] * 7 % 256
    with torch.no_grad():
        expected = apply(Plan.read(merged / "plan.json"), dense)(input_ids=ids, use_cache=False).logits
        pruned = load_checkpoint(merged / "model", config)
        torch.testing.assert_close(pruned(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(merged / "model", dtype="float32", trust_remote_code=True).eval()
        torch.testing.assert_close(plain(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
        del plain
        assert sum(parameter.numel() for parameter in pruned.parameters()) == summary["parameters"]["pruned"]
        recovered = load_checkpoint(Path(summary["checkpoint"]), config)
        assert type(recovered) is type(pruned)
        options = {"max_new_tokens": 8, "do_sample": False}
        with_cache, without = (recovered.generate(ids, use_cache=cached, **options) for cached in (True, False))
        assert torch.equal(with_cache, without), "it generates something else without a cache"
    return type(pruned).__name__


def attempt(row: Row, data: Path, folder: Path) -> list[str]:
    """The row of the table, whatever happens."""
    import torch

    torch.set_num_threads(1)
    try:
        return run(row, data, folder)
    except Exception as error:  # a failed row is what the table is to show
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [*row, *[""] * (len(HEAD) - len(row) - 1), f"FAILED {reason[-300:]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in MODELS if name != "smollm2_135m"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--first", nargs="+", choices=FIRST, default=list(FIRST), help="what comes before")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder otherwise")
    given = parser.parse_args()
    if given.folder is not None:
        return study(given, given.folder.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return study(given, Path(folder))


def study(given: argparse.Namespace, folder: Path) -> int:
    import small_pipeline

    from slm_pipeline.show.tables import Table

    data = small_pipeline.write_data(folder / "data")
    rows: Sequence[Row] = [*product(given.models, given.methods, given.first)]
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    spawn = multiprocessing.get_context("spawn")
    found: dict[Row, list[str]] = {}
    with ProcessPoolExecutor(min(given.processes, len(rows)), mp_context=spawn) as pool:
        jobs = {pool.submit(attempt, row, data, folder): row for row in rows}
        for number, job in enumerate(as_completed(jobs), start=1):
            found[jobs[job]] = job.result()
            print(f"{number} of {len(rows)}: {' '.join(job.result())}", file=sys.stderr, flush=True)
    failed = [row for row in rows if found[row][-1] != "ok"]
    print(Table(HEAD, [found[row] for row in rows]).markdown())
    print(f"{len(rows)} rows, {len(failed)} FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
