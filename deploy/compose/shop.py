"""A consumer of orders; ``python shop.py 100`` publishes a hundred orders per second."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Sequence
from itertools import count

import aio_pika

from aio_pika_batch import BatchConsumer, Message, MessageResult, Nack, Result


class Importer(BatchConsumer):
    """Takes orders: one in fifty fails twice, one in a hundred has a negative price."""

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Pretend to store them all at once."""
        await asyncio.sleep(0.05)
        for message in messages:
            order = message.json()
            if order["cents"] < 0:
                yield Nack("negative price")
            elif order["id"] % 50 == 0 and message.retry_count < 2:  # noqa: PLR2004
                yield MessageResult.REQUEUE
            else:
                yield MessageResult.ACK


async def order(rate: float) -> None:
    """Publish orders until Ctrl-C, *rate* per second, with aio-pika; any AMQP client would do."""
    url, queue = os.environ["AIO_PIKA_BATCH_URL"], os.environ["AIO_PIKA_BATCH_QUEUE_NAME"]
    connection = await aio_pika.connect_robust(url)
    async with connection, connection.channel() as channel:
        for number in count(1):
            cents = -1 if number % 100 == 0 else random.randrange(100, 10_000)
            body = json.dumps({"id": number, "cents": cents}).encode()
            await channel.default_exchange.publish(
                aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT), queue
            )
            await asyncio.sleep(1 / rate)


if __name__ == "__main__":
    asyncio.run(order(float(sys.argv[1])))
