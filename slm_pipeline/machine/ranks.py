"""Who this process is among those that work together, and what they tell one another. Torch is imported when needed.

Processes work together in two places: those that ``torchrun`` or ``srun`` started, inside of `together.run`, and those
that `recovery.workers` starts for one training. Anywhere else `count` is 1, and everything here does nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from slm_pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_FIRST_PORT, _PORTS = 20000, 12000  # below those that systems give away


@dataclass(frozen=True)
class Launched:
    """One of the processes of a launcher.

    Attributes:
        launcher: in words.
        rank, count: which of how many, from 0.
        local_rank: which on its node.
        host, port: of the first process, where all meet.
    """

    launcher: str
    rank: int
    count: int
    local_rank: int
    host: str
    port: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launched | None:
        """What ``torchrun`` or ``srun`` says in the environment; None where a process is alone.

        Raises:
            UserError: it says half, or no numbers.
        """
        try:
            if int(environment.get("WORLD_SIZE", "1")) > 1 and "RANK" in environment:
                return cls(
                    "torchrun",
                    int(environment["RANK"]),
                    int(environment["WORLD_SIZE"]),
                    int(environment.get("LOCAL_RANK", "0")),
                    environment["MASTER_ADDR"],
                    int(environment["MASTER_PORT"]),
                )
            if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # of a step alone: a batch script is one process
                job = int(environment["SLURM_JOB_ID"]) * 101 + int(environment.get("SLURM_STEP_ID", "0"))
                return cls(
                    "srun",
                    int(environment["SLURM_PROCID"]),
                    int(environment["SLURM_STEP_NUM_TASKS"]),
                    int(environment["SLURM_LOCALID"]),
                    environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
                    int(environment.get("MASTER_PORT") or _FIRST_PORT + job % _PORTS),
                )
        except (KeyError, ValueError) as error:
            raise UserError(f"the launcher's environment does not say which process this is: {error}") from error
        return None


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: ``gpu[03-05,09],login`` -> ``gpu03``."""
    first = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", nodes)
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


_launched: Launched | None = None
_together = False  # whether this process works with others; a group of torch's may be somebody else's


def read_environment() -> Launched | None:
    """Who this process is; `launched` says it from now on."""
    global _launched
    _launched = Launched.of(os.environ)
    if _launched is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no lines about each connection that is lost
    return _launched


def launched() -> Launched | None:
    """Who this process is among those of a launcher, whatever it is at; None where there is no launcher."""
    return _launched


@contextmanager
def together() -> Iterator[None]:
    """The processes of torch's group work together inside."""
    global _together
    _together = True
    try:
        yield
    finally:
        _together = False


@contextmanager
def together_as_launched() -> Iterator[None]:
    """All of the launcher's processes work together inside, and libraries find torchrun's environment."""
    assert _launched is not None
    here = {
        "RANK": _launched.rank,
        "WORLD_SIZE": _launched.count,
        "LOCAL_RANK": gpu_index(_launched.local_rank),
        "MASTER_ADDR": _launched.host,
        "MASTER_PORT": _launched.port,
    }
    os.environ |= {name: str(value) for name, value in here.items()}
    try:
        with together():
            yield
    finally:
        if accelerate := sys.modules.get("accelerate.state"):  # it remembers what it has read
            accelerate.AcceleratorState._reset_state(reset_partial_state=True)


def gpu_index(local_rank: int) -> int:
    """Which of the GPUs in sight is the process's: with ``srun --gpus-per-task=1`` there is a single one."""
    import torch

    return local_rank if local_rank < torch.cuda.device_count() else 0


def _distributed() -> Any:
    """torch.distributed if there is somebody to talk to."""
    torch = sys.modules.get("torch")
    if torch is None or not _together or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


def count() -> int:
    """Processes that work together, at least 1."""
    distributed = _distributed()
    return distributed.get_world_size() if distributed else 1


def rank() -> int:
    """This process's number among them, from 0."""
    distributed = _distributed()
    return distributed.get_rank() if distributed else 0


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def wait() -> None:
    """Return when every process has come as far."""
    if count() > 1:
        _distributed().barrier()


_of_processors: Any = None  # the group that sums what lies in main memory, where the usual one is of GPUs


def sum_on_processors_with(group: Any) -> None:
    """Let `summed` use another group for what does not lie on a GPU."""
    global _of_processors
    _of_processors = group


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, the same in each: any shape and dtype, float64 for what must be exact."""
    if count() > 1:
        values = values.contiguous().clone()
        _distributed().all_reduce(values, group=None if values.is_cuda else _of_processors)
    return values


def of_first(value: float) -> float:
    """What the first process gave; for decisions that all must take alike."""
    if count() == 1:
        return value
    import torch

    device = "cuda" if _distributed().get_backend() == "nccl" else "cpu"
    return float(summed(torch.tensor(value if is_first() else 0.0, dtype=torch.float64, device=device)))


def of_any(value: bool) -> bool:
    """Whether it is so in any of the processes; for what all must do as soon as one has to."""
    if count() == 1:
        return value
    import torch

    device = "cuda" if _distributed().get_backend() == "nccl" else "cpu"
    return bool(summed(torch.tensor(int(value), device=device)))


def gathered(values: list[T]) -> list[T]:
    """What all processes have, one process's after the other's, the same in each; it pickles."""
    if count() == 1:
        return values
    found: list[Any] = [None] * count()
    _distributed().all_gather_object(found, values, group=_of_processors)
    return [value for of_process in found for value in of_process]


@dataclass(frozen=True)
class Share:
    """This process's part of some pieces of work, numbered in their order, that add up to one sum.

    Of fewer pieces than there are processes each does all: nothing is added up then, and no sum lacks a term. What the
    first process has found is then what all go by: on another device, or compiled otherwise, a sum may round otherwise,
    and who decides otherwise would wait for the others, or they for it.

    Attributes:
        numbers: of its pieces, which follow one another.
        divided: whether other processes have others.
    """

    numbers: range
    divided: bool

    @classmethod
    def of(cls, number: int) -> Share:
        """Of so many pieces; all processes must ask alike."""
        processes = count()
        if processes == 1 or number < processes:
            return cls(range(number), False)
        first, end = (number * position // processes for position in (rank(), rank() + 1))
        return cls(range(first, end), True)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all pieces of what this process has summed over its own; the same, to the last bit, in each."""
        return summed(values if self.divided or is_first() else values.new_zeros(values.shape))
