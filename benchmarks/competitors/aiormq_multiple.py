"""aiormq, the client under aio-pika: `basic_consume`, one multiple ack for a hundred messages."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiormq

from benchmarks.protocol import Job, Meter, compete

if TYPE_CHECKING:
    from aiormq.abc import DeliveredMessage


async def consume(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    done = asyncio.Event()
    connection = await aiormq.connect(job.url)
    channel = await connection.channel()
    await channel.basic_qos(prefetch_count=job.prefetch)
    unacked = size = 0

    async def handle(message: DeliveredMessage) -> None:
        nonlocal unacked, size
        size += len(message.body)
        unacked += 1
        if unacked == job.batch:
            unacked = 0
            await channel.basic_ack(message.delivery_tag, multiple=True)
            if meter.count(job.batch):
                done.set()

    await channel.basic_consume(job.queue, handle)
    await done.wait()
    await channel.close()
    await connection.close()


def run(job: Job, meter: Meter) -> None:
    """Run on asyncio's own loop."""
    asyncio.run(consume(job, meter))


if __name__ == "__main__":
    compete(run, "aiormq")
