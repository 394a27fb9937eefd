"""What each stage will take in memory, before anything is loaded, and the smallest change with which it would fit.

Counted are weights, states, logits and the like, by the configuration's sizes. What PyTorch's allocator keeps in
reserve and a GPU's own context are not in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from slm_pipeline.machine import gpus, memory
from slm_pipeline.models.sizes import ITEM_BYTES, Sizes
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.recovery.lora import Lora

if TYPE_CHECKING:
    from slm_pipeline.jobs.job import Job
    from slm_pipeline.jobs.stages.base import Stage

GPU_CONTEXT = 1_000_000_000  # bytes of a GPU that no tensor can have
_OF_TOKEN = 2700  # bytes in this process of an entry of a tokenizer's vocabulary
_OF_PROCESS = {  # bytes of this process with all that a stage imports
    "calibrate": 500_000_000,
    "merge": 450_000_000,
    "repair": 450_000_000,
    "recover": 700_000_000,
    "evaluate": 770_000_000,
}


@dataclass(frozen=True)
class Place:
    """The memory that a job's models lie in.

    Attributes:
        name: in words.
        num_bytes: that it has; None where that is not known.
        is_host: whether the process itself lies there too.
    """

    name: str
    num_bytes: int | None
    is_host: bool

    @classmethod
    def of(cls, device: str) -> Place:
        """Where ``model.device`` puts a model."""
        there = [] if device == "cpu" else gpus.memory()
        if device == "cpu" or not gpus.visible():
            return cls("of main memory", memory.of_machine(), True)
        if device == "balanced":
            return cls(f"on {len(there)} GPUs", sum(there) - len(there) * GPU_CONTEXT if there else None, False)
        index = int(device.partition(":")[2] or 0)
        return cls("of GPU memory", there[index] - GPU_CONTEXT if index < len(there) else None, False)


@dataclass(frozen=True)
class Need:
    """What a stage takes at the most.

    Attributes:
        num_bytes: on one device, of each process there the same; None where it cannot be told: of a model that would
            have to be fetched first, of a recovery or a measure that says nothing of it.
        place: where.
        advice: the smallest change with which it would fit, in words; None where it fits.
        host_bytes: in main memory too, where the model does not lie there; None where it cannot be told.
        host: how much main memory there is.
    """

    num_bytes: int | None
    place: Place
    advice: str | None = None
    host_bytes: int | None = None
    host: int | None = None

    def warning(self, stage: str) -> str:
        """That it does not fit, in words."""
        there, taken = self.place.num_bytes, str(self)
        if self.host_bytes is not None and self.host is not None and self.host_bytes > self.host:
            there, taken = self.host, f"{self.host_bytes / 1e9:.2f} GB of main memory"
        return f"{stage} takes {taken}, by the estimate, and there are {(there or 0) / 1e9:.2f}; {self.advice}"

    def __str__(self) -> str:
        return "" if self.num_bytes is None else f"{self.num_bytes / 1e9:.2f} GB {self.place.name}"


def need(stage: Stage, job: Job) -> Need:
    """What ``stage`` takes."""
    place, sizes = Place.of(job.config.model.device), sizes_of(job)
    if sizes is None:
        return Need(None, place)
    tried = _Tried(stage, job, sizes, place)
    host_bytes, host = (None, None) if place.is_host else (tried.host_bytes, memory.of_machine())
    found = Need(tried.num_bytes, place, None, host_bytes, host)
    return found if tried.fits() else replace(found, advice=smallest_change(stage, job))


def smallest_change(stage: Stage, job: Job, num_bytes: int | None = None) -> str:
    """The first of the possible changes, the smallest first, with which ``stage`` fits, in words.

    Args:
        num_bytes: into which it is to fit; None: into the place where the model lies, with each change.
    """
    sizes = sizes_of(job)
    least: _Tried | None = None
    for tried in _changed(_Tried(stage, job, sizes, Place.of(job.config.model.device))) if sizes else ():
        if (taken := tried.num_bytes) is None:
            continue
        if tried.fits(num_bytes):
            return f"{' '.join(tried.words)} would fit, by the estimate"
        if least is None or taken < (least.num_bytes or 0):
            least = tried
    larger = "take a larger machine, or a smaller model"
    if least is None:
        return larger
    return f"{' '.join(least.words)} takes least, {(least.num_bytes or 0) / 1e9:.2f} GB; else {larger}"


def smaller_than_tried(stage: Stage, job: Job) -> str:
    """What to change where memory ran out although the estimate may have been that it would not: something with which
    ``stage`` takes a fifth less."""
    tried = need(stage, job)
    if tried.num_bytes is None:
        return "halve batch sizes or samples, use model.dtype=bfloat16, or a larger machine"
    there = tried.place.num_bytes or tried.num_bytes
    return smallest_change(stage, job, min(there, tried.num_bytes * 4 // 5))


def sizes_of(job: Job) -> Sizes | None:
    """Those of the dense model and the calibration text; None of a model that would have to be fetched first."""
    if job.source.description is None:
        return None
    return Sizes.of(
        job.source.description,
        job.config.model.dtype,
        num_samples=job.config.calibration.num_samples,
        seq_len=job.config.calibration.seq_len,
        streams=job.config.model.device == "stream",
        on_host=Place.of(job.config.model.device).is_host,
    )


@dataclass(frozen=True)
class _Tried:
    """A stage of a job with some changes, which ``words`` says as overrides."""

    stage: Stage
    job: Job
    sizes: Sizes
    place: Place
    words: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int | None:
        """Where the model lies, of all processes that lie there."""
        found = self.stage.memory(self.job, self.sizes)
        return found + self.host_bytes if found is not None and self.place.is_host else found

    @property
    def host_bytes(self) -> int:
        """Of all processes in main memory, what lies where the model does aside."""
        recovery = self.job.recovery if self.stage.stage == "recover" else None
        of_process = _OF_PROCESS.get(self.stage.stage, 0) + _OF_TOKEN * self.sizes.vocabulary
        number = 1 if recovery is None else recovery.num_processes
        return number * (self.stage.host_memory(self.job, self.sizes) + of_process)

    def fits(self, num_bytes: int | None = None) -> bool:
        """Into so many bytes where the model lies, None: that there are, and into main memory."""
        there = self.place.num_bytes if num_bytes is None else num_bytes
        taken = self.num_bytes
        if taken is not None and there is not None and taken > there:
            return False
        return self.place.is_host or self.host_bytes <= memory.of_machine()

    def having(self, words: str, **changed: Any) -> _Tried:
        return replace(self, words=(*self.words, words), **changed)


def _changed(start: _Tried) -> Iterator[_Tried]:
    """Changes, the smallest first: smaller batches or less text; then what makes more of it smaller, one such thing,
    alone and with the former, then two, and so on."""
    for number in range(len(_LARGER) + 1):
        for changes in itertools.combinations(_LARGER, number):
            tried: _Tried | None = start
            for change in changes:
                tried = None if tried is None else change(tried)
            if tried is not None and changes:
                yield tried
            if tried is not None:
                yield from _smaller(tried)


def _smaller(tried: _Tried) -> Iterator[_Tried]:
    stage, job, sizes = tried.stage, tried.job, tried.sizes
    for words, other_stage, other_job in stage.smaller(job):
        yield tried.having(words, stage=other_stage, job=other_job)
    if stage.stage in ("calibrate", "merge"):
        number = sizes.num_samples
        while number > 1:
            number //= 2
            yield tried.having(f"calibration.num_samples={number}", sizes=replace(sizes, num_samples=number))
    if stage.stage == "repair" and job.repair is not None:
        number = job.repair.calibration.num_samples
        while number > 2:  # one is held out, one is fitted to
            number //= 2
            text = replace(job.repair.calibration, num_samples=number)
            smaller = replace(job, repair=replace(job.repair, calibration=text))
            yield tried.having(f"repair.calibration.num_samples={number}", job=smaller)


def _in_16_bits(tried: _Tried) -> _Tried | None:
    if tried.sizes.item_bytes <= ITEM_BYTES["bfloat16"]:
        return None
    return tried.having("model.dtype=bfloat16", sizes=replace(tried.sizes, item_bytes=ITEM_BYTES["bfloat16"]))


def _trained_in_16_bits(tried: _Tried) -> _Tried | None:
    recovery: Any = tried.job.recovery
    if tried.stage.stage != "recover" or getattr(recovery, "dtype", "") != "float32":
        return None
    other = replace(tried.job, recovery=replace(recovery, dtype="bfloat16"))
    return tried.having("recovery.dtype=bfloat16", job=other)


def _is_placed(tried: _Tried) -> bool:
    """Whether the job, or a change before, says something else of where the model lies than one device."""
    asked = {tried.job.config.model.device, *(word.removeprefix("model.device=") for word in tried.words)}
    return bool(asked & {"balanced", "stream"})


def _over_gpus(tried: _Tried) -> _Tried | None:
    is_there = not tried.place.is_host and len(gpus.visible()) > 1 and tried.job.config.model.source != "random"
    if not is_there or _is_placed(tried):
        return None
    return tried.having("model.device=balanced", place=Place.of("balanced"))


def _from_disk(tried: _Tried) -> _Tried | None:
    job, sizes = tried.job, tried.sizes
    can = job.config.model.source != "random" and job.method.streams and (job.repair is None or job.repair.streams)
    if _is_placed(tried) or not can or tried.stage.stage not in ("calibrate", "merge", "repair"):
        return None
    return tried.having("model.device=stream", sizes=replace(sizes, streams=True))


def _computed_again(tried: _Tried) -> _Tried | None:
    recovery: Any = tried.job.recovery
    if tried.stage.stage != "recover" or getattr(recovery, "gradient_checkpointing", True):
        return None
    other = replace(tried.job, recovery=replace(recovery, gradient_checkpointing=True))
    return tried.having("recovery.gradient_checkpointing=true", job=other)


def _quantized(tried: _Tried) -> _Tried | None:
    recovery: Any = tried.job.recovery
    if tried.stage.stage != "recover" or getattr(recovery, "quantize", "") is not None:
        return None
    if recovery.sharding or recovery.use_dora:
        return None
    other = replace(tried.job, recovery=replace(recovery, quantize="nf4"))
    return tried.having("recovery.quantize=nf4", job=other)


def _adapters(tried: _Tried) -> _Tried | None:
    recovery = tried.job.recovery
    if tried.stage.stage != "recover" or not isinstance(recovery, FineTuning) or isinstance(recovery, Lora):
        return None
    shared = {field.name: getattr(recovery, field.name) for field in fields(Lora) if hasattr(recovery, field.name)}
    return tried.having("recovery=lora", job=replace(tried.job, recovery=Lora(**shared)))


# What makes a stage smaller as a whole, what costs least first.
_LARGER: tuple[Callable[[_Tried], _Tried | None], ...] = (
    _in_16_bits, _trained_in_16_bits, _computed_again, _over_gpus, _from_disk, _adapters, _quantized,
)  # fmt: skip
