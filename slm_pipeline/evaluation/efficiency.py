"""Speed and memory of a model that generates, beside the dense model's.

What is timed is a *setting*: so many copies of a prompt are read, then each goes on for so many tokens. The dense model
takes turns with the one that is measured, in one process, and the ratio is taken round by round, so that what drifts
meets both.

The default setting is the SLM authors': a prompt repeated ``batch_size`` times (1), sampling with top-k 50 and top-p
0.95 at temperature 1, KV cache on, exactly 128 new tokens, 30 runs of which the first 10 are discarded. They give mean
and population standard deviation, which are kept; the numbers here are medians. They take the time with CUDA events,
here it is the wall clock between synchronisations of every GPU, which also holds for a model that is spread over
several. ``evaluation=efficiency_come`` is the CoMe authors' (SLEB's): 64 prompts of 64 random tokens that go on for
128, and one of 2,048 that is only read, without a cache; 10 runs after one to warm up. Theirs reads that prompt 50
times instead of 10, and computes the logits of all its tokens; here it is those of the last, which generation needs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import BatchSize, Count, CountOrZero, Text, Tokens
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.alternated import Spread, alternate, ratios
from slm_pipeline.evaluation.measure import Measure, Scored
from slm_pipeline.machine import gpus, memory
from slm_pipeline.models.context import Context
from slm_pipeline.results.number import Number
from slm_pipeline.show.progress import ProgressBar

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pipeline.models.sizes import Sizes

log = logging.getLogger(__name__)

MODES = ("eager", "compile", "graph")
_OPTION = "evaluation.efficiency"


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        batch_size: prompts that are read at once.
        prompt_len: random tokens of each; None: the text ``prompt``, as the tokenizer cuts it.
        new: tokens by which each goes on; 0: it is only read.
    """

    batch_size: int
    prompt_len: int | None
    new: int

    @classmethod
    def of(cls, text: str) -> Setting:
        """``8x512``: 8 prompts, 512 new tokens each; ``64x64+128``: of 64 random tokens; ``1x2048+0``: only read.

        Raises:
            UserError: it is neither, or a number is out of its range.
        """
        found = re.fullmatch(r"(\d{1,7})x(?:(\d{1,7})\+)?(\d{1,7})", text)
        if not found:
            raise UserError(
                f"{_OPTION}.grid has {text!r}; write BATCHxNEW, as 8x512, or BATCHxPROMPT+NEW with a prompt of so many"
                " random tokens, as 64x64+128"
            )
        batch_size, prompt_len, new = (None if number is None else int(number) for number in found.groups())
        setting = cls(batch_size or 0, prompt_len, new or 0)
        if not (1 <= setting.batch_size <= 2**16 and setting.new <= 2**20 and prompt_len != 0):
            raise UserError(f"{_OPTION}.grid has {text!r}: a batch of 1 to 65536, a prompt of at least 1 token")
        if setting.new == 0 and prompt_len is None:
            raise UserError(
                f"{_OPTION}.grid has {text!r}, which generates nothing; a prompt is only read as in 1x2048+0"
            )
        return setting


@dataclass(kw_only=True)
class Efficiency(Measure):
    """Speed and memory of generation; see the module, and `efficiency` for what is measured.

    The setting of ``batch_size``, ``prompt`` or ``prompt_len``, and ``output_len`` is the measure's part without a
    name; each of ``grid`` is one by its own.

    Of processes that a launcher started the first measures alone, on its own device: a speed cannot be shared out.
    """

    enabled: bool = False
    # eager | compile | graph: `generate` as it is; greedy decoding with a cache of fixed size, the step for one token
    # compiled by torch, or captured as a CUDA graph and replayed: without the time that Python takes
    mode: str = "eager"
    batch_size: BatchSize = 1
    output_len: Tokens = 128
    grid: list[str] = field(default_factory=list)  # further settings: BATCHxNEW or BATCHxPROMPT+NEW, as 8x512
    num_runs: Count = 30
    num_warmup: CountOrZero = 10  # of the runs, not counted
    prompt: Annotated[str, Text(lines=True, empty=False)] = "The Leaning Tower of Pisa is known for"
    prompt_len: Tokens | None = None  # random tokens in place of the prompt
    beside_dense: bool = True  # the dense model takes turns; false: no ratios, and memory for one model alone

    name: ClassVar[str] = "efficiency"
    version: ClassVar[int] = 2  # 2: medians

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_runs, self.num_warmup)
        check_mode(f"{_OPTION}.mode", self.mode)
        for text in self.grid:
            Setting.of(text)

    @property
    def reads_dense(self) -> bool:
        return self.beside_dense

    def setting(self, part: str) -> Setting:
        return Setting.of(part) if part else Setting(self.batch_size, self.prompt_len, self.output_len)

    def parts(self) -> list[str]:
        return ["", *self.grid] if self.enabled else []

    def names(self, part: str) -> list[str]:
        setting = self.setting(part)
        timed = ["prompt_seconds"]
        if setting.new:
            timed = ["tokens_per_second", "latency_seconds", *timed]
        if setting.new > 1:
            timed += ["token_seconds"]
        compared = [_SPEEDUPS[name] for name in timed if name in _SPEEDUPS] if self.beside_dense else []
        return [*timed, *compared, "peak_memory_gb", *([] if part else _SIZES)]

    def check(self, context: Context) -> None:
        check_mode(f"{_OPTION}.mode", self.mode, context.config.model.device)
        for part in self.parts():
            setting = self.setting(part)
            check_lengths(setting.prompt_len, setting.new, context.source.max_positions)

    def identity(self, part: str, context: Context) -> dict[str, Any]:
        setting = self.setting(part)
        return {
            **asdict(setting),
            "prompt": self.prompt if setting.prompt_len is None else None,
            **{name: getattr(self, name) for name in ("mode", "num_runs", "num_warmup")},
            "beside_dense": self.beside_dense,
            "machine": machine(context.config.model.device),
        }

    def preflight(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> None:
        from slm_pipeline.models.loading import num_positions

        check_machine(f"{_OPTION}.mode", self.mode, context.config.model.device)
        setting = self.setting(part)
        length = len(tokenizer(self.prompt)["input_ids"]) if setting.prompt_len is None else setting.prompt_len
        check_lengths(length, setting.new, num_positions(context.source))

    def memory(self, part: str, sizes: Sizes) -> int:
        """The prompt in a block, or logits in float32, some times over for sampling; and keys and values of all tokens,
        with caches of fixed size those of both models."""
        setting = self.setting(part)
        prompt = (
            len(self.prompt) if setting.prompt_len is None else setting.prompt_len
        )  # a token is a character or more
        caches = 2 if self.mode != "eager" and self.beside_dense else 1
        keys_and_values = 2 * sizes.keys * sizes.item_bytes * (sizes.layers + sizes.removed)
        logits = (sizes.item_bytes + 4 * 4) * setting.batch_size * sizes.vocabulary
        kept = caches * setting.batch_size * (prompt + setting.new) * keys_and_values
        return kept + max(sizes.running(setting.batch_size * prompt), logits)

    def smaller(self, part: str) -> Iterator[tuple[str, Measure, str]]:
        """Smaller batches, of ``grid`` where the part is one of its settings; then a model alone, with those too."""
        ways: list[tuple[str, Efficiency]] = [("", self)]
        if self.beside_dense:
            ways.append((f"{_OPTION}.beside_dense=false", replace(self, beside_dense=False)))
        for words, measure in ways:
            if words:
                yield words, measure, part
            if not part:
                for more, other, _ in super(Efficiency, measure).smaller(part):
                    yield f"{words} {more}".strip(), other, part
                continue
            size, _, rest = part.partition("x")
            for number in (int(size) >> step for step in range(1, int(size).bit_length())):
                setting = f"{number}x{rest}"
                grid = [setting if text == part else text for text in self.grid]
                other = replace(measure, grid=grid)
                yield f"{words} {_OPTION}.grid=[{','.join(grid)}]".strip(), other, setting

    def run(self, part: str, scored: Scored, context: Context) -> dict[str, Any]:
        return efficiency(
            scored.model,
            scored.tokenizer,
            self.setting(part),
            mode=self.mode,
            num_runs=self.num_runs,
            num_warmup=self.num_warmup,
            prompt=self.prompt,
            dense=(lambda: scored.dense) if self.beside_dense else None,
        )

    def numbers(self, part: str, found: Mapping[str, Any]) -> list[Number]:
        counted = found["num_runs"] - found["num_warmup"]
        how = (
            f"{found['device']}, {found['dtype']}, {found['mode']}, batch size {found['batch_size']}, prompt of"
            f" {found['prompt_len']} tokens, {found['output_len']} new, median of {counted} runs after"
            f" {found['num_warmup']} to warm up"
        )
        names = ("device", "dtype", "mode", "batch_size", "prompt_len", "output_len", "num_runs", "num_warmup")
        measured = {"how": how, **{name: found[name] for name in names}}
        against = {**measured, "how": f"{how}, in turn with the dense model"}
        numbers = []
        for name, said in found["spread"].items():
            spread, is_ratio = Spread(**said), name in _SPEEDUPS.values()
            unit = "" if is_ratio else "tokens/s" if name == "tokens_per_second" else "seconds"
            numbers.append(
                Number(
                    name,
                    spread.median,
                    unit,
                    spread.error,
                    is_ratio or name == "tokens_per_second",
                    against if is_ratio else measured,
                    detail=name not in ("tokens_per_second", "speedup") or bool(part),
                )
            )
        if found["peak_memory_gb"] is not None:
            numbers.append(Number("peak_memory_gb", found["peak_memory_gb"], "GB", None, False, measured, detail=True))
        units = dict(zip(_SIZES, ("GB", "parameters", "bytes"), strict=True))
        if not part:  # the same in every setting
            numbers += [Number(name, found[name], unit, None, False, {}, detail=True) for name, unit in units.items()]
        return numbers


_SPEEDUPS = {"latency_seconds": "speedup", "prompt_seconds": "prompt_speedup", "token_seconds": "token_speedup"}
_SIZES = ["weights_gb", "num_parameters", "cache_bytes_per_token"]


def efficiency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    *,
    mode: str,
    num_runs: int,
    num_warmup: int,
    prompt: str,
    dense: Callable[[], PreTrainedModel] | None = None,
) -> dict[str, Any]:
    """Time how a model reads a prompt and goes on from it, and measure its memory.

    Args:
        model: any causal language model; is left in evaluation mode.
        tokenizer: the model's.
        mode: see `Efficiency.mode`.
        num_runs: of each of the two, the discarded ones included.
        num_warmup: of these, the first ones, which are not counted.
        prompt: any text; not read where the setting has a ``prompt_len``.
        dense: gives the dense model, which takes turns; called once the memory of ``model`` is measured.

    Returns:
        spread: for each of these a `Spread`: latency_seconds (the prompt read, and all tokens generated),
        tokens_per_second (new tokens of all copies), prompt_seconds (the prompt read; without a cache in mode eager),
        token_seconds (of the tokens after the first, each: latency less prompt), and with ``dense``, unless it is
        ``model``, the dense model's time over this one's: speedup, prompt_speedup, token_speedup. Beside them the
        medians by name, with ``_std`` population standard deviations; runs, all counted seconds of both; weights_gb
        (10^9 bytes of what a checkpoint holds), num_parameters, cache_bytes_per_token, peak_memory_gb (of all GPUs
        while this model alone runs, other models' weights not counted; None on a CPU, where a process's peak also
        holds what ran before), prompt_len, device, dtype and the settings.

    Raises:
        UserError: unusable settings, more tokens than the model has positions for, or not enough memory.
    """
    import torch

    from slm_pipeline.evaluation.decoding import cache_bytes_per_token, generation

    check(num_runs, num_warmup)
    input_ids = prompts(model, tokenizer, setting, prompt)
    prompt_len = input_ids.shape[1]
    check_lengths(prompt_len, setting.new, getattr(model.config, "max_position_embeddings", None))
    new = setting.new
    runs: dict[str, Callable[[], Any]] = {}

    def add(name: str, of: PreTrainedModel) -> None:
        made = generation(mode, of.eval(), input_ids.to(of.device), new, tokenizer.pad_token_id)
        runs[f"{name} prompt"] = made.read
        if new:
            runs[f"{name} whole"] = made.run
        shape = tuple(made.run().shape)
        if shape != (setting.batch_size, prompt_len + new):
            raise RuntimeError(f"generated {shape}, expected {(setting.batch_size, prompt_len + new)}")

    with (
        torch.no_grad(),
        ProgressBar(total=num_runs, desc="generation speed") as progress,
    ):
        others = memory.allocated() - _bytes(model)
        with memory.measured() as peak:
            add("own", model)
        beside = None if dense is None else dense()
        if beside is not None and beside is not model:
            add("dense", beside)
        seconds = alternate(runs, rounds=num_runs - num_warmup, warm_up=num_warmup, tick=progress.update)
        runs.clear()
        memory.free()  # caches and graphs hold one another: the next setting needs their memory
        per_token = cache_bytes_per_token(model)
    times = {name: _times(seconds, name, new) for name in ("own", "dense") if f"{name} prompt" in seconds}
    spread = {name: Spread.of(values) for name, values in times["own"].items()}
    if "latency_seconds" in times["own"]:
        speeds = Spread.of([setting.batch_size * new / latency for latency in times["own"]["latency_seconds"]])
        spread = {"tokens_per_second": speeds, **spread}
    if "dense" in times:
        spread |= {_SPEEDUPS[name]: ratios(times["dense"][name], values) for name, values in times["own"].items()}
    log.info("generation: %s", ", ".join(f"{name} {of.median:.4g}" for name, of in spread.items()))
    is_cuda = model.device.type == "cuda"
    return {
        **{name: of.median for name, of in spread.items()},
        **{f"{name}_std": of.std for name, of in spread.items()},
        "spread": {name: asdict(of) for name, of in spread.items()},
        "runs": times,
        "weights_gb": _bytes(model) / 1e9,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cache_bytes_per_token": per_token,
        "peak_memory_gb": round(peak.gb - max(0, others) / 1e9, 3) if is_cuda else None,
        "prompt_len": prompt_len,
        "device": device_in_words(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mode": mode,
        "batch_size": setting.batch_size,
        "output_len": new,
        "num_runs": num_runs,
        "num_warmup": num_warmup,
        "prompt": prompt if setting.prompt_len is None else None,
    }


def prompts(model: PreTrainedModel, tokenizer: Any, setting: Setting, prompt: str) -> Tensor:
    """[batch, length] int64 tokens on the model's device: copies of the prompt, or random ones, always the same."""
    import torch

    if setting.prompt_len is None:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]] * setting.batch_size, dtype=torch.int64)
    else:
        generator = torch.Generator().manual_seed(0)
        size = (setting.batch_size, setting.prompt_len)
        ids = torch.randint(0, model.config.vocab_size, size, generator=generator)
    return ids.to(model.device)


def _times(seconds: Mapping[str, list[float]], name: str, new: int) -> dict[str, list[float]]:
    """Seconds by what they are of, of each round."""
    prompt = seconds[f"{name} prompt"]
    if not new:
        return {"prompt_seconds": prompt}
    whole = seconds[f"{name} whole"]
    times = {"latency_seconds": whole, "prompt_seconds": prompt}
    if new > 1:
        # the first token comes with the prompt; where it takes almost all the time their difference may be noise
        times["token_seconds"] = [
            max(total - read, 1e-9) / (new - 1) for total, read in zip(whole, prompt, strict=True)
        ]
    return times


def device_in_words(model: PreTrainedModel) -> str:
    """What numbers are compared by: two devices of one name are alike."""
    import torch

    if model.device.type != "cuda":
        usable = machine("cpu")
        return f"{usable['number']} x {usable['cpu']}"
    names = [torch.cuda.get_device_name(device) for device in {parameter.device for parameter in model.parameters()}]
    return f"{len(names)} x {names[0]}" if len(names) > 1 else names[0]


def _bytes(model: PreTrainedModel) -> int:
    """Of what a checkpoint holds: parameters and buffers that are saved, shared ones once."""
    unique = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


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


def check_mode(option: str, mode: str, device: str = "auto") -> None:
    """Raise `UserError` unless ``option`` is a mode of generation that ``model.device`` can have.

    The machine's GPUs are not looked at: it may not be the one that measures.
    """
    if mode not in MODES:
        raise UserError(f"{option}={mode!r} is not one of {', '.join(MODES)}")
    if mode != "eager" and device == "balanced":
        raise UserError(f"{option}={mode} decodes on one device, not on model.device=balanced")
    if mode == "graph" and device == "cpu":
        raise _no_gpu(option, device)


def check_machine(option: str, mode: str, device: str) -> None:
    """Raise `UserError` if the mode needs a GPU, or a compiler, and there is none here."""
    if mode == "graph" and device == "auto" and not gpus.visible():
        raise _no_gpu(option, device)
    if mode == "compile" and not any(map(shutil.which, _compilers())):
        raise UserError(
            f"{option}=compile: torch.compile needs a C++ compiler, and there is none here ({', '.join(_compilers())}):"
            f" install one, or use {option}=eager{' or graph' if gpus.visible() else ''}"
        )


def _compilers() -> list[str]:
    named = [value for name in ("CXX", "CC") if (value := os.environ.get(name))]
    return [*named, "g++", "clang++", "gcc", "clang"]


def _no_gpu(option: str, device: str) -> UserError:
    return UserError(
        f"{option}=graph replays a CUDA graph, and model.device={device} is the CPU here; use {option}=eager or compile"
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
