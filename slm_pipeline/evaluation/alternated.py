"""Times of several things that are to be compared: measured in turn, in one process, so that what drifts (clocks,
temperature, other work on the machine) meets all of them alike. Imports no torch.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """What many measurements of one thing say of it.

    Attributes:
        median, q1, q3: the middle one and the quartiles (linear between neighbours).
        mean, std: and their population standard deviation, as the SLM authors give them.
        number: of measurements.
    """

    median: float
    q1: float
    q3: float
    mean: float
    std: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(median, q1, q3, statistics.fmean(values), statistics.pstdev(values), len(values))

    @property
    def error(self) -> float | None:
        """One standard error of the median: 1.253 sigma / sqrt(n), sigma from the quartiles as of a normal
        distribution, which a few slow runs do not move. None of one measurement."""
        return 1.2533 * (self.q3 - self.q1) / 1.349 / math.sqrt(self.number) if self.number > 1 else None


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of two things that were measured in turn, round by round."""
    return Spread.of([first / second for first, second in zip(numerator, denominator, strict=True)])


def alternate(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int, tick: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each of ``runs`` in each counted round, wall clock between synchronisations of every GPU.

    A round calls each once, every other round in reverse, so that none always comes first.

    Args:
        runs: name -> what is timed.
        warm_up: rounds before those that count.
        tick: called after each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name in [*runs] if number % 2 == 0 else [*runs][::-1]:
            synchronize()
            started = time.perf_counter()
            runs[name]()
            synchronize()
            took = time.perf_counter() - started
            if number >= warm_up:
                seconds[name].append(took)
        tick()
    return seconds


def synchronize() -> None:
    """Wait for all that was given to GPUs."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
