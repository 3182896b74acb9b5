"""Run consumers of aio-pika-batch on NATS JetStream: they only need a `nats://` URL."""

from __future__ import annotations

from aio_pika_batch.transport import Endpoint
from aio_pika_batch_nats.transport import NatsTransport

__all__ = ["NatsTransport", "open_transport"]


def open_transport(endpoint: Endpoint) -> NatsTransport:
    """Return the transport for an endpoint. It isn't connected yet."""
    return NatsTransport(endpoint)
