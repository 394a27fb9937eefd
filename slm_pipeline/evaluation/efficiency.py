"""Latency, throughput and memory of generation, as the SLM authors measure them.

Published setting: a prompt repeated ``batch_size`` times (1), sampling with top-k 50 and top-p 0.95 at temperature 1,
KV cache on, exactly 128 new tokens, 30 runs of which the first 10 are discarded; mean and population standard
deviation of the rest. They take the time with CUDA events, here it is the wall clock between synchronisations of
every GPU, which also holds for a model that is spread over several.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import BatchSize, Count, CountOrZero, Text, Tokens
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.measure import Measure, Scored
from slm_pipeline.machine import gpus, memory
from slm_pipeline.models.context import Context
from slm_pipeline.results.number import Number
from slm_pipeline.show.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Efficiency(Measure):
    """Speed and memory of generation, as the SLM authors measure it. Options: see `efficiency`."""

    enabled: bool = False
    batch_size: BatchSize = 1
    output_len: Tokens = 128
    num_runs: Count = 30
    num_warmup: CountOrZero = 10  # of the runs, not counted
    prompt: Annotated[str, Text(lines=True, empty=False)] = "The Leaning Tower of Pisa is known for"

    name: ClassVar[str] = "efficiency"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_runs, self.num_warmup)

    def parts(self) -> list[str]:
        return [""] if self.enabled else []

    def names(self, part: str) -> list[str]:
        return ["tokens_per_second", "latency_seconds", "weights_gb", "peak_memory_gb"]

    def check(self, context: Context) -> None:
        check_lengths(None, self.output_len, context.source.max_positions)

    def identity(self, part: str, context: Context) -> dict[str, Any]:
        return {**self.settings("enabled"), "machine": machine(context.source.config.device)}

    def preflight(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> None:
        from slm_pipeline.models.loading import num_positions

        check_lengths(len(tokenizer(self.prompt)["input_ids"]), self.output_len, num_positions(context.source))

    def run(self, part: str, scored: Scored, context: Context) -> dict[str, Any]:
        return efficiency(scored.model, scored.tokenizer, **self.settings("enabled"))

    def numbers(self, part: str, found: Mapping[str, Any]) -> list[Number]:
        settings = ("device", "dtype", "batch_size", "prompt_len", "output_len", "num_runs", "num_warmup")
        counted = found["num_runs"] - found["num_warmup"]
        how = (
            f"{found['device']}, {found['dtype']}, batch size {found['batch_size']}, {found['output_len']} new"
            f" tokens, mean of {counted} runs after {found['num_warmup']} to warm up"
        )
        measured = {"how": how, **{name: found[name] for name in settings}}

        def timed(name: str, unit: str, higher: bool) -> Number:
            """The mean of the runs; pstdev is over all counted ones, the error of their mean from n - 1."""
            error = found[f"{name}_std"] / math.sqrt(counted - 1) if counted > 1 else None
            detail = name != "tokens_per_second"
            return Number(name, found[name], unit, error, higher, measured, detail=detail)

        numbers = [timed("tokens_per_second", "tokens/s", True), timed("latency_seconds", "seconds", False)]
        for name in ("weights_gb", "peak_memory_gb"):
            if found[name] is not None:
                numbers.append(Number(name, found[name], "GB", None, False, measured, detail=True))
        return numbers


def efficiency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    output_len: int,
    num_runs: int,
    num_warmup: int,
    prompt: str,
) -> dict[str, Any]:
    """Time ``model.generate`` and measure its memory.

    Args:
        model: any causal language model; is left in evaluation mode.
        tokenizer: the model's.
        batch_size: copies of the prompt generated from at once.
        output_len: new tokens of each, neither more nor less.
        num_runs: calls of ``generate``, the discarded ones included.
        num_warmup: of these, the first ones, which are not counted.
        prompt: any text.

    Returns:
        latency_seconds and latency_seconds_std (one call of ``generate``), tokens_per_second and
        tokens_per_second_std (new tokens of all copies), weights_gb (10^9 bytes of parameters), peak_memory_gb (of
        all GPUs during the counted runs; None on a CPU, where a process's peak also holds what ran before),
        num_parameters, prompt_len, device, dtype and the settings.

    Raises:
        UserError: unusable settings, more tokens than the model has positions for, or not enough memory.
    """
    import torch
    from transformers import GenerationConfig

    check(num_runs, num_warmup)
    inputs = tokenizer([prompt] * batch_size, return_tensors="pt").to(model.device)
    prompt_len = inputs["input_ids"].shape[1]
    check_lengths(prompt_len, output_len, getattr(model.config, "max_position_embeddings", None))
    eos_token_id = model.generation_config.eos_token_id if model.generation_config else None
    settings = GenerationConfig(
        do_sample=True,
        top_k=50,
        top_p=0.95,
        temperature=1.0,
        min_new_tokens=output_len,
        max_new_tokens=output_len,
        use_cache=True,
        eos_token_id=eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    model.eval()
    generate: Any = model.generate

    def run(number: int, progress: ProgressBar) -> tuple[list[float], Any]:
        """Seconds of each of so many calls, and what the last one gave."""
        seconds, output = [], None
        for _ in range(number):
            _synchronize()
            started = time.perf_counter()
            try:
                output = generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"generation does not fit into memory with evaluation.efficiency.batch_size={batch_size}; try"
                    f" evaluation.efficiency.batch_size={max(1, batch_size // 2)}"
                ) from error
            _synchronize()
            seconds.append(time.perf_counter() - started)
            progress.update()
        return seconds, output

    with torch.inference_mode(), ProgressBar(total=num_runs, desc="generation speed") as progress:
        run(num_warmup, progress)
        with memory.measured() as peak:
            latencies, output = run(num_runs - num_warmup, progress)
    if output.shape != (batch_size, prompt_len + output_len):
        raise RuntimeError(f"generate gave {tuple(output.shape)}, expected {(batch_size, prompt_len + output_len)}")
    speeds = [batch_size * output_len / latency for latency in latencies]
    log.info("generation: %.3f s, %.1f tokens/s", statistics.fmean(latencies), statistics.fmean(speeds))
    return {
        "latency_seconds": statistics.fmean(latencies),
        "latency_seconds_std": statistics.pstdev(latencies),
        "tokens_per_second": statistics.fmean(speeds),
        "tokens_per_second_std": statistics.pstdev(speeds),
        "weights_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
        "peak_memory_gb": peak.gb if model.device.type == "cuda" else None,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "prompt_len": prompt_len,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "output_len": output_len,
        "num_runs": num_runs,
        "num_warmup": num_warmup,
        "prompt": prompt,
    }


def machine(device: str) -> dict[str, Any]:
    """What speed and memory depend on besides the model: the device. Imports no torch.

    Args:
        device: as in ``model.device``.
    """
    names = [] if device == "cpu" else gpus.visible()
    where: dict[str, Any]
    if names:
        models = gpus.models()
        alike = len(set(models)) <= 1
        where = {"gpu": models[:1] if alike else {"of": models, "visible": names, "device": device}}
        where["number"] = len(names) if device == "balanced" else 1
    else:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on a Mac
        where = {"cpu": _cpu_model(), "number": usable}
    return where


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def check(num_runs: int, num_warmup: int) -> None:
    """Raise `UserError` unless some of the runs count."""
    if num_warmup >= num_runs:
        raise UserError(
            f"evaluation.efficiency.num_warmup={num_warmup} must be less than evaluation.efficiency.num_runs={num_runs}"
        )


def check_lengths(prompt_len: int | None, output_len: int, max_positions: int | None) -> None:
    """Raise `UserError` unless there is something to go on from, and a position for every token.

    Args:
        prompt_len: tokens of the prompt; None where no tokenizer has seen it yet: at least one.
        max_positions: of the model; None if unknown.
    """
    if prompt_len == 0:
        raise UserError("evaluation.efficiency.prompt: the model's tokenizer makes a prompt of 0 tokens of it")
    if max_positions is not None and (prompt_len or 1) + output_len > max_positions:
        prompt = "any prompt" if prompt_len is None else f"a prompt of {prompt_len} tokens"
        raise UserError(
            f"evaluation.efficiency.output_len={output_len} after {prompt}: the model has {max_positions} positions"
        )


def _synchronize() -> None:
    import torch

    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
