"""FastStream: one handler call for each message, acked as it does by itself."""

from __future__ import annotations

import asyncio
import logging

from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue

from benchmarks.protocol import Job, Meter, compete


async def consume(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    done = asyncio.Event()
    broker = RabbitBroker(
        job.url,
        default_channel=Channel(prefetch_count=job.prefetch),
        logger=logging.getLogger("faststream"),
        log_level=logging.DEBUG,  # which is discarded
    )
    size = 0

    @broker.subscriber(RabbitQueue(job.queue, durable=True, declare=False))
    async def handle(message: RabbitMessage) -> None:
        nonlocal size
        size += len(message.body)
        if meter.count(1):
            done.set()

    async with broker:
        await broker.start()
        await done.wait()


def run(job: Job, meter: Meter) -> None:
    """Run on asyncio's own loop."""
    asyncio.run(consume(job, meter))


if __name__ == "__main__":
    compete(run, "faststream", "aio-pika", "aiormq")
