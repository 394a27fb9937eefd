"""What each stage will take in memory, before anything is loaded, and the smallest change with which it would fit.

Counted are weights, states, logits and the like, by the configuration's sizes. What PyTorch's allocator keeps in
reserve and a GPU's own context are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slm_pipeline.machine import gpus, memory
from slm_pipeline.models.sizes import ITEM_BYTES, Sizes

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
    """

    num_bytes: int | None
    place: Place
    advice: str | None = None

    def warning(self, stage: str) -> str:
        """That it does not fit, in words."""
        there = (self.place.num_bytes or 0) / 1e9
        return f"{stage} takes {self}, by the estimate, and there are {there:.2f}; {self.advice}"

    def __str__(self) -> str:
        return "" if self.num_bytes is None else f"{self.num_bytes / 1e9:.2f} GB {self.place.name}"


def need(stage: Stage, job: Job) -> Need:
    """What ``stage`` takes."""
    place = Place.of(job.config.model.device)
    sizes = sizes_of(job)
    num_bytes = None if sizes is None else _total(stage, job, sizes, place)
    if num_bytes is None or place.num_bytes is None or num_bytes <= place.num_bytes:
        return Need(num_bytes, place)
    return Need(num_bytes, place, smallest_change(stage, job))


def smallest_change(stage: Stage, job: Job, num_bytes: int | None = None) -> str:
    """The first of the possible changes, the smallest first, with which ``stage`` fits, in words.

    Args:
        num_bytes: into which it is to fit; None: into the place where the model lies, with each change.
    """
    place, sizes = Place.of(job.config.model.device), sizes_of(job)
    for words, other_stage, other_job, other_sizes, other_place in _changes(stage, job, sizes, place) if sizes else ():
        total = _total(other_stage, other_job, other_sizes, other_place)
        there = other_place.num_bytes if num_bytes is None else num_bytes
        if total is not None and there is not None and total <= there:
            return f"{words} would fit, by the estimate"
    return "halve batch sizes or calibration.num_samples, use model.dtype=bfloat16, or a larger machine"


def smaller_than_tried(stage: Stage, job: Job) -> str:
    """What to change where memory ran out although the estimate may have been that it would not: something with which
    ``stage`` takes a fifth less."""
    tried, sizes = need(stage, job), sizes_of(job)
    if tried.num_bytes is None or sizes is None:
        return smallest_change(stage, job)
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


def _total(stage: Stage, job: Job, sizes: Sizes, place: Place) -> int | None:
    found = stage.memory(job, sizes)
    if found is None or not place.is_host:
        return found
    number = job.recovery.num_processes if stage.stage == "recover" and job.recovery is not None else 1
    return number * (found + _OF_PROCESS.get(stage.stage, 0) + _OF_TOKEN * sizes.vocabulary)


def _changes(stage: Stage, job: Job, sizes: Sizes, place: Place) -> Iterator[tuple[str, Stage, Job, Sizes, Place]]:
    for words, other_stage, other_job in stage.halved(job):
        yield words, other_stage, other_job, sizes, place
    if stage.stage in ("calibrate", "merge"):
        number = sizes.num_samples
        while number > 1:
            number //= 2
            yield f"calibration.num_samples={number}", stage, job, replace(sizes, num_samples=number), place
    if stage.stage == "repair" and job.repair is not None:
        number = job.repair.calibration.num_samples
        while number > 2:  # one is held out, one is fitted to
            number //= 2
            text = replace(job.repair.calibration, num_samples=number)
            smaller = replace(job, repair=replace(job.repair, calibration=text))
            yield f"repair.calibration.num_samples={number}", stage, smaller, sizes, place
    if sizes.item_bytes > ITEM_BYTES["bfloat16"]:
        halves = replace(sizes, item_bytes=ITEM_BYTES["bfloat16"])
        yield "model.dtype=bfloat16", stage, job, halves, place
    if job.config.model.source != "random":
        if not place.is_host and len(gpus.visible()) > 1 and job.config.model.device != "balanced":
            yield "model.device=balanced", stage, job, sizes, Place.of("balanced")
        streams = job.method.streams and (job.repair is None or job.repair.streams)
        if stage.stage in ("calibrate", "merge", "repair") and streams:
            yield "model.device=stream", stage, job, replace(sizes, streams=True), place
