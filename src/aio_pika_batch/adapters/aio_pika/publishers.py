"""Which publisher does a connection get? Its wire's, opened here and in the end closed."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.connection import open_link
from aio_pika_batch.adapters.aio_pika.fast_publisher import FastPublisher
from aio_pika_batch.adapters.aio_pika.plain_publisher import PlainPublisher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aio_pika_batch.adapters.aio_pika.publisher import AioPikaPublisher
    from aio_pika_batch.adapters.aio_pika.urls import Address
    from aio_pika_batch.transport import Endpoint


@asynccontextmanager
async def open_publisher(
    endpoint: Endpoint, addresses: Sequence[Address]
) -> AsyncIterator[AioPikaPublisher]:
    """Connect, open a channel in confirm mode, and in the end close both."""
    link = await open_link(endpoint, addresses)
    publisher: AioPikaPublisher
    if link.is_fast and link.tap is not None:
        publisher = FastPublisher(link, link.tap, endpoint.publish_timeout)
    else:
        publisher = PlainPublisher(link, endpoint.publish_timeout)
    try:
        await publisher.open(endpoint.connect_timeout)
        yield publisher
    finally:
        await publisher.close()
