"""Serves the health endpoints of the consumers in a process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Protocol

from aio_pika_batch.health.http_server import HttpServer, Response
from aio_pika_batch.health.metrics import metrics
from aio_pika_batch.health.probes import ProbeResult, as_json, liveness, readiness
from aio_pika_batch.status import ConsumerStatus

LOOPBACK = "127.0.0.1"


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
    livez: Callable[[], ProbeResult],
    readyz: Callable[[], ProbeResult],
    status: Callable[[], Mapping[str, object]],
    metrics: Callable[[], Response],
) -> Callable[[str], Response | None]:
    """Return the function that answers each path."""

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


def _response(result: ProbeResult) -> Response:
    if result.is_good:
        return Response(HTTPStatus.OK, "ok\n")
    text = "".join(f"{reason}\n" for reason in result.reasons)
    return Response(HTTPStatus.SERVICE_UNAVAILABLE, text)
