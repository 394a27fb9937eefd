"""Processes of a launcher, on one machine or several, as one: the first runs the command, the others lend a hand.

The first process decides, writes and speaks. To a piece of work that is worth it (`run`) it calls the others, which
run the same function and share out its samples (`ranks.Share`), or train as one. They write nothing, say nothing, and
need nothing but what the call brings; whenever one of them ends, all end, with one message of the first.

Calls, ends and errors go over a connection of their own, beside torch's, so that a process that waits on a GPU still
hears of the others.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import pickle
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from slm_pipeline.errors import UserError, portable, printable
from slm_pipeline.machine import memory, ranks, signals
from slm_pipeline.machine.ranks import Launched

log = logging.getLogger(__name__)

T = TypeVar("T")

_MEETING_TIME = timedelta(minutes=10)  # for all to be there
# For the first, if this one's command line is refused: the first's is too, mostly.
_REFUSED_TIME = timedelta(seconds=30)
_NOTICE_TIME = 20.0  # seconds in which the first process should fall out of its work when another has ended
_STRANGERS_TIME = 10.0  # seconds in which one of ours has said who it is
_TOKEN_BYTES = 32


def run(function: Callable[..., T], *arguments: Any, **of_first: Any) -> T:
    """Call ``function`` in all of the launcher's processes; what it returns here, in the first.

    Without a launcher, or in an API call that is no command, just a call. Else what is measured of peak memory here is
    that of the process that took most (`memory.peak_gb`).

    Args:
        function: of a module, not a closure; the other processes drop what it returns.
        arguments: they pickle.
        of_first: given in the first process alone.

    Raises:
        UserError: another process raised it, or ended.
    """
    if _leader is None:
        return function(*arguments, **of_first)
    return _leader.run(function, arguments, of_first)


class _Leader:
    """The first process's side."""

    def __init__(self, place: Launched, device: str):
        self._place, self._device = place, device
        self._store = _store(place, _MEETING_TIME)
        self._heard: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._hosts: dict[int, str] = {}
        self._working = threading.Event()
        self._ended: dict[int, BaseException | None] = {}  # who will not work again, and with what error
        self._connections = self._gather()
        for rank, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(rank, connection), daemon=True).start()

    def _gather(self) -> dict[int, Connection]:
        token = secrets.token_bytes(_TOKEN_BYTES)
        found: dict[int, Connection] = {}
        with socket.create_server(("", 0), backlog=self._place.count) as server:
            server.settimeout(_MEETING_TIME.total_seconds())
            self._store.set("meeting", json.dumps([server.getsockname()[1], token.hex()]))
            while len(found) < self._place.count - 1:
                try:
                    accepted, _ = server.accept()
                except TimeoutError as error:
                    raise UserError(
                        f"{self._place.launcher} started {self._place.count} processes, of which"
                        f" {self._place.count - 1 - len(found)} did not come within {_MEETING_TIME}"
                    ) from error
                connection = _connection(accepted)
                with suppress(EOFError, OSError):  # of a stranger
                    if not connection.poll(_STRANGERS_TIME):
                        continue
                    if not hmac.compare_digest(connection.recv_bytes(_TOKEN_BYTES), token):
                        continue
                    rank, host, refused = connection.recv()
                    found[rank], self._hosts[rank] = connection, host
                    if refused is not None:
                        raise self._error(rank, refused)
        return found

    def _listen(self, rank: int, connection: Connection) -> None:
        """Hear what another process says; see to it that this one ends if it does."""
        try:
            while True:
                kind, content = connection.recv()
                self._heard.put((rank, kind, content))
                if kind == "error":
                    break
        except (EOFError, OSError):
            kind, content = "gone", None
            self._heard.put((rank, kind, content))
        self._ended[rank] = None if content is None else content[0]
        if self._working.is_set():
            time.sleep(_NOTICE_TIME)
            if self._working.is_set():  # it waits for a GPU, which waits for the process that has ended
                with suppress(OSError):
                    error = self._error(rank, None if content is None else content[0])
                    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
                os._exit(2)

    def _error(self, rank: int, error: BaseException | None) -> BaseException:
        where = f"process {rank} of {self._place.count} on {self._hosts.get(rank, 'another node')}"
        if error is None:
            return UserError(
                f"{where} ended without a word, as a system that lacks memory ends processes; the same command goes on"
                " from what is finished"
            )
        return UserError(f"{where}: {error}") if isinstance(error, UserError) else error

    def run(self, function: Callable[..., T], arguments: tuple[Any, ...], of_first: dict[str, Any]) -> T:
        call = pickle.dumps((self._device, function, arguments))
        self._working.set()  # from here on whoever ends is seen by its listener, and before here on the next line
        try:
            for rank, error in list(self._ended.items()):
                raise self._error(rank, error)
            for rank, connection in self._connections.items():
                try:
                    connection.send(("call", call))
                except OSError:
                    raise self._error(rank, self._last_word(rank)) from None
            with ranks.together_as_launched():
                _meet(self._place, self._store, self._device)
                result = function(*arguments, **of_first)
            self._wait_for_all()
            return result
        except Exception as error:
            signals.raise_if_heard()  # then the others have heard it too
            if not isinstance(error, UserError):
                self._raise_what_others_said(error)
            raise
        finally:
            self._working.clear()

    def _wait_for_all(self) -> None:
        left = set(self._connections)
        while left:
            rank, kind, content = self._heard.get()
            if kind != "done":
                self._raise(rank, content)
            memory.note_peak_of_others(content)
            left.remove(rank)

    def _raise_what_others_said(self, error: Exception) -> None:
        """If one of the others has ended, that is why this one cannot go on."""
        with suppress(queue.Empty):
            while True:
                rank, kind, content = self._heard.get(timeout=2.0)
                if kind != "done" and not (kind == "error" and type(content[0]) is type(error)):
                    self._raise(rank, content)

    def _raise(self, rank: int, content: tuple[BaseException, str] | None) -> NoReturn:
        if content is None:
            raise self._error(rank, None)
        error, where = content
        raise self._error(rank, error) from RuntimeError(f"in process {rank}:\n{where}")

    def _last_word(self, rank: int) -> BaseException | None:
        with suppress(queue.Empty):
            while True:
                whose, _, content = self._heard.get(timeout=0.5)
                if whose == rank and content is not None:
                    return content[0]
        return None

    def end(self) -> None:
        """Let the others go."""
        for connection in self._connections.values():
            with suppress(OSError):
                connection.send(("end", b""))


_leader: _Leader | None = None


@contextmanager
def leading(device: str) -> Iterator[None]:
    """The first process calls the others inside (`run`); where there is no launcher, nothing.

    Args:
        device: ``model.device``: ``cpu``, or each process takes a GPU.
    """
    global _leader
    place = ranks.launched()
    if place is None:
        yield
        return
    ended_well = False
    _leader = _Leader(place, device)
    log.info("%d processes of %s work on this", place.count, place.launcher)
    try:
        yield
        ended_well = True
    finally:
        _leader.end()
        _leader = None
        parting = threading.Thread(target=_part, daemon=True)
        parting.start()
        parting.join(None if ended_well else _NOTICE_TIME)  # GPUs may wait for one another, and this one alone goes


def be_quiet() -> None:
    """What the processes after the first have to say, the first says too."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also while one waits for the others, where Python hears nothing
        signal.signal(number, signal.SIG_DFL)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.disable(logging.WARNING)  # of libraries, which have no handler here and write to stderr
    logger = logging.getLogger("slm_pipeline")
    logger.propagate = False
    for one in (logger, logging.getLogger()):  # without any, Python shows warnings of libraries
        one.addHandler(logging.NullHandler())


def follow(refused: UserError | None = None) -> None:
    """Do what the first process calls for, until it ends.

    Args:
        refused: what is wrong with the command line here; the first process says it, if it is not refused itself.
    """
    place = ranks.launched()
    assert place is not None
    patience = _MEETING_TIME if refused is None else _REFUSED_TIME
    try:
        _wait_for(place, patience)
        store = _store(place, patience)
        port, token = json.loads(store.get("meeting"))
        connection = _connection(socket.create_connection((place.host, port)))
    except (OSError, RuntimeError):  # the first process has ended, and said why
        sys.exit(2)
    connection.send_bytes(bytes.fromhex(token))
    connection.send((place.rank, socket.gethostname(), refused))
    calls: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    working = threading.Event()
    threading.Thread(target=_hear, args=(connection, calls, working), daemon=True).start()
    while (call := calls.get()) is not None:
        try:
            memory.reset_peak()
            device, function, arguments = pickle.loads(call)  # of the first process, which has shown the token
            with ranks.together_as_launched():
                _meet(place, store, device)
                function(*arguments)
        except BaseException as error:
            with suppress(OSError):
                connection.send(("error", (portable(error), traceback.format_exc())))
            threading.Thread(target=_part, daemon=True).start()  # so that nobody waits for this process's part
            time.sleep(2 * _NOTICE_TIME)  # the first process should be the first to end, with a message
            os._exit(2)
        working.clear()
        connection.send(("done", memory.peak_gb()))
        memory.free()
    _part()


def _wait_for(place: Launched, patience: timedelta) -> None:
    """Return when the first process, or its launcher, can be reached; `OSError` if that is never."""
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=10.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _hear(connection: Connection, calls: queue.SimpleQueue[bytes | None], working: threading.Event) -> None:
    """Pass on the calls; end this process if the first one ends, or gives up what this one still works on."""
    try:
        while True:
            kind, call = connection.recv()
            if kind == "end" and working.is_set():
                os._exit(2)
            if kind == "call":
                working.set()
            calls.put(call if kind == "call" else None)
            if kind == "end":
                return
    except (EOFError, OSError):
        os._exit(2)  # there is nothing here that could be lost


def _connection(opened: socket.socket) -> Connection:
    """Whole pickled messages over a socket, which notices when a machine is gone."""
    opened.settimeout(None)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(opened.detach())


def _store(place: Launched, timeout: timedelta) -> Any:
    """What the launcher, or the first process, keeps for all."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    os.environ |= {"MASTER_ADDR": place.host, "MASTER_PORT": str(place.port)}
    url = f"env://?rank={place.rank}&world_size={place.count}"
    store, _, _ = next(rendezvous(url, timeout=timeout))
    return PrefixStore("slm_pipeline", store)


def _meet(place: Launched, store: Any, device: str) -> None:
    """Make the group that sums and trains, once."""
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    own = torch.device("cuda", ranks.gpu_index(place.local_rank)) if on_gpus else None
    if own is not None:
        torch.cuda.set_device(own)
        _check_own(place, store, str(torch.cuda.get_device_properties(own).uuid))
    distributed.init_process_group(
        "nccl" if on_gpus else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.count,
        timeout=timedelta(days=1),  # that a process has ended is noticed otherwise
        device_id=own,
    )
    if on_gpus:
        ranks.sum_on_processors_with(distributed.new_group(backend="gloo", timeout=timedelta(days=1)))


def _check_own(place: Launched, store: Any, gpu: str) -> None:
    """Raise `UserError`, in all processes, if two of them have one GPU."""
    store.set(f"gpu {place.rank}", gpu)
    of_rank = {rank: store.get(f"gpu {rank}").decode() for rank in range(place.count)}
    for rank, other in of_rank.items():
        if first := [before for before in range(rank) if of_rank[before] == other]:
            raise UserError(
                f"processes {first[0]} and {rank} of {place.launcher} would share a GPU: start as many on a node as it"
                " has GPUs, or use model.device=cpu"
            )


def _part() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        with suppress(Exception):
            torch.distributed.destroy_process_group()
