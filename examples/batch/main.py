"""Batches, handled concurrently, with a result for each message.

Pictures come in and thumbnails are made, a batch at a time. Most succeed, some aren't valid JSON,
some fail once, and one always fails. Try it::

    python examples/batch/main.py
    python examples/batch/main.py --url amqp://guest:guest@localhost/
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    Message,
    MessageDecodeError,
    MessageResult,
    Nack,
    Observer,
    Publication,
    Requeue,
    Result,
    WorkerSession,
)
from aio_pika_batch.observer import DeadLettered, Origin, Requeued, Settled

PICTURES = [
    b"{this is no JSON" if number % 10 == 0 else json.dumps({"number": number}).encode()
    for number in range(1, 41)
]
FAILS_ONCE = {7, 17, 27}
FAILS_ALWAYS = {33}


class Thumbnails(BatchConsumer):
    """Handles all pictures of a batch concurrently, and yields a result for each."""

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Yield one result per message, in their order."""
        results = await asyncio.gather(*(self.make_thumbnail(each) for each in messages))
        names = Counter(
            result.name if isinstance(result, MessageResult) else type(result).__name__.upper()
            for result in results
        )
        print(f"batch of {len(messages):>2}: {dict(names)}")
        for result in results:
            yield result

    async def make_thumbnail(self, message: Message) -> Result:
        """Decide about one picture."""
        try:
            number = message.json()["number"]
        except MessageDecodeError:
            return Nack(reason="no JSON")  # to the dead letters, at once
        await asyncio.sleep(0.02)  # stands for the work
        if number in FAILS_ALWAYS or (number in FAILS_ONCE and message.retry_count == 0):
            return Requeue(reason="out of colours")  # again later, max_requeue_attempts times
        return MessageResult.ACK

    async def on_session(self, session: WorkerSession) -> None:
        """Fill the queue with samples. A real consumer leaves that to others."""
        if session.epoch == 1:
            await self.publish_many(
                [Publication(body, routing_key=session.queue_name) for body in PICTURES]
            )


class Books(Observer):
    """Counts finished messages, and notices when all are done."""

    def __init__(self) -> None:
        self.acked = self.dead = self.requeues = 0
        self.consumer: Thumbnails | None = None

    def settled(self, origin: Origin, event: Settled) -> None:
        """Count settled messages."""
        acked = sum(
            count for (result, _), count in event.counts.items() if result is MessageResult.ACK
        )
        self.acked += acked
        print(f"  {acked} acknowledged by worker {origin.worker}")
        self._check()

    def requeued(self, origin: Origin, event: Requeued) -> None:
        """A copy is at the back of the queue."""
        self.requeues += 1
        print(f"  retry {event.retry_count} by worker {origin.worker}: {event.message.body!r}")

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """Count a dead letter."""
        self.dead += 1
        print(f"  {event.reason.value} by worker {origin.worker}: {event.message.body!r}")
        self._check()

    def _check(self) -> None:
        if self.consumer and self.acked + self.dead == len(PICTURES):
            self.consumer.request_stop()  # a real consumer goes on until SIGTERM or Ctrl-C


class DeadLetters(Consumer):
    """Prints dead letters, and why they failed."""

    async def on_start(self) -> None:
        """Prepare."""
        self.seen: asyncio.Queue[str] = asyncio.Queue()

    async def on_session(self, session: WorkerSession) -> None:
        """Keep the session, for cleaning up."""
        self._session = session

    async def process_message(self, message: Message) -> Result:
        """Print one."""
        reason = message.headers["x-dead-letter-reason"]
        detail = message.headers["x-dead-letter-detail"]
        retries = message.headers.get("x-retry-count", 0)  # of the queue that it comes from
        await self.seen.put(f"{reason!s} after {retries!s} retries: {detail!s}")
        return MessageResult.ACK

    async def clean_up(self) -> None:
        """Delete the exchange; the queues go with their last consumer."""
        native = await self._session.native()
        exchange = await native.channel.get_exchange(self.settings.exchange_name)
        await exchange.delete()


async def main(url: str) -> None:
    """Run until everything is settled, or until Ctrl-C."""
    name = f"example.batch.{secrets.token_hex(4)}"
    books = Books()
    dead_letters = DeadLetters(
        ConsumerSettings(
            url=url,
            queue_name=f"{name}.dead",
            queue_auto_delete=True,
            exchange_name=f"{name}.dlx",
            exchange_type="fanout",
        )
    )
    thumbnails = books.consumer = Thumbnails(
        BatchConsumerSettings(
            url=url,
            queue_name=name,
            queue_auto_delete=True,  # so that nothing is left behind on a real broker
            dead_letter_exchange=f"{name}.dlx",
            batch_size=16,
            batch_timeout=0.2,
            concurrency=2,  # batches at once
        ),
        observers=[books],
    )
    async with dead_letters:
        await thumbnails.run()
        for _ in range(books.dead):
            print("dead letter:", await dead_letters.seen.get())
        await dead_letters.clean_up()
    left = len(PICTURES) - books.acked - books.dead
    print(
        f"{len(PICTURES)} pictures = {books.acked} thumbnails + {books.dead} dead letters"
        f" + {left} left; {books.requeues} requeues"
    )


if __name__ == "__main__":
    # No dead-letter exchange is fine here, and no reason to warn: samples may be discarded.
    logging.getLogger("aio_pika_batch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="memory://", help="broker (default: one in memory)")
    asyncio.run(main(parser.parse_args().url))
