"""The native objects of a session, for handlers that declare exchanges and publish themselves.

They offer the calls of aio-pika's channel that make sense on NATS, and JetStream's own context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from nats.js import JetStreamContext

from aio_pika_batch.transport import Outcome, Publication, PublishError
from aio_pika_batch_nats.link import Link
from aio_pika_batch_nats.publisher import NatsPublisher
from aio_pika_batch_nats.streams import delete_exchange


class Letter(Protocol):
    """A message like `aio_pika.Message`; its body and headers are sent."""

    body: bytes
    headers: Mapping[str, Any]


class NatsChannel:
    """Stands in for aio-pika's channel.

    Attributes:
        jetstream: NATS's own.
    """

    def __init__(self, link: Link) -> None:
        self.jetstream: JetStreamContext = link.client.jetstream()
        self._publisher = NatsPublisher(link)

    async def declare_exchange(self, name: str, **_: object) -> NatsExchange:
        """Return an exchange. NATS needs no declaration: a binding creates it."""
        return NatsExchange(name, self.jetstream, self._publisher)

    get_exchange = declare_exchange


class NatsExchange:
    """Stands in for aio-pika's exchange."""

    def __init__(self, name: str, jetstream: JetStreamContext, publisher: NatsPublisher) -> None:
        self.name = name
        self._jetstream = jetstream
        self._publisher = publisher

    async def publish(self, message: Letter, routing_key: str) -> None:
        """Publish, and wait for the confirmation.

        Raises:
            PublishError: The server didn't confirm it.
        """
        letter = Publication(
            message.body,
            exchange=self.name,
            routing_key=routing_key,
            headers=message.headers or None,
        )
        [outcome] = await self._publisher.publish([letter])
        if outcome is not Outcome.CONFIRMED:
            raise PublishError(f"a message to exchange {self.name!r} was {outcome.value}")

    async def delete(self) -> None:
        """Unbind every queue from it."""
        await delete_exchange(self._jetstream, self.name)
