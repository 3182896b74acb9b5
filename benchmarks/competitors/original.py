"""The first published `aio-pika-batch`, 0.1.0, in an environment of its own.

Tasks: ``ack``; ``mixed``, 1 % NACK and 10 % REQUEUE.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import structlog

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from benchmarks.protocol import Job, Meter, compete

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika.abc import AbstractIncomingMessage


async def consume(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    # As quiet as this library is: it logs each requeue, which would cost more than the requeue.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    done = asyncio.Event()
    size = 0
    pattern = [MessageResult.ACK] * job.batch
    if job.task == "mixed":
        pattern[1::10] = [MessageResult.REQUEUE] * len(pattern[1::10])
        pattern[0] = MessageResult.NACK

    class Counting(BatchConsumer[BatchConsumerSettings]):
        async def process_messages(
            self, messages: list[AbstractIncomingMessage]
        ) -> AsyncIterator[MessageResult]:
            nonlocal size
            for message, result in zip(messages, pattern, strict=False):
                size += len(message.body)
                yield result
            if meter.count(len(messages)):
                done.set()

    async with Counting(
        BatchConsumerSettings(
            url=job.url,
            queue_name=job.queue,
            prefetch_count=job.prefetch,
            batch_size=job.batch,
        )
    ):
        await done.wait()


def run(job: Job, meter: Meter) -> None:
    """Run on asyncio's own loop."""
    asyncio.run(consume(job, meter))


if __name__ == "__main__":
    compete(run, "aio-pika-batch", "aio-pika", "aiormq")
