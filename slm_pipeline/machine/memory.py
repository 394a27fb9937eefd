"""Memory of this process: what it took at most, on the accelerators and beside them, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def of_machine() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free() -> None:
    """Give back what nothing uses any more, GPU memory too."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone keeps small blocks until it is told
        ctypes.CDLL(None).malloc_trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes of tensors on the accelerators."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))


_others_gb = 0.0  # peak since the last reset that this process's counters do not show: of other processes, of before


def reset_peak() -> None:
    """Start a new measurement of peak memory: of the accelerators, and of this process where the system can (Linux)."""
    global _others_gb
    _others_gb = 0.0
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():  # else nothing lies there yet, and torch refuses
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


@dataclass
class Peak:
    """What `measured` found: 10^9 bytes, once it is over."""

    gb: float = 0.0


@contextlib.contextmanager
def measured() -> Iterator[Peak]:
    """Measure the peak of a part of what is being measured: `peak_gb` afterwards still tells that of the whole."""
    before = peak_gb()
    reset_peak()
    peak = Peak()
    try:
        yield peak
    finally:
        peak.gb = peak_gb()
        note_peak_of_others(before)


def note_peak_of_others(gb: float) -> None:
    """Note a peak in 10^9 bytes: of processes that worked while this one waited, all together, or of one that worked
    beside it."""
    global _others_gb
    _others_gb = max(_others_gb, gb)


def peak_gb() -> float:
    """Peak memory in 10^9 bytes since the last reset: of all accelerators, of this process where none was used, or of
    the others; of a launcher's processes that of the one that took most, not of all together."""
    total = 0
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        total = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    return round(max((total or _peak_of_this_process()) / 1e9, _others_gb), 3)


def _peak_of_this_process() -> int:
    """Bytes. getrusage, elsewhere than on Linux, begins with the size of the process that started this one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
