"""How are several processes looked after? :mod:`~aio_pika_batch.cli.fleet` decides, this awaits.

Processes are started anew, never forked, so that each imports the user's code itself; this one does
not, and stays small and well whatever happens there. A process is told what to do on a socket and
not by signals, which a terminal or a service manager may send to all of them as well.
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

from aio_pika_batch.cli.child import ABANDON, DRAIN
from aio_pika_batch.cli.exits import Exit
from aio_pika_batch.cli.fleet import (
    Abandon,
    Action,
    Drain,
    Event,
    Heartbeat,
    Kill,
    Log,
    ProcessManager,
    Spawn,
)
from aio_pika_batch.cli.options import Work
from aio_pika_batch.health.http_server import Answer
from aio_pika_batch.health.metrics import MULTIPROCESS_DIR, metrics
from aio_pika_batch.health.probes import Verdict
from aio_pika_batch.health.server import endpoints
from aio_pika_batch.logs import KeywordLogger

_log = KeywordLogger(logging.getLogger("aio_pika_batch.supervisor"))

_LONGEST_LINE = 4 * 1024 * 1024
"""Bytes of a heartbeat, which has all workers of a process in it."""

_GOOD_NEWS = frozenset({Event.RECOVERED, Event.ROLLED})


@dataclass(slots=True, eq=False)
class _Child:
    """A process.

    Attributes:
        consumers: How they were when it was last heard of.
    """

    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    began: float
    consumers: list[object] = field(default_factory=list)

    def send(self, command: bytes) -> None:
        """Tell it something; it may be gone."""
        if not self.writer.is_closing():
            self.writer.write(command)


class Supervisor:
    """Keeps a fleet of processes running, all with the same work."""

    def __init__(self, fleet: ProcessManager, work: Work) -> None:
        self._fleet = fleet
        self._work = work
        self._children: dict[int, _Child] = {}
        self._following: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> int:
        """Look after them until all is over; returns the exit code."""
        async with AsyncExitStack() as stack:
            self._share_metrics(stack)
            self._listen(stack)
            while True:
                for action in self._fleet.poll(time.monotonic()):
                    await self._do(action)
                if self._fleet.outcome is not None:
                    break
                await self._until(self._fleet.deadline)
            if self._following:
                await asyncio.wait(self._following)
        return self._fleet.outcome

    def roll(self) -> None:
        """Replace all processes, one after another."""
        _log.info("rolling", processes=self._fleet.policy.size)
        self._fleet.roll()
        self._changed.set()

    # -- what is seen from outside ----------------------------------------------------------------

    def answer(self) -> Answer:
        """What is answered to probes."""
        return endpoints(
            livez=lambda: Verdict(()),  # whoever hangs is replaced; that this answers is all
            readyz=self._readiness,
            status=self._status,
            metrics=metrics,
        )

    def _readiness(self) -> Verdict:
        if self._fleet.is_draining:
            return Verdict(("draining",))
        return Verdict(
            tuple(
                f"process {member.slot} is {member.phase.value}, and not ready"
                for member in self._fleet.members
                if not member.is_ready
            )
        )

    def _status(self) -> Mapping[str, object]:
        return {"pid": os.getpid(), "processes": [self._one(slot) for slot in self._slots()]}

    def _slots(self) -> range:
        return range(self._fleet.policy.size)

    def _one(self, slot: int) -> Mapping[str, object]:
        member, child = self._fleet.members[slot], self._children.get(slot)
        return {
            "process": slot,
            "phase": member.phase.value,
            "is_ready": member.is_ready,
            "restarts": max(member.restarts, 0),
            "crashes_in_a_row": member.crashes,
            "pid": child.process.pid if child else None,
            "seconds_up": round(time.monotonic() - child.began, 1) if child else None,
            "consumers": child.consumers if child else [],
        }

    # -- inside -----------------------------------------------------------------------------------

    def _share_metrics(self, stack: AsyncExitStack) -> None:
        """Give processes a place to put what they count, so that it can be told as one."""
        if self._work.has_metrics and MULTIPROCESS_DIR not in os.environ:
            folder = TemporaryDirectory(prefix="aio-pika-batch-metrics-")
            os.environ[MULTIPROCESS_DIR] = stack.enter_context(folder)
            stack.callback(os.environ.pop, MULTIPROCESS_DIR)

    def _listen(self, stack: AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        handlers: Mapping[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self._on_end,
            signal.SIGINT: self._on_end,
            signal.SIGHUP: self.roll,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
            stack.callback(loop.remove_signal_handler, number)

    def _on_end(self) -> None:
        now = time.monotonic()
        if self._fleet.is_draining:
            _log.warning("the drain is abandoned")
            self._fleet.abandon(now)
        else:
            _log.info("draining", processes=len(self._children))
            self._fleet.drain(now)
        self._changed.set()

    async def _until(self, deadline: float | None) -> None:
        """Wait for something to happen."""
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    async def _do(self, action: Action) -> None:
        match action:
            case Spawn(slot):
                await self._spawn(slot)
            case Drain(slot):
                self._children[slot].send(DRAIN)
            case Abandon(slot):
                self._children[slot].send(ABANDON)
            case Kill(slot):
                with suppress(ProcessLookupError):
                    self._children[slot].process.kill()
            case Log():
                self._tell(action)

    async def _spawn(self, slot: int) -> None:
        ours, theirs = socket.socketpair()
        # What is run is shown as arguments for whoever lists processes; it is told on the socket,
        # since a URL may have a password.
        command = ("-m", "aio_pika_batch.cli.child", str(theirs.fileno()), *self._work.targets)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LONGEST_LINE)
        writer.write(self._work.to_json().encode() + b"\n")
        child = self._children[slot] = _Child(process, writer, time.monotonic())
        _log.info("started", child=slot, pid=process.pid)
        following = asyncio.ensure_future(self._follow(slot, child, reader))
        self._following.add(following)
        following.add_done_callback(self._following.discard)

    async def _follow(self, slot: int, child: _Child, reader: asyncio.StreamReader) -> None:
        """Hear what a process says, until its end."""
        with suppress(ConnectionError):
            while line := await reader.readline():
                said = json.loads(line)
                child.consumers = said["consumers"]
                self._fleet.heard(slot, Heartbeat(**said["beat"]), time.monotonic())
                self._changed.set()
        code = await child.process.wait()
        child.writer.close()
        del self._children[slot]
        if self._work.has_metrics:
            from aio_pika_batch.observers.prometheus import process_died

            process_died(child.process.pid)
        self._fleet.exited(slot, code, time.monotonic())
        self._changed.set()

    def _tell(self, tell: Log) -> None:
        log = _log
        if tell.slot is not None:
            log = log.bind(child=tell.slot)
        if tell.code is not None:
            log = log.bind(ended=_how(tell.code))
        if tell.pause is not None:
            log = log.bind(restarted_in=f"{tell.pause:g} s")
        if tell.notice in _GOOD_NEWS:
            log.info(tell.notice.value)
        else:
            log.error(tell.notice.value)


def _how(code: int) -> str:
    """How a process has ended, in words."""
    if code >= 0:
        return f"with exit code {code}"
    with suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"


FATAL = frozenset({int(Exit.USAGE), int(Exit.NO_CONNECTION)})
"""Exit codes that a restart does not mend."""
