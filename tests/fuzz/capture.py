"""Records what a RabbitMQ sends: ``python -m tests.fuzz.capture``.

It uses the broker of the integration tests, lets it deliver, confirm and return messages of many
kinds, and writes every received byte to ``corpus``, one file for each connection. A RabbitMQ that
speaks AMQP 1.0 is recorded over that alone.
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from aio_pika_batch.adapters.aio_pika.frame_parser import FrameParser
from aio_pika_batch.adapters.amqp10.frames import Frames10Parser
from aio_pika_batch.adapters.rabbitmq import AioPikaTransport, Amqp10Transport
from aio_pika_batch.core.publication import Publication
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.transport import Endpoint, Subscription
from tests.fuzz.seeds import CAPTURED_TAG, CORPUS
from tests.support.find import choose

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aio_pika_batch.core.message import Headers

_QUEUE = "fuzz"
_PLENTY: Headers = {
    "text": "häfen",
    "bytes": b"\x00\xff",
    "yes": True,
    "small": 7,
    "large": 2**40,
    "double": 1.1,
    "none": None,
    "when": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    "decimal": Decimal("3.14"),
    "list": [1, "two", [3.0, {"four": None}]],
    "table": {"a": {"b": {"c": ["d"]}}},
}


@asynccontextmanager
async def _recorded(
    name: str, parser: type[FrameParser | Frames10Parser] = FrameParser
) -> AsyncIterator[None]:
    """Record the connection that is opened meanwhile; there must be exactly one."""
    received: dict[Any, bytearray] = {}
    feed = parser.feed

    def listening(self: Any, data: bytes) -> Any:
        received.setdefault(self, bytearray()).extend(data)
        return feed(self, data)

    with patch.object(parser, "feed", listening):
        yield
    (stream,) = received.values()
    (CORPUS / f"{name}.bin").write_bytes(stream)
    print(f"{name}: {len(stream)} bytes")


def _publications() -> Sequence[Publication]:
    return [
        Publication(b"", routing_key=_QUEUE),
        Publication(b"body", routing_key=_QUEUE, message_id="m", correlation_id="c", priority=3),
        Publication(bytes(1000), routing_key=_QUEUE, headers=_PLENTY, content_type="text/plain"),
        Publication(b"x", routing_key=_QUEUE, headers={}, expiration=60, type="t", app_id="a"),
        Publication(b"lost", routing_key="nowhere", headers=_PLENTY, reply_to="r"),
        Publication(bytes(5000), routing_key=_QUEUE, timestamp=datetime.now(UTC), user_id="guest"),
        *(Publication(b"%d" % number, routing_key=_QUEUE) for number in range(10)),
    ]


async def _capture10(url: str, version: str) -> None:
    transport = Amqp10Transport(Endpoint(url=url))
    arguments: Headers = {"x-queue-type": "quorum", "x-delivery-limit": -1}
    await transport.declare(Topology(queues=(Queue(_QUEUE, arguments=arguments),)))
    # A decimal would end the broker's session.
    plenty = {name: value for name, value in _PLENTY.items() if name != "decimal"}
    plenty |= {f"x-{name}": value for name, value in plenty.items()}
    publications = [replace(each, headers=each.headers and plenty) for each in _publications()]
    async with transport.publisher() as publisher:
        await publisher.publish(publications)
    subscription = Subscription(queue=_QUEUE, prefetch=6, consumer_tag=CAPTURED_TAG)
    async with (
        _recorded(f"amqp10-{version}", Frames10Parser),
        transport.session(subscription) as session,
    ):
        tags: list[int] = []
        async for messages in session:
            for message in messages:
                tags.append(message.delivery_tag)
                kind = Disposition.REQUEUE if len(tags) < 4 else Disposition.ACK
                await session.settle([Settlement(kind, (message.delivery_tag,))])
            if len(tags) == len(publications) + 2:
                await session.cancel()


async def _capture(url: str) -> None:
    transport = AioPikaTransport(Endpoint(url=url))
    await transport.declare(Topology(queues=(Queue(_QUEUE, durable=False, auto_delete=False),)))
    async with _recorded("publishing"), transport.publisher() as publisher:
        await publisher.publish(_publications())
    subscription = Subscription(queue=_QUEUE, prefetch=6, consumer_tag=CAPTURED_TAG)
    async with _recorded("consuming"), transport.session(subscription) as session:
        count = 0
        async for messages in session:
            count += len(messages)
            tags = tuple(message.delivery_tag for message in messages)
            await session.settle([Settlement(Disposition.ACK, tags)])
            if count == len(_publications()) - 1:
                await session.cancel()


def main() -> None:
    """Record."""
    with tempfile.TemporaryDirectory() as folder, choose().start(Path(folder)) as broker:
        version = ".".join(broker.version.split(".")[:2])
        asyncio.run(_capture10(broker.url, version) if version >= "4" else _capture(broker.url))


if __name__ == "__main__":
    main()
