"""Our `BatchConsumer`: an async generator that yields one result for each message.

Tasks: ``ack``; ``mixed``, 1 % NACK and 10 % REQUEUE; ``reject``, 10 % NACK; ``requeue``, all
REQUEUE; ``headers``, all acked after each message's headers were read; ``hold``, all acked by a
handler so slow that as much waits as is allowed to; ``keys``, all acked, with a `batch_key`.
Options: ``observer``, one that implements every method; ``uvloop``; ``defaults``, without a batch
size and a prefetch count; ``dead``, with a dead-letter queue; and any other is a setting.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult, Observer
from benchmarks.protocol import Job, Meter, compete

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aio_pika_batch.observer import Origin

MANY = 1_000_000


class Watching(Observer):
    """Implements whatever may be observed, by counting."""

    def __init__(self) -> None:
        self.seen = 0

    def _count(self, origin: Origin, event: Any) -> None:  # noqa: ANN401  -- each method has its own
        del origin, event
        self.seen += 1


for name in [each for each in vars(Observer) if not each.startswith("_")]:
    setattr(Watching, name, Watching._count)  # noqa: SLF001  -- it is right here


def results(job: Job) -> list[MessageResult]:
    """What is yielded for the messages of one batch."""
    pattern = [MessageResult.ACK] * job.batch
    match job.task:
        case "mixed":
            pattern[1::10] = [MessageResult.REQUEUE] * len(pattern[1::10])
            pattern[0] = MessageResult.NACK
        case "reject":
            pattern[::10] = [MessageResult.NACK] * len(pattern[::10])
        case "requeue":
            pattern = [MessageResult.REQUEUE] * job.batch
    return pattern


class Counting(BatchConsumer):
    """Handles nothing, but looks at each body as an application would."""

    def prepare(self, job: Job, meter: Meter) -> asyncio.Event:
        """Begin to measure; the event tells that all is measured."""
        self.meter = meter
        self.pattern = results(job)
        self.size = 0
        self.done = asyncio.Event()
        return self.done

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        """Yield what the task says."""
        for message, result in zip(messages, self.pattern, strict=False):
            self.size += len(message.body)
            yield result
        if self.meter.count(len(messages)):
            self.done.set()


class Reading(Counting):
    """Looks at each message's headers too, which are decoded then."""

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        """Acknowledge."""
        for message in messages:
            self.size += len(message.body) + len(message.headers)
            yield MessageResult.ACK
        if self.meter.count(len(messages)):
            self.done.set()


class Holding(Counting):
    """Takes its time."""

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        """Acknowledge, later."""
        await asyncio.sleep(0.3)
        async for result in super().process_messages(messages):
            yield result


class Refusals(logging.Handler):
    """Keeps the warnings that another wire is used than the one to be measured."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(record.getMessage())


class Keyed(Counting):
    """Has a key for each message; it is the same for all, so that batches are full."""

    def batch_key(self, message: Message) -> int:
        """Return the length of the body."""
        return len(message.body)


KINDS = {"headers": Reading, "hold": Holding, "keys": Keyed}


async def consume(job: Job, meter: Meter, watched_by: Sequence[Observer] = ()) -> None:
    """Consume until everything is measured."""
    options = {key: value for key, value in job.options.items() if key != "uvloop"}
    if not options.pop("defaults", False):
        options |= {"prefetch_count": job.prefetch, "batch_size": job.batch}
    if options.pop("dead", False):
        options["dead_letter_queue"] = f"{job.queue}.idle"
    watching = [Watching()] if options.pop("observer", None) else []
    settings = BatchConsumerSettings(
        url=job.url,
        queue_name=job.queue,
        max_requeue_attempts=MANY,
        # At once, as the others do it by hand.
        requeue_delay=0,
        **options,
    )
    consumer = KINDS.get(job.task, Counting)(settings, observers=[*watching, *watched_by])
    done = consumer.prepare(job, meter)
    refused = Refusals()
    logging.getLogger("aio_pika_batch.connection").addHandler(refused)
    async with consumer:
        await done.wait()
    if refused.lines:
        raise RuntimeError(refused.lines[0])
    if watching and not watching[0].seen:
        raise RuntimeError("nothing was observed")


def run(job: Job, meter: Meter) -> None:
    """Run on asyncio's own loop, or on uvloop."""
    if job.options.get("uvloop"):
        import uvloop

        uvloop.run(consume(job, meter))
    else:
        asyncio.run(consume(job, meter))


if __name__ == "__main__":
    compete(run, "aio-pika-batch", "aio-pika", "aiormq")
