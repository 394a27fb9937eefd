"""What the processes of one training tell one another; with a single process, nothing."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


class Trained(Exception):
    """Ends a process when the finished checkpoints lie on disk and it has nothing more to give."""


def count() -> int:
    """Processes that train together, at least 1."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait() -> None:
    """Return when every process has come as far."""
    if count() > 1:
        distributed.barrier()


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, the same in each: any shape, on the device that trains."""
    if count() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def of_first(value: float, device: torch.device) -> float:
    """What the first process gave; for decisions that all must take alike."""
    return float(summed(torch.tensor(value if rank() == 0 else 0.0, dtype=torch.float64, device=device)))
