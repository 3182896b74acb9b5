"""How are consumers run from a terminal?"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from cyclopts import Parameter

from aio_pika_batch.cli.exits import Exit
from aio_pika_batch.cli.fleet import ProcessManager, ProcessPolicy
from aio_pika_batch.cli.logging import configure_logging
from aio_pika_batch.cli.options import LogFormat, LogLevel, LoopName, Work
from aio_pika_batch.cli.running import run_all, run_loop
from aio_pika_batch.cli.supervisor import FATAL, Supervisor
from aio_pika_batch.cli.targets import Loading, prepare
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.health.http_server import HttpServer
from aio_pika_batch.health.metrics import has_prometheus
from aio_pika_batch.health.server import LOOPBACK, HealthServer
from aio_pika_batch.logs import KeywordLogger

_log = KeywordLogger(logging.getLogger("aio_pika_batch.cli"))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Watching:
    """How the processes are looked after, and looked at."""

    health_port: Annotated[int | None, Parameter(alias="-p")] = None
    """Serve /livez, /readyz, /metrics and /status here; 0 takes a free port, and logs which."""
    health_host: str = LOOPBACK
    """Who may ask; by default programs on this machine only."""
    hung_after: float = 60.0
    """Seconds of silence after which a supervised process is killed and restarted."""
    crash_limit: int = 5
    """So many crashes in a row are a crash loop; if all processes are in one, that is the end."""


def run(
    target: str,
    /,
    *more: str,
    workers: Annotated[int | None, Parameter(alias="-w")] = None,
    processes: Annotated[int | None, Parameter(alias="-n")] = None,
    reload: Annotated[bool, Parameter(negative="")] = False,
    drain_timeout: float | None = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = "auto",
    loop: LoopName = "auto",
    watching: Watching | None = None,
    loading: Loading | None = None,
) -> int:
    """Run consumers until SIGTERM or Ctrl-C, then drain.

    Args:
        target: A consumer, as module:attribute: an instance, a class, or with --factory a function.
        more: Further ones, to run beside it in the same process.
        workers: Workers of each consumer, instead of its num_workers.
        processes: Run so many processes, supervised: restarted when they crash or hang, replaced
            one by one at SIGHUP.
        reload: For development: run anew whenever a file in --app-dir changes.
        drain_timeout: Seconds for the drain, instead of shutdown_timeout.
        log_level: What is logged at least.
        log_format: auto is console on a terminal, and json elsewhere.
        loop: Event loop; auto is uvloop where it is installed.
        watching: How they are looked after.
        loading: How they are found.
    """
    watching = watching or Watching()
    work = Work(
        targets=(target, *more),
        loading=loading or Loading(),
        workers=workers,
        drain_timeout=drain_timeout,
        log_level=log_level,
        log_format=log_format,
        loop=loop,
        has_metrics=watching.health_port is not None and has_prometheus(),
    )
    configure_logging(log_level, log_format)
    if processes is None and not reload:
        return run_loop(partial(_run_here, work, watching), loop)
    policy = _policy(work, watching, 1 if processes is None else processes, is_patient=reload)
    prepare(work.loading)
    return asyncio.run(_supervise(policy, work, watching))


async def _run_here(work: Work, watching: Watching) -> Exit:
    consumers = work.load()
    async with AsyncExitStack() as stack:
        if watching.health_port is not None:
            host, port = watching.health_host, watching.health_port
            server = HealthServer(*consumers, host=host, port=port)
            _say_where(await stack.enter_async_context(server), watching)
        return await run_all(consumers)


def _policy(work: Work, watching: Watching, size: int, *, is_patient: bool) -> ProcessPolicy:
    if os.name != "posix":
        msg = "--processes and --reload need an operating system with POSIX signals and sockets"
        raise ConfigurationError(msg)
    if size < 1:
        raise ConfigurationError(f"--processes: must be at least 1, not {size}")
    if watching.hung_after <= 0:
        raise ConfigurationError(f"--hung-after: must be more than 0, not {watching.hung_after:g}")
    if watching.crash_limit < 1:
        raise ConfigurationError(f"--crash-limit: must be at least 1, not {watching.crash_limit}")
    # Whoever develops may halt at a breakpoint.
    silence = math.inf if is_patient else watching.hung_after
    return ProcessPolicy(
        size=size,
        silence=silence,
        boot=max(silence, 120.0),
        budget=work.drain_timeout or 25.0,
        limit=watching.crash_limit,
        fatal=FATAL,
        is_patient=is_patient,
    )


async def _supervise(policy: ProcessPolicy, work: Work, watching: Watching) -> int:
    supervisor = Supervisor(ProcessManager(policy), work)
    async with AsyncExitStack() as stack:
        if watching.health_port is not None:
            host, port = watching.health_host, watching.health_port
            server = HttpServer(supervisor.answer(), host=host, port=port)
            _say_where(await stack.enter_async_context(server), watching)
        if policy.is_patient:
            reloading = asyncio.ensure_future(_reload(supervisor, work))
            stack.callback(reloading.cancel)
        return await supervisor.run()


async def _reload(supervisor: Supervisor, work: Work) -> None:
    """Roll whenever a file changes."""
    from watchfiles import PythonFilter, awatch

    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # what it tells, we tell
    env_file = work.loading.env_file
    watched = [work.loading.app_dir, *([env_file] if env_file else [])]
    keep = PythonFilter(extra_extensions=(".env",))
    async for changes in awatch(*watched, watch_filter=keep, stop_event=asyncio.Event()):
        _log.info("files have changed", files=sorted({path for _, path in changes}))
        supervisor.roll()


def _say_where(server: HttpServer, watching: Watching) -> None:
    _log.info("health", url=f"http://{watching.health_host}:{server.port}")
