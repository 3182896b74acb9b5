"""Our `Consumer`: one message at a time, all acked. Option: ``defaults``, no prefetch count."""

from __future__ import annotations

import asyncio

from aio_pika_batch import Consumer, ConsumerSettings, Message, MessageResult
from benchmarks.protocol import Job, Meter, compete


async def consume(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    done = asyncio.Event()
    size = 0

    class Counting(Consumer):
        async def process_message(self, message: Message) -> MessageResult:
            nonlocal size
            size += len(message.body)
            if meter.count(1):
                done.set()
            return MessageResult.ACK

    given = {} if job.options.get("defaults") else {"prefetch_count": job.prefetch}
    settings = ConsumerSettings(url=job.url, queue_name=job.queue, **given)
    async with Counting(settings):
        await done.wait()


def run(job: Job, meter: Meter) -> None:
    """Run on asyncio's own loop."""
    asyncio.run(consume(job, meter))


if __name__ == "__main__":
    compete(run, "aio-pika-batch", "aio-pika", "aiormq")
