"""Runs several worker processes: carries out what the process manager decides.

Each process is a fresh interpreter that imports the user's code itself. Nothing is forked, so no
event loop, thread or connection is inherited. The supervisor imports none of the user's code and
keeps working whatever that code does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from aio_pika_batch.cli.app import Exit
from aio_pika_batch.cli.process_manager import (
    Abandon,
    Action,
    Drain,
    Heartbeat,
    Kill,
    Log,
    ProcessEvent,
    ProcessManager,
    Spawn,
)
from aio_pika_batch.cli.worker_process import ABANDON, DRAIN, ProcessOptions
from aio_pika_batch.health.http_server import Answer
from aio_pika_batch.health.metrics import MULTIPROCESS_DIR, metrics
from aio_pika_batch.health.probes import ProbeResult
from aio_pika_batch.health.server import endpoints
from aio_pika_batch.logs import KeywordLogger

FATAL_CODES = frozenset({int(Exit.USAGE), int(Exit.NO_CONNECTION)})
"""Exit codes that a restart can't fix."""

GOOD_NEWS = frozenset({ProcessEvent.RECOVERED, ProcessEvent.ROLLED})
"""Events that are logged at INFO, the others at ERROR."""

_MAX_LINE = 4 * 1024 * 1024
"""Bytes of a heartbeat, which contains the status of all workers of a process."""

_log = KeywordLogger(logging.getLogger("aio_pika_batch.supervisor"))


@dataclass(slots=True, eq=False)
class _Child:
    """A running process.

    Attributes:
        consumers: Their status as of the last heartbeat.
    """

    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    started_at: float
    consumers: list[object] = field(default_factory=list)

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
                for action in self._manager.poll(time.monotonic()):
                    await self._perform(action)
                if self._manager.outcome is not None:
                    break
                await self._wait_until(self._manager.deadline)
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
            livez=lambda: ProbeResult(()),
            readyz=self._readiness,
            status=self._status,
            metrics=metrics,
        )

    def _readiness(self) -> ProbeResult:
        if self._manager.is_draining:
            return ProbeResult(("draining",))
        return ProbeResult(
            tuple(
                f"process {slot.index} is {slot.phase.value}, and not ready"
                for slot in self._manager.slots
                if not slot.is_ready
            )
        )

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
            folder = TemporaryDirectory(prefix="aio-pika-batch-metrics-")
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

    async def _wait_until(self, deadline: float | None) -> None:
        """Wait for a change, at most until the deadline."""
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

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
                with suppress(ProcessLookupError):
                    self._children[slot].process.kill()
            case Log():
                _emit(action)

    async def _spawn(self, slot: int) -> None:
        ours, theirs = socket.socketpair()
        # The targets are arguments only to be seen in a process list. The options go over the
        # socket, since a URL may contain a password.
        command = (
            "-m",
            "aio_pika_batch.cli.worker_process",
            str(theirs.fileno()),
            *self._options.targets,
        )
        # Our copy of their end must be closed, or the socket would outlive the process.
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                # Several processes can't share the input of a terminal. They share its output.
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_MAX_LINE)
        writer.write(self._options.to_json().encode() + b"\n")
        child = self._children[slot] = _Child(process, writer, time.monotonic())
        _log.info("started", child=slot, pid=process.pid)
        follower = asyncio.ensure_future(self._follow(slot, child, reader))
        self._followers.add(follower)
        follower.add_done_callback(self._followers.discard)

    async def _follow(self, slot: int, child: _Child, reader: asyncio.StreamReader) -> None:
        """Read the heartbeats of a process until it exits."""
        with suppress(ConnectionError):
            while line := await reader.readline():
                message = json.loads(line)
                child.consumers = message["consumers"]
                heartbeat = Heartbeat(**message["heartbeat"])
                self._manager.on_heartbeat(slot, heartbeat, time.monotonic())
                self._changed.set()
        # The socket may close before the process has exited: its interpreter is shutting down.
        code = await child.process.wait()
        child.writer.close()
        del self._children[slot]
        if self._options.has_metrics:
            # Here too, only the user's choice of metrics imports prometheus-client.
            from aio_pika_batch.observers.prometheus import process_died

            process_died(child.process.pid)
        self._manager.on_exit(slot, code, time.monotonic())
        self._changed.set()


def _emit(entry: Log) -> None:
    log = _log
    if entry.slot is not None:
        log = log.bind(child=entry.slot)
    if entry.code is not None:
        log = log.bind(ended=describe_exit(entry.code))
    if entry.pause is not None:
        log = log.bind(restarted_in=f"{entry.pause:g} s")
    if entry.event in GOOD_NEWS:
        log.info(entry.event.value)
    else:
        log.error(entry.event.value)


def describe_exit(code: int) -> str:
    """Return how a process ended: its exit code, or the signal that killed it."""
    if code >= 0:
        return f"with exit code {code}"
    with suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"
