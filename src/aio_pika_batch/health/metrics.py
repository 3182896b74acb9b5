"""Answers `/metrics` with what prometheus-client has counted, if it is installed."""

from __future__ import annotations

import os
from http import HTTPStatus
from importlib.util import find_spec

from aio_pika_batch.health.http_server import Response

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names a folder in which prometheus-client adds up several processes."""


def has_prometheus() -> bool:
    """Return whether prometheus-client is installed."""
    return find_spec("prometheus_client") is not None


def metrics() -> Response:
    """Return all metrics in Prometheus's text format, added up if several processes share them."""
    if not has_prometheus():
        text = "no metrics: run pip install 'aio-pika-batch[prometheus]'\n"
        return Response(HTTPStatus.NOT_FOUND, text)
    from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    # With several processes, the default registry has only what this one has counted.
    registry = REGISTRY
    if MULTIPROCESS_DIR in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # it has no types
    return Response(HTTPStatus.OK, generate_latest(registry).decode(), CONTENT_TYPE_LATEST)
