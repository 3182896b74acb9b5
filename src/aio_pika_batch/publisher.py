"""Publishes messages with confirms, for consumers and without one (`open_publisher`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aio_pika_batch.core.message import Headers
from aio_pika_batch.core.publication import Outcome, Publication, describe_outcome
from aio_pika_batch.errors import PublishError, SessionClosed
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.masking import mask_url
from aio_pika_batch.runtime.publishing import SharedPublisher
from aio_pika_batch.transport import Endpoint, Transport, open_transport


class PublishMethods:
    """`publish` and `publish_many`."""

    def _publisher(self) -> tuple[SharedPublisher, float]:
        """Return the publisher, and how many seconds it waits for a confirm."""
        raise NotImplementedError

    async def publish(
        self,
        body: bytes,
        *,
        exchange: str = "",
        routing_key: str = "",
        headers: Headers | None = None,
        # Otherwise the broker confirms a message that it drops, because no queue takes it.
        mandatory: bool | None = None,
        **properties: Any,  # noqa: ANN401  -- those of Publication, each with its own type
    ) -> None:
        """Publish a message and wait for its confirm. Calls made at the same time share a write.

        Args:
            mandatory: Whether it is an error if no queue takes the message. By default it is,
                except for a direct reply-to address (see :class:`~aio_pika_batch.Publication`).
            **properties: Further ones of :class:`~aio_pika_batch.Publication`, such as
                `message_id`.

        Raises:
            PublishError: It was returned, refused, or not confirmed within `publish_timeout`.
            SessionClosed: The consumer is not running, or the publisher is closed.
        """
        if mandatory is not None:
            properties["mandatory"] = mandatory
        publication = Publication(
            body, exchange=exchange, routing_key=routing_key, headers=headers, **properties
        )
        publisher, timeout = self._publisher()
        outcome = await publisher.publish_one(publication)
        if outcome is not Outcome.CONFIRMED:
            raise PublishError(describe_outcome(outcome, publication, timeout))

    async def publish_many(self, publications: Iterable[Publication]) -> Sequence[Outcome]:
        """Publish many messages at once and wait for all confirms.

        Returns:
            An outcome for each, in order.

        Raises:
            SessionClosed: The consumer is not running, or the publisher is closed.
        """
        # Not by the publisher of copies: a missing exchange closes a channel, and the outcomes of
        # all that is in flight on it are unknown.
        publisher, _ = self._publisher()
        return await publisher.publish(list(publications))


class MessagePublisher(PublishMethods):
    """Publishes without a consumer, over one connection that is opened again when it is lost.

    :func:`open_publisher` creates it.
    """

    def __init__(self, shared: SharedPublisher, publish_timeout: float) -> None:
        self._shared = shared
        self._publish_timeout = publish_timeout

    def _publisher(self) -> tuple[SharedPublisher, float]:
        if self._shared.is_closed:
            raise SessionClosed("the publisher is closed: publish inside its `async with` block")
        return self._shared, self._publish_timeout


@asynccontextmanager
async def open_publisher(
    broker: str | Endpoint, *, transport: Transport | None = None
) -> AsyncIterator[MessagePublisher]:
    """Connect, and publish without a consumer.

    Example::

        async with open_publisher("amqp://localhost") as publisher:
            outcomes = await publisher.publish_many(
                [Publication(b"%d" % number, routing_key="orders") for number in range(1000)]
            )

    Args:
        broker: A URL, or an :class:`~aio_pika_batch.transport.Endpoint` with timeouts and TLS.
        transport: None uses the one that serves the URL's scheme.

    Raises:
        AccessRefused: The broker refuses the connection.
        BrokerUnavailable: The broker can't be reached.
        ConfigurationError: The URL can't be used.
    """
    endpoint = Endpoint(url=broker) if isinstance(broker, str) else broker
    log = KeywordLogger(
        logging.getLogger("aio_pika_batch.publisher"), broker=mask_url(endpoint.url)
    )
    shared = SharedPublisher(open_transport(endpoint) if transport is None else transport, log)
    # Now: a wrong URL should be seen here, and not as an outcome of the first message.
    await shared.connect()
    try:
        yield MessagePublisher(shared, endpoint.publish_timeout)
    finally:
        deadline = asyncio.get_running_loop().time() + endpoint.publish_timeout
        await shared.finish(deadline)
        await shared.close(deadline)
