"""Runs consumers in one process, and is the program of a process under a supervisor.

Both talk over one socket. The supervisor's first line says what to run, and its later lines are
commands. The process sends heartbeats. If the socket closes, the supervisor is gone, and the
process drains.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from aio_pika_batch.cli.app import Exit, exit_code, exit_code_of_all, flush_streams, print_error
from aio_pika_batch.cli.logging import LogFormat, LogLevel, configure_logging
from aio_pika_batch.cli.process_manager import Heartbeat
from aio_pika_batch.cli.targets import AnyConsumer, TargetOptions, load
from aio_pika_batch.errors import AioPikaBatchError, ConfigurationError, DrainIncomplete
from aio_pika_batch.health.server import as_json, liveness, readiness
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.runtime.shutdown import SIGNALS, process_signals

LoopName: TypeAlias = Literal["auto", "uvloop", "asyncio"]

DRAIN = b"drain\n"
ABANDON = b"abandon\n"

INTERVAL = 0.5
"""Seconds between heartbeats."""

_MAX_BACKLOG = 256 * 1024
"""Heartbeats are skipped while more bytes than this wait for a supervisor that doesn't read."""

_log = KeywordLogger(logging.getLogger("aio_pika_batch.cli"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """What one process runs, and how: plain values that are sent to it as JSON.

    Attributes:
        targets: Consumers, each as `module:attribute`.
        workers: Replaces `num_workers`; None keeps the setting.
        drain_timeout: Replaces `shutdown_timeout`; None keeps the setting.
        has_metrics: Whether consumers get a `PrometheusObserver`.
    """

    targets: tuple[str, ...]
    loading: TargetOptions = field(default_factory=TargetOptions)
    workers: int | None = None
    drain_timeout: float | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    loop: LoopName = "auto"
    has_metrics: bool = False

    def load(self) -> list[AnyConsumer]:
        """Load all consumers.

        Raises:
            ConfigurationError: One of them can't be loaded.
        """
        given = {"num_workers": self.workers, "shutdown_timeout": self.drain_timeout}
        consumers = [load(target, self.loading, **given) for target in self.targets]
        if self.has_metrics:
            try:
                from aio_pika_batch.observers.prometheus import PrometheusObserver

                observer = PrometheusObserver()
            except OSError as error:  # the folder that processes share can't be written
                _log.warning("metrics are off: no folder for them", error=format_error(error))
                return consumers
            for consumer in consumers:
                consumer.observe(observer)
        return consumers

    def to_json(self) -> str:
        """Return the options on one line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the options that `to_json` wrote."""
        values = json.loads(text)
        loading = TargetOptions(**values.pop("loading"))
        env_file = None if loading.env_file is None else Path(loading.env_file)
        loading = replace(loading, app_dir=Path(loading.app_dir), env_file=env_file)
        return cls(targets=tuple(values.pop("targets")), loading=loading, **values)


def run_loop(main: Callable[[], Coroutine[Any, Any, Exit]], loop: LoopName) -> Exit:
    """Run the main coroutine of a process on an event loop; `auto` is uvloop if it is installed.

    Raises:
        ConfigurationError: uvloop isn't installed.
    """
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if loop == "uvloop" or (loop == "auto" and find_spec("uvloop") is not None):
        try:
            import uvloop
        except ImportError as error:
            msg = (
                f"--loop uvloop: {error}; run pip install 'aio-pika-batch[uvloop]',"
                " or use --loop asyncio"
            )
            raise ConfigurationError(msg) from error
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())


def run_all(consumers: Sequence[AnyConsumer]) -> Coroutine[Any, Any, Exit]:
    """Run consumers until all have ended, and drain the others if one fails.

    The call itself starts them, before its result is awaited: a task that is created after it can
    already ask them to drain.

    Returns:
        The exit code. Errors have been logged.
    """
    return _wait_for(consumers, [asyncio.ensure_future(consumer.run()) for consumer in consumers])


async def _wait_for(consumers: Sequence[AnyConsumer], tasks: Sequence[asyncio.Task[None]]) -> Exit:
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        # One has failed, or this task was cancelled: the others must not run on unsupervised.
        for consumer in consumers:
            consumer.request_stop()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for consumer, result in zip(consumers, results, strict=True):
        if result is not None:
            _log_failure(consumer, result)
    return exit_code_of_all(each for each in results if each is not None)


def _log_failure(consumer: AnyConsumer, error: BaseException) -> None:
    """Log why a consumer failed, with a traceback unless the error is the library's own."""
    log = _log.bind(
        consumer=type(consumer).__name__,
        queue=consumer.settings.queue_name,
        error=format_error(error),
    )
    if isinstance(error, DrainIncomplete):
        log.error("a consumer did not drain in time")
    else:
        is_ours = isinstance(error, AioPikaBatchError)
        log.error("a consumer failed; the program stops", exc_info=None if is_ours else error)


# --- under a supervisor ----------------------------------------------------------


def main(fd: int) -> Exit:
    """Run what the supervisor at the other end of the socket asks for."""
    # A rolling restart is the supervisor's task, also if the whole process group gets SIGHUP.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process_signals.only_drain()
    # The supervisor has blocked them, so that they could not end this process until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP, *SIGNALS})
    connection = socket.socket(fileno=fd)
    # A program that the user's code starts would otherwise keep the socket open after this process
    # has ended, and the supervisor would wait for it.
    connection.set_inheritable(False)
    try:
        if not (line := _read_line(connection)):
            return Exit.OK
        options = ProcessOptions.from_json(line)
        configure_logging(options.log_level, options.log_format)
        # On the handlers: a filter on the root logger isn't applied to records of other loggers.
        for handler in logging.getLogger().handlers:
            handler.addFilter(_add_pid)
        consumers = options.load()
        return run_loop(partial(_run_supervised, consumers, connection), options.loop)
    except AioPikaBatchError as error:
        print_error(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _add_pid(record: logging.LogRecord) -> bool:
    """Add the process id to a log record, since several processes share one standard error."""
    record.pid = os.getpid()
    return True


def _read_line(connection: socket.socket) -> bytes:
    # Byte by byte: what follows the line is for the stream reader.
    line = bytearray()
    while not line.endswith(b"\n"):
        if not (read := connection.recv(1)):
            return b""  # the supervisor is gone
        line += read
    return bytes(line)


async def _run_supervised(consumers: Sequence[AnyConsumer], connection: socket.socket) -> Exit:
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    running = asyncio.ensure_future(run_all(consumers))
    helpers = [
        asyncio.ensure_future(_read_commands(reader)),
        asyncio.ensure_future(_send_heartbeats(consumers, writer)),
    ]
    try:
        return await running
    finally:
        for helper in helpers:
            helper.cancel()
        await asyncio.wait(helpers)
        writer.close()


async def _read_commands(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        while line := await reader.readline():
            if line == ABANDON:
                process_signals.abandon()
            else:
                process_signals.drain()
    # The kernel closes the socket even if the supervisor was ended by SIGKILL.
    process_signals.drain()


async def _send_heartbeats(consumers: Sequence[AnyConsumer], writer: asyncio.StreamWriter) -> None:
    # On the event loop of the consumers, not in a thread: if that loop is blocked, no heartbeats
    # are sent.
    while not writer.is_closing():
        if writer.transport.get_write_buffer_size() < _MAX_BACKLOG:
            writer.write(_heartbeat(consumers))
        await asyncio.sleep(INTERVAL)


def _heartbeat(consumers: Sequence[AnyConsumer]) -> bytes:
    """Return one line with the heartbeat, the status of each consumer, and why one isn't ready.

    With these in it, the supervisor answers /status and /readyz without asking its processes.
    """
    statuses = [consumer.status() for consumer in consumers]
    unready = readiness(statuses)
    heartbeat = Heartbeat(
        is_ready=not unready,
        is_stuck=bool(liveness(statuses)),
        drain_timeout=max(consumer.settings.shutdown_timeout for consumer in consumers),
    )
    message = {
        "heartbeat": asdict(heartbeat),
        "consumers": as_json(statuses),
        "unready": unready,
    }
    return json.dumps(message).encode() + b"\n"


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    flush_streams()
    sys.exit(code)
