"""Peak memory: of this process alone, since the last reset, and of those that worked for it."""

from __future__ import annotations

import subprocess
import sys

import torch

from slm_pipeline.machine import memory

CHILD = """
from slm_pipeline.machine import memory
block = bytearray(150 * 10**6)
before = memory.peak_gb()
del block
memory.reset_peak()
print(before, memory.peak_gb())
"""


def test_the_peak_is_this_processs_own_and_since_the_last_reset():
    """The parent is larger than its child ever is."""
    block = bytearray(600 * 10**6)
    child = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    del block
    before, after = map(float, child.stdout.split())
    assert 0.15 < before < 0.3
    assert after < 0.1


def test_the_peak_of_processes_that_worked_meanwhile_counts_until_the_next_reset():
    memory.reset_peak()
    memory.note_peak_of_others(1234.5)
    memory.note_peak_of_others(1000.0)
    assert memory.peak_gb() == 1234.5
    memory.reset_peak()
    assert memory.peak_gb() < 100


NESTED = """
from slm_pipeline.machine import memory
memory.reset_peak()
block = bytearray(400 * 10**6)
del block
whole = memory.peak_gb()
with memory.measured() as outer:
    with memory.measured() as inner:
        pass
    block = bytearray(100 * 10**6)
    del block
print(inner.gb, outer.gb, whole, memory.peak_gb())
"""


def test_a_part_is_measured_on_its_own_and_the_whole_still_knows_what_was_before():
    """In a process of its own: one that has run other tests gives memory back when it likes."""
    child = subprocess.run([sys.executable, "-c", NESTED], check=True, capture_output=True, text=True)
    inner, outer, whole, after = map(float, child.stdout.split())
    assert inner < outer - 0.05
    assert outer < whole - 0.2
    assert after == whole


def test_a_job_on_the_processor_of_a_machine_with_gpus_has_a_peak(monkeypatch):
    """Something looked at the GPU, so that torch has begun to use it; nothing was put there."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    allocated = [0]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: allocated[0])
    memory.reset_peak()
    assert 0.05 < memory.peak_gb() < 100
    allocated[0] = 7_000_000_000_000
    assert memory.peak_gb() == 7000
