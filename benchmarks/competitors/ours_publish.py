"""Our `publish_many`, a hundred at a time, all confirmed; its consumer is idle."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Message,
    MessageResult,
    Outcome,
    Publication,
)
from benchmarks.protocol import Job, Meter, compete

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


class Idle(BatchConsumer):
    """Publishing needs a running consumer; this one's queue is empty."""

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        """Acknowledge what never comes."""
        for _ in messages:
            yield MessageResult.ACK


async def publish(job: Job, meter: Meter) -> None:
    """Publish until everything is measured."""
    settings = BatchConsumerSettings(url=job.url, queue_name=f"{job.queue}.idle")
    async with Idle(settings) as publisher:
        while True:
            outcomes = await publisher.publish_many(
                [
                    Publication(
                        job.payload,
                        routing_key=job.queue,
                        headers={"tenant": number, "trace": "4bf92f3577b34da6a3ce929d0e0e4736"},
                    )
                    for number in range(job.batch)
                ]
            )
            if any(outcome is not Outcome.CONFIRMED for outcome in outcomes):
                raise RuntimeError(f"not confirmed: {outcomes}")
            if meter.count(len(outcomes)):
                return


def run(job: Job, meter: Meter) -> None:
    """Run on asyncio's own loop."""
    asyncio.run(publish(job, meter))


if __name__ == "__main__":
    compete(run, "aio-pika-batch", "aio-pika", "aiormq")
