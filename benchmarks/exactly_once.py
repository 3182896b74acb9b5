"""Measures the cost of an inbox and a relay: ``python benchmarks/exactly_once.py [--rounds N]``.

One process consumes messages from a private RabbitMQ and writes them into a private PostgreSQL, in
turn with a plain transaction and with an inbox in it. It reads its own processor clock: the cost is
what a round with the inbox takes more than the round without, and the median over all rounds is
printed. A relay is measured by itself, from a full outbox to the queue.

With an inbox a handler waits for the database longer. The processor is idle meanwhile, which has a
price of its own: what it does next takes longer. So a third handler shows that price: it has no
inbox, but waits as long as a claim took.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: packages are imported as anywhere else

import asyncpg  # noqa: E402  -- after the path is right

from aio_pika_batch import (  # noqa: E402
    BatchConsumer,
    BatchConsumerSettings,
    Message,
    MessageResult,
    Publication,
    Result,
)
from aio_pika_batch.inbox import Inbox  # noqa: E402
from aio_pika_batch.outbox import Outbox, OutboxRelay, OutboxRelaySettings  # noqa: E402
from aio_pika_batch.transport import Endpoint, Queue, Topology, open_transport  # noqa: E402
from benchmarks import broker  # noqa: E402
from tests.support.postgres import postgres  # noqa: E402

QUEUE = "bench.exactly_once"
BATCHES = (100, 1000)
ADD = f"""INSERT INTO aio_pika_batch_outbox (message_id, exchange, routing_key, body)
SELECT md5(number::text), '', '{QUEUE}', repeat('x', 200)::bytea
FROM generate_series(1, $1) AS number"""  # noqa: S608  -- a constant
INSERT = "INSERT INTO effects SELECT unnest($1::integer[])"


class Variant(NamedTuple):
    """What a handler does before it writes: it claims its messages, or sleeps for some seconds."""

    inbox: Inbox | None = None
    wait: float = 0.0


class Writer(BatchConsumer):
    """Writes each batch in a transaction."""

    pool: Any
    variant: Variant
    expected: int
    warmup: int

    def prepare(self, pool: Any, variant: Variant, expected: int, warmup: int) -> asyncio.Event:  # noqa: ANN401  -- a driver's own
        """Begin to measure after the warm-up; the event is set when all messages are handled."""
        self.pool, self.variant, self.expected, self.warmup = pool, variant, expected, warmup
        self.handled, self.began, self.took, self.opening = 0, 0.0, 0.0, 0.0
        self.done = asyncio.Event()
        return self.done

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Write, and acknowledge."""
        if self.handled >= self.warmup and not self.began:
            self.began, self.measured_from = time.process_time(), self.handled
        results: Sequence[Result] = [MessageResult.ACK] * len(messages)
        async with self.pool.acquire() as connection:
            asked = time.perf_counter()
            if self.variant.inbox is None:
                async with connection.transaction():
                    if self.variant.wait:
                        await asyncio.sleep(self.variant.wait)
                    self.opening += time.perf_counter() - asked
                    await connection.execute(INSERT, [int(each.body) for each in messages])
            else:
                async with self.variant.inbox.transaction(connection, messages) as batch:
                    self.opening += time.perf_counter() - asked
                    await connection.execute(INSERT, [int(each.body) for each in batch.fresh])
                results = batch.results
        for result in results:
            yield result
        self.handled += len(messages)
        if self.handled >= self.expected:
            self.took = time.process_time() - self.began
            self.done.set()


async def publish(url: str, count: int) -> None:
    """Put messages with ids into the queue."""
    async with open_transport(Endpoint(url=url)).publisher() as publisher:
        await publisher.publish(
            [
                Publication(b"%d" % number, routing_key=QUEUE, message_id=str(uuid.uuid4()))
                for number in range(count)
            ]
        )


async def consume(
    url: str,
    pool: Any,  # noqa: ANN401  -- a driver's own
    batch: int,
    count: int,
    variant: Variant,
) -> tuple[float, float]:
    """Return µs of CPU per message, and seconds until a batch can be written."""
    warmup = 4 * batch
    await publish(url, count + warmup)
    writer = Writer(BatchConsumerSettings(url=url, queue_name=QUEUE, batch_size=batch))
    done = writer.prepare(pool, variant, count + warmup, warmup)
    async with writer:
        await done.wait()
    took = writer.took / (writer.handled - writer.measured_from) * 1e6
    return took, writer.opening / writer.handled * batch


async def relay(url: str, dsn: str, count: int) -> float:
    """Return µs of CPU per message of a relay that is already running."""
    outbox = Outbox()
    connection = await asyncpg.connect(dsn)
    await outbox.create(connection)
    settings = OutboxRelaySettings(url=url, batch_size=1000)
    async with OutboxRelay(outbox, lambda: asyncpg.connect(dsn), settings):
        began = time.process_time()
        # By the server, so that adding them takes no time of this process.
        await connection.execute(ADD, count)
        # Rarely, because it takes time of this process.
        while await outbox.count(connection):  # noqa: ASYNC110  -- of another connection
            await asyncio.sleep(1)
        took = time.process_time() - began
    await connection.close()
    return took / count * 1e6


async def measure(url: str, dsn: str, rounds: int, count: int) -> None:
    """Print what each costs."""
    await open_transport(Endpoint(url=url)).declare(Topology(queues=(Queue(QUEUE, durable=True),)))
    async with asyncpg.create_pool(dsn, min_size=1) as pool:
        await pool.execute("CREATE TABLE effects (number integer)")
        inbox = Inbox("bench")
        async with pool.acquire() as connection:
            await inbox.create(connection)
        print("| batch | plain, µs | waits as long | with an inbox |")
        print("| ---: | ---: | ---: | ---: |")
        for batch in BATCHES:
            # The time that a claim takes, from a round that isn't counted.
            _, claiming = await consume(url, pool, batch, count, Variant(inbox))
            _, opening = await consume(url, pool, batch, count, Variant())
            waiting = Variant(wait=claiming - opening)
            variants = {"plain": Variant(), "waiting": waiting, "inbox": Variant(inbox)}
            rounds_of: dict[str, list[float]] = {name: [] for name in variants}
            for number in range(rounds):
                for name in list(variants)[:: 1 if number % 2 else -1]:
                    took, _ = await consume(url, pool, batch, count, variants[name])
                    rounds_of[name].append(took)
            plain = rounds_of["plain"]
            more = [
                statistics.median(map(sub, rounds_of[name], plain)) for name in ("waiting", "inbox")
            ]
            print(f"| {batch} | {statistics.median(plain):.2f} | {more[0]:+.2f} | {more[1]:+.2f} |")
        size = await pool.fetchrow(
            "SELECT pg_total_relation_size('aio_pika_batch_inbox') AS size, count(*) AS rows"
            " FROM aio_pika_batch_inbox"
        )
        print(f"{size['size'] / size['rows']:.0f} bytes for a row of the inbox, with its indexes")
        await pool.execute("DROP TABLE effects")
    relays = [await relay(url, dsn, count) for _ in range(rounds)]
    print(f"{statistics.median(relays):.2f} µs for a message of a relay, at 1,000 at a time")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=20_000)
    asked = parser.parse_args()
    logging.getLogger("aio_pika_batch").setLevel(logging.CRITICAL)
    with broker.running() as node, postgres() as dsn:
        asyncio.run(measure(node.url, dsn, asked.rounds, asked.messages))


if __name__ == "__main__":
    main()
