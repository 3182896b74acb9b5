"""Consumers of aio-pika-batch on NATS JetStream. A `nats://` URL is all that they have to know."""

from __future__ import annotations

from aio_pika_batch.transport import Endpoint
from aio_pika_batch_nats.transport import NatsTransport

__all__ = ["NatsTransport", "open_transport"]


def open_transport(endpoint: Endpoint) -> NatsTransport:
    """Make the transport for an endpoint; nothing is connected yet."""
    return NatsTransport(endpoint)
