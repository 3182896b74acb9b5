"""Runs several worker processes: carries out what the process manager decides.

Each process is a fresh interpreter that imports the user's code itself. Nothing is forked, so no
event loop, thread or connection is inherited. The supervisor imports none of the user's code and
keeps working whatever that code does: an exit is seen by waiting for the process, never by its
socket, which a process that it has forked may keep open.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from aio_pika_batch.cli.app import Exit
from aio_pika_batch.cli.process_manager import (
    Abandon,
    Action,
    Drain,
    Heartbeat,
    Kill,
    Log,
    Phase,
    ProcessEvent,
    ProcessManager,
    ProcessSlot,
    Spawn,
    describe_exit,
)
from aio_pika_batch.cli.worker_process import ABANDON, DRAIN, ProcessOptions
from aio_pika_batch.health.http_server import Answer
from aio_pika_batch.health.server import MULTIPROCESS_DIR, endpoints, metrics
from aio_pika_batch.logs import KeywordLogger, format_error

if TYPE_CHECKING:
    from prometheus_client import Metric

FATAL_CODES = frozenset({int(Exit.USAGE), int(Exit.NO_CONNECTION)})
"""Exit codes that a restart can't fix."""

GOOD_NEWS = frozenset({ProcessEvent.RECOVERED, ProcessEvent.ROLLED})
"""Events that are logged at INFO, the others at ERROR."""

_TICK = 1.0
"""Seconds after which the supervisor looks at the latest."""

_PAUSED_AFTER = 1.0
"""If it looks later than that by this many seconds, the supervisor itself was stopped meanwhile."""

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

_MAX_LINE = 4 * 1024 * 1024
"""Bytes of a heartbeat, which contains the status of all workers of a process."""

_log = KeywordLogger(logging.getLogger("aio_pika_batch.supervisor"))


@dataclass(slots=True, eq=False)
class _Child:
    """A running process.

    Attributes:
        consumers: Their status as of the last heartbeat.
        unready: Why it wasn't ready then.
    """

    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    started_at: float
    consumers: list[object] = field(default_factory=list)
    unready: list[str] = field(default_factory=list)

    def send(self, command: bytes) -> None:
        """Send a command, unless the process is gone."""
        if not self.writer.is_closing():
            self.writer.write(command)


class Supervisor:
    """Keeps processes running that all have the same options."""

    def __init__(self, manager: ProcessManager, options: ProcessOptions) -> None:
        self._manager = manager
        self._options = options
        self._children: dict[int, _Child] = {}
        self._followers: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> int:
        """Supervise the processes until all are over, and return the exit code."""
        async with AsyncExitStack() as stack:
            self._share_metrics(stack)
            self._handle_signals(stack)
            while True:
                began = time.monotonic()
                for action in self._manager.poll(began):
                    await self._perform(action)
                if self._manager.outcome is not None:
                    break
                await self._wait_until(min(self._manager.deadline or math.inf, began + _TICK))
                self._skip_pause(began)
                if os.getpid() == 1:
                    self._reap_orphans()
            if self._followers:
                await asyncio.wait(self._followers)
        return self._manager.outcome

    def roll(self) -> None:
        """Replace all processes one after another."""
        _log.info("rolling restart", processes=self._manager.policy.size)
        self._manager.roll()
        self._changed.set()

    def answer(self) -> Answer:
        """Return the health endpoints of all processes together."""
        return endpoints(
            # Hung and stuck processes are replaced. That the supervisor answers is enough.
            livez=lambda: (),
            readyz=self._readiness,
            status=self._status,
            metrics=lambda: metrics(ProcessMetrics(self._manager)),
        )

    def _readiness(self) -> list[str]:
        if self._manager.is_draining:
            return ["draining"]
        return [reason for slot in self._manager.unready for reason in self._unready(slot)]

    def _unready(self, slot: ProcessSlot) -> Iterator[str]:
        child = self._children.get(slot.index)
        if slot.phase is not Phase.UP:
            crashes = f", after {slot.crashes} crashes in a row" if slot.crashes else ""
            yield f"process {slot.index} is {slot.phase.value}{crashes}"
        elif child is None or not child.unready:
            yield f"process {slot.index} is starting"
        else:
            yield from (f"process {slot.index}: {each}" for each in child.unready)

    def _status(self) -> Mapping[str, object]:
        processes = [self._process_status(index) for index in range(self._manager.policy.size)]
        return {"pid": os.getpid(), "processes": processes}

    def _process_status(self, index: int) -> Mapping[str, object]:
        slot, child = self._manager.slots[index], self._children.get(index)
        return {
            "process": index,
            "phase": slot.phase.value,
            "is_ready": slot.is_ready,
            "restarts": max(slot.restarts, 0),
            "crashes_in_a_row": slot.crashes,
            "pid": child.process.pid if child else None,
            "seconds_up": round(time.monotonic() - child.started_at, 1) if child else None,
            "consumers": child.consumers if child else [],
        }

    def _share_metrics(self, stack: AsyncExitStack) -> None:
        """Give the processes a folder in which prometheus-client adds up what they count."""
        # Before the first process starts: prometheus-client reads the variable on import.
        if self._options.has_metrics and MULTIPROCESS_DIR not in os.environ:
            try:
                folder = TemporaryDirectory(
                    prefix="aio-pika-batch-metrics-", ignore_cleanup_errors=True
                )
            except OSError as error:
                _log.warning(
                    "no folder for metrics; running without those of the processes",
                    error=format_error(error),
                )
                self._options = replace(self._options, has_metrics=False)
                return
            os.environ[MULTIPROCESS_DIR] = stack.enter_context(folder)
            stack.callback(os.environ.pop, MULTIPROCESS_DIR)

    def _handle_signals(self, stack: AsyncExitStack) -> None:
        # Not by `process_signals`: it doesn't handle SIGHUP, and there are no consumers here.
        loop = asyncio.get_running_loop()
        handlers: Mapping[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self._on_stop_signal,
            signal.SIGINT: self._on_stop_signal,
            signal.SIGHUP: self.roll,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
            stack.callback(loop.remove_signal_handler, number)

    def _on_stop_signal(self) -> None:
        now = time.monotonic()
        if self._manager.is_draining:
            _log.warning("drain abandoned after another signal; processes stop now")
            self._manager.abandon(now)
        else:
            _log.info("draining", processes=len(self._children))
            self._manager.drain(now)
        self._changed.set()

    async def _wait_until(self, deadline: float) -> None:
        """Wait for a change, at most until the deadline."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._changed.wait()
        self._changed.clear()

    def _skip_pause(self, began: float) -> None:
        """Give the processes the time for which the supervisor was stopped, as by SIGSTOP."""
        now = time.monotonic()
        late = now - began - _TICK
        if late > _PAUSED_AFTER:
            seconds = round(late, 1)
            _log.warning("the supervisor was paused; its processes get that time", seconds=seconds)
            self._manager.skip(late, now)

    def _reap_orphans(self) -> None:
        """Reap processes that process 1 has inherited, and leave its own to asyncio."""
        ours = {child.process.pid for child in self._children.values()}
        with suppress(ChildProcessError):
            # Without reaping, since the code that started a child waits for its exit code.
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in ours:
                    break  # asyncio reaps it soon, and the rest is reaped after that
                os.waitpid(found.si_pid, os.WNOHANG)

    async def _perform(self, action: Action) -> None:
        match action:
            case Spawn(slot):
                await self._spawn(slot)
            # Commands go over the socket, not by signals: a terminal or a service manager signals
            # the whole group, and a second signal would abandon the drain.
            case Drain(slot):
                self._children[slot].send(DRAIN)
            case Abandon(slot):
                self._children[slot].send(ABANDON)
            case Kill(slot):
                _kill_group(self._children[slot].process.pid)
            case Log():
                _emit(action)

    async def _spawn(self, slot: int) -> None:
        try:
            child, reader = await self._start_process()
        # No descriptors, memory, processes or threads. Such a lack passes, if by another's exit.
        except (OSError, RuntimeError) as error:
            pause = self._manager.on_start_failed(slot, time.monotonic())
            _log.error(
                "a process could not be started; trying again",
                child=slot,
                restarted_in=f"{pause:g} s",
                error=format_error(error),
            )
            return
        self._children[slot] = child
        _log.info("started", child=slot, pid=child.process.pid)
        follower = asyncio.ensure_future(self._follow(slot, child, reader))
        self._followers.add(follower)
        follower.add_done_callback(self._followers.discard)

    async def _start_process(self) -> tuple[_Child, asyncio.StreamReader]:
        if MULTIPROCESS_DIR in os.environ:
            # A cleaner of temporary files may have removed it, and prometheus-client needs it.
            with suppress(OSError):
                os.makedirs(os.environ[MULTIPROCESS_DIR], exist_ok=True)  # noqa: PTH103  -- as above
        ours, theirs = socket.socketpair()
        # The targets are arguments only to be seen in a process list. The options go over the
        # socket, since a URL may contain a password.
        command = (
            *_interpreter_options(),
            "-m",
            "aio_pika_batch.cli.worker_process",
            str(theirs.fileno()),
            *self._options.targets,
        )
        # Our copy of their end must be closed, or the socket would outlive the process.
        with theirs, ExitStack() as undo:
            undo.callback(ours.close)
            # Or a signal to the whole group would end a process that still imports.
            with _signals_blocked():
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *command,
                    # Several processes can't share the input of a terminal. They share its output.
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    # A group of its own, so that what it forks can be killed with it.
                    process_group=0,
                )
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_MAX_LINE)
            undo.pop_all()
        writer.write(self._options.to_json().encode() + b"\n")
        return _Child(process, writer, time.monotonic()), reader

    async def _follow(self, slot: int, child: _Child, reader: asyncio.StreamReader) -> None:
        """Read the heartbeats of a process until it exits."""
        reading = asyncio.ensure_future(self._read_heartbeats(slot, child, reader))
        code = await child.process.wait()
        reading.cancel()
        child.writer.close()
        if code < 0:
            # It had no time to end what it has forked: the workers of a ProcessPoolExecutor would
            # wait for it forever, and keep its connections open.
            _kill_group(child.process.pid)
        del self._children[slot]
        self._manager.on_exit(slot, code, time.monotonic())
        self._changed.set()
        if self._options.has_metrics:
            _forget_metrics(child.process.pid)

    async def _read_heartbeats(
        self, slot: int, child: _Child, reader: asyncio.StreamReader
    ) -> None:
        # A process that writes anything else has no heartbeats any more, and is replaced.
        with suppress(ConnectionError, ValueError, KeyError, TypeError):
            while line := await reader.readline():
                message = json.loads(line)
                child.consumers, child.unready = message["consumers"], message["unready"]
                heartbeat = Heartbeat(**message["heartbeat"])
                self._manager.on_heartbeat(slot, heartbeat, time.monotonic())
                self._changed.set()


class ProcessMetrics:
    """A collector for prometheus-client: what the supervisor knows of its processes."""

    def __init__(self, manager: ProcessManager) -> None:
        self._manager = manager

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as of now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        manager = self._manager
        restarts = sum(max(slot.restarts, 0) for slot in manager.slots)
        running = sum(slot.is_alive for slot in manager.slots)
        for kind, name, text, value in (
            (CounterMetricFamily, "process_restarts", "Processes started again.", restarts),
            (CounterMetricFamily, "process_crashes", "Processes that crashed.", manager.crashes),
            (CounterMetricFamily, "process_hung_kills", "Hung ones killed.", manager.hung_kills),
            (GaugeMetricFamily, "processes_wanted", "Processes wanted.", len(manager.slots)),
            (GaugeMetricFamily, "processes_running", "Processes running.", running),
        ):
            yield kind(f"aio_pika_batch_{name}", text, value)


def _forget_metrics(pid: int) -> None:
    # Here too, only the user's choice of metrics imports prometheus-client.
    from aio_pika_batch.observers.prometheus import process_died

    try:
        process_died(pid)
    except Exception as error:  # noqa: BLE001  -- a damaged file raises whatever its bytes lead to
        _log.warning(
            "metrics of a process that ended are kept as they are", pid=pid, error=repr(error)
        )


def _interpreter_options() -> list[str]:
    """Return the interpreter's own options, and -P: the current folder may have a json.py."""
    # Not documented, but multiprocessing passes them on in the same way.
    options: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    return options if "-P" in options else [*options, "-P"]


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals, also for processes started meanwhile, until those can handle them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_group(pid: int) -> None:
    """Kill a process and what it has forked."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _emit(entry: Log) -> None:
    log = _log
    if entry.slot is not None:
        log = log.bind(child=entry.slot)
    if entry.code is not None:
        log = log.bind(ended=describe_exit(entry.code))
    if entry.pause is not None:
        log = log.bind(restarted_in=f"{entry.pause:g} s")
    emit = log.info if entry.event in GOOD_NEWS else log.error
    emit(entry.event.value)
