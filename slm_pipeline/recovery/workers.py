"""Train in several processes of this host, as one: their losses, log lines and errors come out here."""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING

from slm_pipeline.errors import UserError, portable
from slm_pipeline.machine import memory, ranks
from slm_pipeline.recovery.base import Log, Recovery, RecoveryProblem

if TYPE_CHECKING:
    import torch


def train(recovery: Recovery, make_problem: Callable[[Log], RecoveryProblem], log: Log) -> None:
    """Run ``recovery`` in ``recovery.num_processes`` new processes, until its finished checkpoints lie in ``out``.

    After that, `Recovery.run` in this process has nothing left to train. If this process is killed, the others end
    too; what they had finished is found by the next attempt. `memory.peak_gb` knows of their memory afterwards.

    Args:
        make_problem: called in each process, with what its problem should log to; it must pickle. The model must lie
            on the process's own GPU, which is the current one (``cuda``), or on the CPU.
        log: as in `RecoveryProblem`; called here, as it goes, with what the first process logs.

    Raises:
        UserError: one that ended a process, or a process was killed. Any other error of a process is raised as it is.
    """
    context = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    level = logging.getLogger("slm_pipeline").getEffectiveLevel()
    processes: dict[Connection, SpawnProcess] = {}
    with tempfile.TemporaryDirectory(prefix="slm_") as folder:
        try:
            for rank in range(recovery.num_processes):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (recovery, make_problem, rank, Path(folder) / "meeting_point", level, sender)
                process = context.Process(target=_work, args=arguments, name=f"recovery-{rank}")
                processes[receiver] = process
                process.start()
                sender.close()  # so that the end of the process is the end of its messages
            _listen(dict(processes), log)
        finally:
            for process in processes.values():
                if process.pid is not None:
                    process.kill()
                    process.join()


def _listen(processes: dict[Connection, SpawnProcess], log: Log) -> None:
    """Pass on what the processes send until all have ended well."""
    peak_memory_gb = 0.0
    while processes:
        ready = connection.wait(list(processes))
        for receiver in [receiver for receiver in processes if receiver in ready]:  # the first process's losses first
            while receiver in processes and receiver.poll():
                try:
                    kind, *content = receiver.recv()
                except EOFError:
                    process = processes.pop(receiver)
                    process.join()
                    _require_good_end(process)
                    continue
                if kind == "log":
                    log(*content)
                elif kind == "peak memory":
                    peak_memory_gb += content[0]
                elif kind == "record":
                    (record,) = content
                    if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                        logger.handle(record)
                else:
                    error, where = content
                    if not isinstance(error, UserError):  # perhaps only the consequence of a process that was killed
                        for process in processes.values():
                            if (process.exitcode or 0) < 0:
                                _require_good_end(process)
                    raise error from RuntimeError(f"in a training process:\n{where}")
    memory.note_peak_of_others(peak_memory_gb)


def _require_good_end(process: SpawnProcess) -> None:
    """Raise `UserError` if the process has ended and said nothing of an error."""
    if process.exitcode:
        if process.exitcode < 0:
            how = f"signal {-process.exitcode}, which is how a system that lacks memory ends processes"
        else:
            how = f"status {process.exitcode}, for the reason printed above"
        raise UserError(
            f"recovery: the training process {process.name} ended with {how}; the same command goes on from the last"
            " checkpoint"
        )


def _work(
    recovery: Recovery,
    make_problem: Callable[[Log], RecoveryProblem],
    rank: int,
    meeting_point: Path,
    level: int,
    sender: Connection,
) -> None:
    """What each process does."""
    for one in (signal.SIGINT, signal.SIGTERM):  # sent to a group they reach the parent too, which ends this process
        signal.signal(one, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from torch import distributed

        from slm_pipeline.recovery.collective import Trained

        _send_log_records(sender if rank == 0 else None, level)
        _become(rank, recovery.num_processes)
        problem = make_problem(lambda metrics, step: sender.send(("log", metrics, step)) if rank == 0 else None)
        _meet(problem.model.device, rank, recovery.num_processes, meeting_point)
        with ranks.together(), suppress(Trained):
            recovery.run(problem)
        sender.send(("peak memory", memory.peak_gb()))
        distributed.destroy_process_group()
    except BaseException as error:
        sender.send(("error", portable(error), traceback.format_exc()))
        sys.stderr.flush()
        os._exit(1)  # the ordinary end waits for the other processes


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Sender(logging.handlers.QueueHandler):
    """Sends log records, made fit for it by the base class."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(("record", record))  # type: ignore[attr-defined]


def _send_log_records(sender: Connection | None, level: int) -> None:
    """Send this package's records, of the first process alone: the others' would say the same again."""
    logger = logging.getLogger("slm_pipeline")
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(logging.NullHandler() if sender is None else _Sender(sender))  # type: ignore[arg-type]


def _become(rank: int, count: int) -> None:
    """Say who this process is, as accelerate reads it, and choose its GPU."""
    import torch

    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    if rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)


def _meet(device: torch.device, rank: int, count: int, meeting_point: Path) -> None:
    """Through a file, not a port that another job could take."""
    from torch import distributed

    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=count,
        timeout=timedelta(days=1),  # a process that ends is noticed by the parent; one that writes slowly is no error
        device_id=device if device.type == "cuda" else None,
    )
