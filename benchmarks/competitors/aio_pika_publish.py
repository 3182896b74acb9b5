"""aio-pika, publishing with confirms.

Tasks: ``sequential``, one after another; ``gather``, a hundred at a time.
"""

from __future__ import annotations

import asyncio

import aio_pika

from benchmarks.protocol import Job, Meter, compete


async def publish(job: Job, meter: Meter) -> None:
    """Publish until everything is measured."""
    connection = await aio_pika.connect(job.url)
    async with connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchange = channel.default_exchange

        async def one(number: int) -> None:
            message = aio_pika.Message(
                job.payload,
                headers={"tenant": number, "trace": "4bf92f3577b34da6a3ce929d0e0e4736"},
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await exchange.publish(message, routing_key=job.queue)

        while True:
            if job.task == "gather":
                await asyncio.gather(*(one(number) for number in range(job.batch)))
            else:
                for number in range(job.batch):
                    await one(number)
            if meter.count(job.batch):
                return


def run(job: Job, meter: Meter) -> None:
    """Run on asyncio's own loop."""
    asyncio.run(publish(job, meter))


if __name__ == "__main__":
    compete(run, "aio-pika", "aiormq")
