"""Signals and the processes that are forked while we listen for them."""

from __future__ import annotations

import subprocess
import sys

FORKS = """
import os, signal, threading, time
os.register_at_fork(after_in_child=lambda: time.sleep(0.2))  # as other libraries may
from slm_pipeline.machine import signals

def fork(number, after):
    child = os.fork()
    if child == 0:
        time.sleep(3)
        os._exit(0)
    time.sleep(after)
    os.kill(child, number)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

with signals.raised():
    fork(signal.SIGTERM, 0)
    fork(signal.SIGTERM, 0.4)
    thread = threading.Thread(target=fork, args=(signal.SIGTERM, 0))
    thread.start()
    thread.join()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        print(type(error).__name__, *signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_a_forked_process_ends_by_sigterm_whenever_it_comes_and_we_still_hear_it():
    outcome = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert outcome.stdout.splitlines() == ["-15", "-15", "-15", "Terminated"]
