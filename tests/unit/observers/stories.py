"""A run of a consumer in which each kind of event happens."""

from __future__ import annotations

import asyncio

from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)


async def everything(rabbit, *observers):
    """Run a consumer to its end: ack, retry, dead letter, exception, lost session, stale result."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(
        first_then(answering(ACK, REQUEUE, NACK), answering(error=KeyError()), taking(20), ack),
        transport=rabbit.transport,
        observers=observers,
        batch_size=3,
        batch_timeout=5,
        dead_letter_exchange="dlx",
    )
    async with consumer:
        await asyncio.sleep(12)
        rabbit.broker.cut()
        await asyncio.sleep(60)
    return consumer
