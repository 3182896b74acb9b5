"""How does a program show its health to whoever runs it?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Protocol

from aio_pika_batch.health.http_server import HttpServer, Response
from aio_pika_batch.health.metrics import metrics
from aio_pika_batch.health.probes import Verdict, as_json, liveness, readiness
from aio_pika_batch.status import ConsumerStatus

LOOPBACK = "127.0.0.1"


class HasStatus(Protocol):
    """A consumer, as far as it matters here."""

    def status(self) -> ConsumerStatus:
        """A snapshot."""
        ...


class HealthServer(HttpServer):
    """Serves `/livez`, `/readyz`, `/metrics` and `/status` while its context is open.

    `/livez` fails with 503 if a worker has held a message for longer than `stuck_after`, and does
    not care whether the broker is there. `/readyz` fails with 503 unless every worker consumes.
    Both say why. `/metrics` is Prometheus's text format, and needs prometheus-client. `/status` is
    JSON, without passwords.

    Example::

        async with HealthServer(consumer, port=8080):
            await consumer.run()

    Args:
        *consumers: One, or several that run in this process.
        host: Who may ask: by default, programs on this machine only.
        port: 0 takes a free one; `port` tells which.

    Raises:
        ConfigurationError: There is no such port, or, when its context is entered, it cannot be
            had.
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
    livez: Callable[[], Verdict],
    readyz: Callable[[], Verdict],
    status: Callable[[], Mapping[str, object]],
    metrics: Callable[[], Response],
) -> Callable[[str], Response | None]:
    """Answer what is asked for by its path."""

    def answer(path: str) -> Response | None:
        match path:
            case "/livez":
                return _told(livez())
            case "/readyz":
                return _told(readyz())
            case "/status":
                text = json.dumps(status(), indent=2) + "\n"
                return Response(HTTPStatus.OK, text, "application/json")
            case "/metrics":
                return metrics()
            case _:
                return None

    return answer


def _told(verdict: Verdict) -> Response:
    if verdict.is_good:
        return Response(HTTPStatus.OK, "ok\n")
    return Response(HTTPStatus.SERVICE_UNAVAILABLE, _lines(verdict.reasons))


def _lines(reasons: Iterable[str]) -> str:
    return "".join(f"{reason}\n" for reason in reasons)
