"""Two processes that work together, as threads of this one: what they sum and gather goes through a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch

from slm_pipeline.machine import ranks

T = TypeVar("T")


class _Distributed:
    """In the place of torch.distributed; whoever waits alone fails with a `threading.BrokenBarrierError`."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._given: dict[int, Any] = {}
        self.of_thread = threading.local()

    def get_world_size(self) -> int:
        return 2

    def get_rank(self) -> int:
        return self.of_thread.rank

    def get_backend(self) -> str:
        return "gloo"

    def barrier(self) -> None:
        self._barrier.wait()

    def all_reduce(self, values: torch.Tensor, group: Any) -> None:
        values.copy_(sum(self._exchanged(values.clone())))

    def all_gather_object(self, found: list[Any], own: Any, group: Any) -> None:
        found[:] = self._exchanged(own)

    def _exchanged(self, own: Any) -> list[Any]:
        self._given[self.get_rank()] = own
        self._barrier.wait()
        found = [self._given[0], self._given[1]]
        self._barrier.wait()  # before the next values are given
        return found


def of_both(monkeypatch: pytest.MonkeyPatch, work: Callable[[], T]) -> list[T]:
    """What ``work`` returns in the first and in the second process, or the `Exception` that it raised there."""
    distributed = _Distributed()

    def as_process(rank: int) -> Any:
        distributed.of_thread.rank = rank
        try:
            return work()
        except Exception as error:
            return error

    with monkeypatch.context() as patch:
        patch.setattr(ranks, "_distributed", lambda: distributed)
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(as_process, range(2)))
