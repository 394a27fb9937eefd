"""How processes of a launcher end together, whatever they are at. The whole of it is in tests/jobs/test_launched.py."""

from __future__ import annotations

import queue
import threading
from multiprocessing import Pipe

import pytest

from slm_pipeline.errors import UserError
from slm_pipeline.machine import memory, together
from slm_pipeline.machine.ranks import Launched


class Ended(BaseException):
    """In the place of the end of a process."""


@pytest.fixture
def no_end(monkeypatch):
    def end(status):
        raise Ended(status)

    monkeypatch.setattr(together.os, "_exit", end)


def test_a_process_whose_work_the_first_gives_up_ends_though_it_waits_for_a_gpu(no_end):
    first, own = Pipe()
    calls, working = queue.SimpleQueue(), threading.Event()
    first.send(("call", b"what to do"))
    first.send(("end", b""))
    with pytest.raises(Ended, match="2"):
        together._hear(own, calls, working)
    assert calls.get_nowait() == b"what to do"


def test_a_process_that_has_done_its_work_ends_well(no_end):
    first, own = Pipe()
    calls, working = queue.SimpleQueue(), threading.Event()
    first.send(("end", b""))
    together._hear(own, calls, working)
    assert calls.get_nowait() is None


def test_who_has_ended_between_two_calls_is_not_waited_for():
    leader = together._Leader.__new__(together._Leader)
    leader._place, leader._device, leader._hosts = Launched("srun", 0, 2, 0, "here", 1), "cuda", {1: "gpu04"}
    leader._heard, leader._working, leader._ended = queue.SimpleQueue(), threading.Event(), {}
    other, own = Pipe()
    leader._connections = {1: own}
    other.close()
    leader._listen(1, own)  # nothing is being done: so the command need not end yet
    with pytest.raises(UserError, match="process 1 of 2 on gpu04 ended without a word"):
        leader.run(print, (), {})


def test_peak_memory_is_that_of_the_process_that_took_most():
    leader = together._Leader.__new__(together._Leader)
    leader._place, leader._hosts, leader._connections = (
        Launched("srun", 0, 4, 0, "here", 1),
        {},
        dict.fromkeys((1, 2, 3)),
    )
    leader._heard = queue.SimpleQueue()
    for rank, peak in ((2, 0.001), (3, 1234.5), (1, 1000.0)):
        leader._heard.put((rank, "done", peak))
    with memory.measured() as peak:
        leader._wait_for_all()
    assert peak.gb == 1234.5
    with memory.measured() as peak:
        pass
    assert 0 < peak.gb < 100
