"""aio-pika, consuming as its users do.

Tasks: ``each`` awaits an ack for each message; ``multiple`` sends one for a hundred; ``mixed`` and
``requeue`` do by hand what this library does: a copy is published, and confirmed, before its
original is acked; all copies of a batch at once, which is the fastest way.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aio_pika

from benchmarks.protocol import Job, Meter, compete

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

RETRIES = "x-retry-count"


async def consume(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    done = asyncio.Event()
    connection = await aio_pika.connect(job.url)
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=job.prefetch)
        queue = await channel.get_queue(job.queue)
        batch: list[AbstractIncomingMessage] = []
        size = 0

        async def each(message: AbstractIncomingMessage) -> None:
            nonlocal size
            size += len(message.body)
            await message.ack()
            if meter.count(1):
                done.set()

        async def collect(message: AbstractIncomingMessage) -> None:
            nonlocal size, batch
            size += len(message.body)
            batch.append(message)
            if len(batch) == job.batch:
                full, batch = batch, []
                await settle(channel, job, full)
                if meter.count(len(full)):
                    done.set()

        await queue.consume(each if job.task == "each" else collect)
        await done.wait()
        await channel.close()


async def settle(channel: AbstractChannel, job: Job, batch: list[AbstractIncomingMessage]) -> None:
    """Do with a batch what the task says."""
    if job.task == "multiple":
        await batch[-1].ack(multiple=True)
        return
    again = batch if job.task == "requeue" else batch[1::10]
    await asyncio.gather(*(copy(channel, job.queue, message) for message in again))
    if job.task == "requeue":
        await batch[-1].ack(multiple=True)
        return
    await batch[0].reject(requeue=False)
    for message in batch[1:]:
        await message.ack()


async def copy(channel: AbstractChannel, queue: str, message: AbstractIncomingMessage) -> None:
    """Publish a copy with its retries counted, and wait for the confirmation."""
    headers = dict(message.headers)
    retries = headers.get(RETRIES)
    headers[RETRIES] = (retries if isinstance(retries, int) else 0) + 1
    await channel.default_exchange.publish(
        aio_pika.Message(
            message.body,
            headers=headers,
            content_type=message.content_type,
            delivery_mode=message.delivery_mode,
            timestamp=message.timestamp,
        ),
        routing_key=queue,
    )


def run(job: Job, meter: Meter) -> None:
    """Run on asyncio's own loop."""
    asyncio.run(consume(job, meter))


if __name__ == "__main__":
    compete(run, "aio-pika", "aiormq")
