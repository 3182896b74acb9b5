"""What does a supervised process do? It runs consumers, says how it is, and does what it is told.

On one socket: the first line says what to run; what comes later are commands. Back go heartbeats,
from the event loop that runs the consumers: one that is blocked has none. Where the socket ends,
the supervisor is gone, even by SIGKILL, and the process drains.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from aio_pika_batch.cli.app import complain
from aio_pika_batch.cli.exits import Exit, exit_of
from aio_pika_batch.cli.fleet import Heartbeat
from aio_pika_batch.cli.logging import configure_logging
from aio_pika_batch.cli.options import Work
from aio_pika_batch.cli.running import run_all, run_loop
from aio_pika_batch.cli.targets import AnyConsumer
from aio_pika_batch.errors import AioPikaBatchError
from aio_pika_batch.health.probes import as_json, liveness, readiness
from aio_pika_batch.runtime.signals import process_signals

DRAIN = b"drain\n"
ABANDON = b"abandon\n"

INTERVAL = 0.5
"""Seconds between heartbeats."""

_BACKLOG = 256 * 1024
"""Bytes that may wait for a supervisor that does not read; more are not written."""


def main(fd: int) -> Exit:
    """Run what the supervisor at the other end of a socket says."""
    # It is the supervisor that is told to roll, also where a whole process group is.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    wire = socket.socket(fileno=fd)
    wire.set_inheritable(False)
    try:
        work = Work.from_json(_first_line(wire))
        configure_logging(work.log_level, work.log_format)
        for handler in logging.getLogger().handlers:
            handler.addFilter(_say_who)
        consumers = work.load()
        return run_loop(partial(_attend, consumers, wire), work.loop)
    except AioPikaBatchError as error:
        complain(error)
        return exit_of(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _say_who(record: logging.LogRecord) -> bool:
    """Add the process to what it logs: several share one standard error."""
    record.pid = os.getpid()
    return True


def _first_line(wire: socket.socket) -> bytes:
    """Byte by byte, since what follows is not ours to read."""
    line = bytearray()
    while not line.endswith(b"\n"):
        line += wire.recv(1) or b"\n"
    return bytes(line)


async def _attend(consumers: Sequence[AnyConsumer], wire: socket.socket) -> Exit:
    """Run consumers, tied to the supervisor."""
    reader, writer = await asyncio.open_unix_connection(sock=wire)
    running = asyncio.ensure_future(run_all(consumers))
    helpers = [
        asyncio.ensure_future(_obey(reader)),
        asyncio.ensure_future(_beat(consumers, writer)),
    ]
    try:
        return await running
    finally:
        for helper in helpers:
            helper.cancel()
        await asyncio.wait(helpers)
        writer.close()


async def _obey(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        while line := await reader.readline():
            if line == ABANDON:
                process_signals.abandon()
            else:
                process_signals.drain()
    process_signals.drain()


async def _beat(consumers: Sequence[AnyConsumer], writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        if writer.transport.get_write_buffer_size() < _BACKLOG:
            writer.write(heartbeat(consumers))
        await asyncio.sleep(INTERVAL)


def heartbeat(consumers: Sequence[AnyConsumer]) -> bytes:
    """One line about all of them."""
    statuses = [consumer.status() for consumer in consumers]
    beat = Heartbeat(
        is_ready=readiness(statuses).is_good,
        is_stuck=not liveness(statuses).is_good,
        budget=max(consumer.settings.shutdown_timeout for consumer in consumers),
    )
    return json.dumps({"beat": asdict(beat), "consumers": as_json(statuses)}).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
