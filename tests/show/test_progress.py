"""What a log and a terminal get of something that takes its time."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from slm_pipeline.show import progress
from slm_pipeline.show.progress import ProgressBar, TerminalHandler


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def bar_of(clock, **options) -> ProgressBar:
    bar = ProgressBar(desc="slm search", unit="window", **options)
    bar.start_t, bar._time = clock.now, lambda: clock.now
    return bar


def test_a_log_gets_a_line_after_ten_seconds_and_then_every_thirty(clock, caplog):
    caplog.set_level(logging.INFO, "slm_pipeline")
    bar = bar_of(clock, total=800, initial=20)
    for seconds, done in ((9, 60), (10, 120), (39, 200), (40, 400), (41, 401)):
        clock.now = 1000.0 + seconds
        bar.n = done
        bar.display()
    bar.close()
    assert caplog.messages == [
        "slm search: 120 of 800 windows, 68 s left",  # 100 in 10 s, 680 to come
        "slm search: 400 of 800 windows, 42 s left",  # 380 in 40 s
    ]


def test_without_a_total_there_is_no_time_left(clock, caplog):
    caplog.set_level(logging.INFO, "slm_pipeline")
    bar = bar_of(clock)
    bar.n, clock.now = 7, 1100.0
    bar.display()
    assert caplog.messages == ["slm search: 7 windows in 2 min"]


def test_a_process_that_is_to_be_quiet_is(clock, caplog):
    caplog.set_level(logging.DEBUG, "slm_pipeline")
    bar = bar_of(clock, total=3, disable=True)
    clock.now = 2000.0
    bar.update(2)
    assert (list(ProgressBar(range(2), disable=True)), caplog.messages) == ([0, 1], [])


def test_on_a_terminal_lines_stand_above_the_bar_and_the_file_has_them_too(clock, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "slm_pipeline")
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    bar = ProgressBar(total=4, desc="training", unit="step")
    bar.n, clock.now = 1, 1060.0
    bar.display()
    TerminalHandler(screen).emit(logging.makeLogRecord({"msg": "validation loss 2.5"}))
    bar.close()
    assert [(record.levelno, record.getMessage()[:22]) for record in caplog.records] == [
        (logging.DEBUG, "training: 1 of 4 steps")
    ]
    before, line, after = screen.getvalue().partition("validation loss 2.5\n")
    assert "training:  25%|" in before
    assert "1 of 4" in before
    assert line
    assert before.endswith("\r")  # the bar was taken away
    assert "training" in after  # and put back
    assert not tqdm._instances or bar not in tqdm._instances
