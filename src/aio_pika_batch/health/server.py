"""Serves the health endpoints of the consumers in a process, and what prometheus-client counts.

Live means that no worker holds a message longer than `stuck_after`. Ready means that every worker
is connected, consumes and isn't draining. A missing broker makes a program unready, but not dead:
a restart wouldn't bring the broker back, and every consumer would restart along with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aio_pika_batch.health.http_server import HttpServer, Response
from aio_pika_batch.masking import mask_text
from aio_pika_batch.status import ConsumerStatus, WorkerState

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.registry import Collector

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names a folder in which prometheus-client adds up several processes."""

LOOPBACK = "127.0.0.1"

# A worker that probes after a pause consumes, if only one message at a time.
_READY = frozenset({WorkerState.CONSUMING, WorkerState.PROBING})

# In other states, the end of the last session isn't the reason.
_CONNECTING = frozenset({WorkerState.CONNECTING, WorkerState.WAITING})


class HasStatus(Protocol):
    """What the server needs of a consumer."""

    def status(self) -> ConsumerStatus:
        """Return a snapshot."""
        ...


class HealthServer(HttpServer):
    """Serves `/livez`, `/readyz`, `/metrics` and `/status` while its context is open.

    `/livez` returns 503 if a worker holds a message longer than `stuck_after`, whether or not the
    broker is available. `/readyz` returns 503 unless every worker consumes. Both give the reason.
    `/metrics` returns Prometheus's text format and needs prometheus-client. `/status` returns JSON
    with passwords masked.

    Example::

        async with HealthServer(consumer, port=8080):
            await consumer.run()

    Args:
        *consumers: The consumers that run in this process.
        host: Address to listen on. By default only programs on this machine can connect.
        port: 0 picks a free port; read it from `port`.

    Raises:
        ConfigurationError: The port is out of range, or, on entering the context, can't be used.
    """

    def __init__(self, *consumers: HasStatus, port: int, host: str = LOOPBACK) -> None:
        self._consumers = consumers
        super().__init__(
            endpoints(
                livez=lambda: liveness(self._statuses()),
                readyz=lambda: readiness(self._statuses()),
                status=lambda: {"pid": os.getpid(), "consumers": as_json(self._statuses())},
                metrics=metrics,
            ),
            host=host,
            port=port,
        )

    def _statuses(self) -> list[ConsumerStatus]:
        return [consumer.status() for consumer in self._consumers]


def endpoints(
    *,
    livez: Callable[[], Sequence[str]],
    readyz: Callable[[], Sequence[str]],
    status: Callable[[], Mapping[str, object]],
    metrics: Callable[[], Response],
) -> Callable[[str], Response | None]:
    """Return the function that answers each path.

    Args:
        livez: Returns the reasons why the probe fails; none if it succeeds.
        readyz: The same.
    """

    def answer(path: str) -> Response | None:
        match path:
            case "/livez":
                return _response(livez())
            case "/readyz":
                return _response(readyz())
            case "/status":
                text = json.dumps(status(), indent=2) + "\n"
                return Response(HTTPStatus.OK, text, "application/json")
            case "/metrics":
                return metrics()
            case _:
                return None

    return answer


def _response(reasons: Sequence[str]) -> Response:
    if not reasons:
        return Response(HTTPStatus.OK, "ok\n")
    text = "".join(f"{reason}\n" for reason in reasons)
    return Response(HTTPStatus.SERVICE_UNAVAILABLE, text)


def liveness(statuses: Iterable[ConsumerStatus]) -> list[str]:
    """Return which consumers hold a message for too long; a restart helps those."""
    return [
        f"{_name(status)}: a message has been held for {_oldest(status):.0f} s,"
        " longer than stuck_after"
        for status in statuses
        if status.is_stuck
    ]


def readiness(statuses: Iterable[ConsumerStatus]) -> list[str]:
    """Return which workers of these consumers don't take messages."""
    return [reason for status in statuses for reason in _unready(status)]


def _unready(status: ConsumerStatus) -> Iterable[str]:
    if not status.is_running or not status.workers:
        yield f"{_name(status)}: not started, or stopped"
    for worker in status.workers:
        if worker.state not in _READY:
            error = worker.last_error if worker.state in _CONNECTING else None
            why = f": {mask_text(error)}" if error else ""
            yield f"{_name(status)}: worker {worker.index} is {worker.state.value}{why}"


def _name(status: ConsumerStatus) -> str:
    return f"{status.consumer} ({status.queue})"


def _oldest(status: ConsumerStatus) -> float:
    return max((worker.oldest or 0.0 for worker in status.workers), default=0.0)


def as_json(statuses: Iterable[ConsumerStatus]) -> list[dict[str, object]]:
    """Return the snapshots as values for JSON, with passwords masked."""
    consumers = [asdict(status) for status in statuses]
    for consumer in consumers:
        for worker in consumer["workers"]:
            worker["state"] = worker["state"].value
            if worker["last_error"] is not None:
                worker["last_error"] = mask_text(worker["last_error"])
    return consumers


def has_prometheus() -> bool:
    """Return whether prometheus-client is installed."""
    return find_spec("prometheus_client") is not None


def metrics(*more: Collector) -> Response:
    """Return all metrics in Prometheus's text format, added up if several processes share them.

    Args:
        *more: Further metrics, of a process that counts nothing else itself.
    """
    if not has_prometheus():
        text = "no metrics: run pip install 'aio-pika-batch[prometheus]'\n"
        return Response(HTTPStatus.NOT_FOUND, text)
    from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

    # With several processes, the default registry has only what this one has counted.
    registry = REGISTRY
    if more or MULTIPROCESS_DIR in os.environ:
        registry = CollectorRegistry()
        for each in (_SharedMetrics(), *more):
            registry.register(each)
    return Response(HTTPStatus.OK, generate_latest(registry).decode(), CONTENT_TYPE_LATEST)


class _SharedMetrics:
    """Adds up the files that processes share, and leaves out those that can't be read."""

    def collect(self) -> Iterable[Metric]:
        """Return the sums; nothing if the folder is gone."""
        from prometheus_client.multiprocess import MultiProcessCollector

        folder = os.environ.get(MULTIPROCESS_DIR)
        files = [str(each) for each in sorted(Path(folder).glob("*.db"))] if folder else []
        merge = MultiProcessCollector.merge
        try:
            return merge(files)  # type: ignore[no-untyped-call, no-any-return]  # it has no types
        except Exception:  # noqa: BLE001  -- a damaged file raises whatever its bytes lead to
            return merge(filter(_is_readable, files))  # type: ignore[no-untyped-call, no-any-return]


def _is_readable(file: str) -> bool:
    from prometheus_client.multiprocess import MultiProcessCollector

    try:
        MultiProcessCollector.merge([file])  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001  -- as above
        return False
    return True
