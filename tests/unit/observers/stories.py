"""What is there to be seen? One consumer's life, in which everything happens once."""

from __future__ import annotations

import asyncio

from tests.unit.shell.stage import (
    ACK,
    NACK,
    REQUEUE,
    Scribe,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)


async def everything(stage, *observers):
    """Success, retry, dead letter, exception, lost session, stale result; ends after the stop."""
    stage.declare("dead")
    stage.bind("dead", "dlx", "", kind="fanout")
    stage.put(*numbered(3))
    consumer = Scribe(
        first_then(answering(ACK, REQUEUE, NACK), answering(error=KeyError()), taking(20), ack),
        transport=stage.transport,
        observers=observers,
        batch_size=3,
        batch_timeout=5,
        dead_letter_exchange="dlx",
    )
    async with consumer:
        await asyncio.sleep(12)
        stage.broker.cut()
        await asyncio.sleep(60)
    return consumer
