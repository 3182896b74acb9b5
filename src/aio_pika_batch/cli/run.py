"""The command `run`: runs consumers in this process, or in several under a supervisor."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from cyclopts import Parameter

from aio_pika_batch.cli.app import Exit, Flag
from aio_pika_batch.cli.logging import LogFormat, LogLevel, configure_logging
from aio_pika_batch.cli.process_manager import ProcessManager, ProcessPolicy
from aio_pika_batch.cli.supervisor import FATAL_CODES, Supervisor
from aio_pika_batch.cli.targets import TargetOptions, prepare
from aio_pika_batch.cli.worker_process import (
    INTERVAL,
    LoopName,
    ProcessOptions,
    run_all,
    run_loop,
)
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.health.http_server import HttpServer
from aio_pika_batch.health.server import LOOPBACK, HealthServer, has_prometheus
from aio_pika_batch.logs import KeywordLogger

LEAST_HUNG_AFTER = 4 * INTERVAL

_log = KeywordLogger(logging.getLogger("aio_pika_batch.cli"))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionOptions:
    """Options for health endpoints and supervised processes."""

    health_port: Annotated[int | None, Parameter(alias="-p")] = None
    """Serve /livez, /readyz, /metrics and /status on this port; 0 picks a free port and logs it."""
    health_host: str = LOOPBACK
    """Address to listen on; by default only programs on this machine can connect."""
    hung_after: float = 60.0
    """Restart a supervised process that sends no heartbeat for this many seconds."""
    crash_limit: int = 5
    """Crashes in a row that count as a crash loop; exit when every process is in one."""


def run(
    target: str,
    /,
    *more: str,
    workers: Annotated[int | None, Parameter(alias="-w")] = None,
    processes: Annotated[int | None, Parameter(alias="-n")] = None,
    reload: Flag = False,
    drain_timeout: float | None = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = "auto",
    loop: LoopName = "auto",
    supervision: SupervisionOptions | None = None,
    loading: TargetOptions | None = None,
) -> int:
    """Run consumers until SIGTERM or Ctrl-C, then drain.

    Args:
        target: Consumer as module:attribute: an instance, a class, or a function with --factory.
        more: More consumers to run in the same process.
        workers: Number of workers of each consumer; replaces num_workers.
        processes: Number of worker processes; a supervisor restarts those that crash or hang, and
            replaces them one by one on SIGHUP.
        reload: For development, restart when a file in --app-dir changes.
        drain_timeout: Seconds for a graceful shutdown; replaces shutdown_timeout.
        log_level: Lowest level that is logged.
        log_format: auto logs text to a terminal and JSON elsewhere.
        loop: Event loop; auto uses uvloop if it is installed.
        supervision: Health endpoints and supervised processes.
        loading: How consumers are found.
    """
    supervision = supervision or SupervisionOptions()
    options = ProcessOptions(
        targets=(target, *more),
        loading=loading or TargetOptions(),
        workers=workers,
        drain_timeout=drain_timeout,
        log_level=log_level,
        log_format=log_format,
        loop=loop,
        # Without a port to serve them on, metrics would cost time for nothing.
        has_metrics=supervision.health_port is not None and has_prometheus(),
    )
    configure_logging(log_level, log_format)
    if processes is None and not reload:
        return run_loop(partial(_run_here, options, supervision), loop)
    size = 1 if processes is None else processes
    # Errors that don't depend on the user's code are reported before any process is started. The
    # environment file is read here, and the processes inherit the variables.
    policy = _policy(options, supervision, size, is_reloading=reload)
    prepare(options.loading)
    return asyncio.run(_supervise(policy, options, supervision))


relay = run
"""The command `relay`: an OutboxRelay is a consumer, too."""


async def _run_here(options: ProcessOptions, supervision: SupervisionOptions) -> Exit:
    consumers = options.load()
    async with AsyncExitStack() as stack:
        await _serve(partial(HealthServer, *consumers), supervision, stack)
        return await run_all(consumers)


async def _serve(
    server_class: Callable[..., HttpServer], supervision: SupervisionOptions, stack: AsyncExitStack
) -> None:
    """Serve health endpoints until the stack is closed, if there is a port for them."""
    if supervision.health_port is not None:
        host, port = supervision.health_host, supervision.health_port
        server = await stack.enter_async_context(server_class(host=host, port=port))
        _log.info("health endpoints", url=f"http://{host}:{server.port}")


def _policy(
    options: ProcessOptions, supervision: SupervisionOptions, size: int, *, is_reloading: bool
) -> ProcessPolicy:
    if os.name != "posix":
        msg = "--processes and --reload need an operating system with POSIX signals and sockets"
        raise ConfigurationError(msg)
    hung_after, crash_limit = supervision.hung_after, supervision.crash_limit
    if size < 1:
        raise ConfigurationError(f"--processes: must be at least 1, not {size}")
    # Less would kill healthy processes that are only busy. NaN is less than nothing, too.
    if not hung_after >= LEAST_HUNG_AFTER:
        raise ConfigurationError(
            f"--hung-after: must be at least {LEAST_HUNG_AFTER:g}, not {hung_after:g}:"
            f" processes send a heartbeat every {INTERVAL:g} s"
        )
    if options.drain_timeout is not None and not 0 < options.drain_timeout < math.inf:
        raise ConfigurationError(
            f"--drain-timeout: must be greater than 0, not {options.drain_timeout:g}"
        )
    if crash_limit < 1:
        raise ConfigurationError(f"--crash-limit: must be at least 1, not {crash_limit}")
    # A developer may stop at a breakpoint, so that with --reload no process counts as hung.
    silence = math.inf if is_reloading else hung_after
    return ProcessPolicy(
        size=size,
        hung_after=silence,
        start_timeout=max(silence, 120.0),
        # The settings are the user's code, which this process doesn't import. A process reports its
        # own limit with its first heartbeat.
        drain_timeout=options.drain_timeout or 25.0,
        crash_limit=crash_limit,
        fatal_codes=FATAL_CODES,
        waits_for_roll=is_reloading,
    )


async def _supervise(
    policy: ProcessPolicy, options: ProcessOptions, supervision: SupervisionOptions
) -> int:
    supervisor = Supervisor(ProcessManager(policy), options)
    async with AsyncExitStack() as stack:
        await _serve(partial(HttpServer, supervisor.answer()), supervision, stack)
        if policy.waits_for_roll:
            reloading = asyncio.ensure_future(_reload(supervisor, options))
            stack.callback(reloading.cancel)
        return await supervisor.run()


async def _reload(supervisor: Supervisor, options: ProcessOptions) -> None:
    """Start a rolling restart whenever a file changes."""
    from watchfiles import PythonFilter, awatch

    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it would repeat our own line
    env_file = options.loading.env_file
    watched = [options.loading.app_dir, *([env_file] if env_file else [])]
    keep = PythonFilter(extra_extensions=(".env",))
    async for changes in awatch(*watched, watch_filter=keep, stop_event=asyncio.Event()):
        _log.info("files changed", files=sorted({path for _, path in changes}))
        supervisor.roll()
