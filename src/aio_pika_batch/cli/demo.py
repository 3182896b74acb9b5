"""Does it do what it says?

A stream of messages, most of them good, some bad, some flaky, a few hopeless, through a batch
consumer, on an embedded broker or on a real RabbitMQ; at the end the books are balanced::

    python -m aio_pika_batch.cli.demo
    python -m aio_pika_batch.cli.demo --url amqp://guest:guest@localhost/
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from enum import Enum

from aio_pika_batch import (
    AioPikaBatchError,
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    Message,
    MessageResult,
    Observer,
    Publication,
    Result,
    WorkerSession,
)
from aio_pika_batch.masking import mask_url
from aio_pika_batch.observer import BatchCut, DeadLettered, Origin, Requeued, Settled

MAX_REQUEUE_ATTEMPTS = 3
FLAKY_FAILURES = 2
"""How often a flaky message fails before it goes well; a hopeless one always fails."""


class Kind(Enum):
    """What a message of the demo will do, and its share of the stream."""

    GOOD = 0.80
    BAD = 0.08
    FLAKY = 0.09
    HOPELESS = 0.03


def body_of(kind: Kind, number: int) -> bytes:
    """A payload; a bad one is no JSON."""
    if kind is Kind.BAD:
        return b"{this is no JSON"
    return json.dumps({"number": number, "kind": kind.name}).encode()


class Orders(BatchConsumer):
    """Handles the stream."""

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Decide about each message by what is in it."""
        for message in messages:
            try:
                order = json.loads(message.body)
            except ValueError:
                yield MessageResult.NACK
                continue
            fails = order["kind"] == Kind.HOPELESS.name or (
                order["kind"] == Kind.FLAKY.name and message.retry_count < FLAKY_FAILURES
            )
            yield MessageResult.REQUEUE if fails else MessageResult.ACK


class Undertaker(Consumer):
    """Receives the dead letters, and removes what the demo has declared."""

    def __init__(self, settings: ConsumerSettings, *, expected: int) -> None:
        super().__init__(settings)
        self.reasons: Counter[str] = Counter()
        self.all_received = asyncio.Event()
        self._expected = expected
        self._session: WorkerSession | None = None
        if not expected:
            self.all_received.set()

    async def on_session(self, session: WorkerSession) -> None:
        """Keep the session, for cleaning up."""
        self._session = session

    async def process_message(self, message: Message) -> Result:
        """Count a dead letter by its reason."""
        self.reasons[str(message.headers.get("x-dead-letter-reason"))] += 1
        if self.reasons.total() >= self._expected:
            self.all_received.set()
        return MessageResult.ACK

    async def clean_up(self, exchange_name: str) -> None:
        """Delete the dead-letter exchange; the queues go with their last consumer."""
        if self._session is not None:
            native = await self._session.native()
            exchange = await native.channel.get_exchange(exchange_name)
            await exchange.delete()


class Scoreboard(Observer):
    """Prints what happens and keeps the books."""

    def __init__(self, *, quiet: bool) -> None:
        self.results: Counter[str] = Counter()
        self.triggers: Counter[str] = Counter()
        self.retries = 0
        self.dead: Counter[str] = Counter()
        self.all_settled = asyncio.Event()
        self.expected = 0
        self._quiet = quiet
        self._began = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line with the time."""
        if not self._quiet:
            print(f"{time.perf_counter() - self._began:7.3f} s  {text}")

    @property
    def finished(self) -> int:
        """How many messages have come to their end."""
        return self.results[MessageResult.ACK.name] + self.dead.total()

    def _check(self) -> None:
        if self.finished >= self.expected:
            self.all_settled.set()

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """A batch goes to the handler."""
        self.triggers[event.trigger.value] += 1
        self.say(
            f"batch {self.triggers.total():>3}  worker {origin.worker}"
            f"  {len(event.messages):>3} messages"
            f"  cut by {event.trigger.value} after {event.waited * 1000:.0f} ms"
        )

    def settled(self, origin: Origin, event: Settled) -> None:
        """The broker has been told."""
        words = []
        for (result, _), count in event.counts.items():
            name = "returned" if result is None else result.name
            self.results[name] += count
            words.append(f"{count} {name}")
        self.say(f"           worker {origin.worker}  settled: {', '.join(words) or 'nothing yet'}")
        self._check()

    def requeued(self, origin: Origin, event: Requeued) -> None:
        """A copy is confirmed."""
        self.retries += 1

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """A dead letter is confirmed."""
        self.dead[event.reason.value] += 1
        self.say(
            f"           worker {origin.worker}  dead letter: {event.reason.value}"
            f" after {event.message.retry_count} retries"
        )
        self._check()


def make_stream(count: int, seed: int) -> list[Kind]:
    """Kinds of messages in a random order, in the shares that :class:`Kind` names."""
    draw = random.Random(seed)
    kinds = list(Kind)
    return draw.choices(kinds, [kind.value for kind in kinds], k=count)


async def demo(options: argparse.Namespace) -> bool:
    """Run the stream through; returns whether the books are balanced."""
    stream = make_stream(options.messages, options.seed)
    kinds = Counter(stream)
    unique = f"aio-pika-batch.demo.{random.randrange(16**6):06x}"
    dead_letter_exchange = f"{unique}.dlx"
    board = Scoreboard(quiet=options.quiet)
    board.expected = len(stream)
    undertaker = Undertaker(
        ConsumerSettings(
            url=options.url,
            queue_name=f"{unique}.dead",
            exchange_name=dead_letter_exchange,
            exchange_type="fanout",
            queue_auto_delete=True,
            prefetch_count=100,
            # Where the demo's dead letters end is here.
            unhandled_exception_action=MessageResult.NACK,
        ),
        expected=kinds[Kind.BAD] + kinds[Kind.HOPELESS],
    )
    orders = Orders(
        BatchConsumerSettings(
            url=options.url,
            queue_name=f"{unique}.orders",
            queue_auto_delete=True,
            dead_letter_exchange=dead_letter_exchange,
            batch_size=options.batch_size,
            batch_timeout=0.25,
            num_workers=options.workers,
            max_requeue_attempts=MAX_REQUEUE_ATTEMPTS,
        ),
        observers=[board],
    )
    print(f"{len(stream)} messages through {options.workers} workers on {mask_url(options.url)}")
    async with undertaker:
        async with orders:
            await orders.publish_many(
                [
                    Publication(body_of(kind, number), routing_key=orders.settings.queue_name)
                    for number, kind in enumerate(stream)
                ]
            )
            async with asyncio.timeout(options.time_limit):
                await board.all_settled.wait()
                await undertaker.all_received.wait()
        await undertaker.clean_up(dead_letter_exchange)
    return balance(kinds, board, undertaker)


def balance(kinds: Counter[Kind], board: Scoreboard, undertaker: Undertaker) -> bool:
    """Print the books; returns whether they are balanced."""
    acked = board.results[MessageResult.ACK.name]
    retries = FLAKY_FAILURES * kinds[Kind.FLAKY] + MAX_REQUEUE_ATTEMPTS * kinds[Kind.HOPELESS]
    rows = [
        ("published", kinds.total(), acked + board.dead.total(), "acked + dead letters"),
        ("good and flaky", kinds[Kind.GOOD] + kinds[Kind.FLAKY], acked, "acked"),
        (
            "bad",
            kinds[Kind.BAD],
            undertaker.reasons["rejected"],
            "in the dead-letter queue: rejected",
        ),
        ("hopeless", kinds[Kind.HOPELESS], undertaker.reasons["exhausted"], "the same: exhausted"),
        ("retries due", retries, board.retries, "retries made"),
    ]
    cuts = ", ".join(f"{count} by {trigger}" for trigger, count in board.triggers.items())
    print(f"\n{board.triggers.total()} batches: {cuts}")
    for name, expected, found, where in rows:
        print(f"  {name:<15}{expected:>6}  {'=' if expected == found else '≠'}{found:>6}  {where}")
    is_balanced = all(expected == found for _, expected, found, _ in rows)
    print("It adds up." if is_balanced else "It does NOT add up.")
    return is_balanced


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m aio_pika_batch.cli.demo",
        description="Run good, bad, flaky and hopeless messages through a batch consumer.",
    )
    parser.add_argument("--url", default="memory://demo", help="broker (default: %(default)s)")
    parser.add_argument("--messages", type=int, default=400, help="how many (default: 400)")
    parser.add_argument("--batch-size", type=int, default=50, help="default: 50")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--seed", type=int, default=1, help="which stream (default: 1)")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds (default: 60)")
    parser.add_argument("--quiet", action="store_true", help="print the summary only")
    options = parser.parse_args(arguments)
    # The undertaker's own queue has no dead-letter exchange, and needs no warning about it.
    logging.getLogger("aio_pika_batch").setLevel(logging.ERROR)
    try:
        return 0 if asyncio.run(demo(options)) else 1
    except AioPikaBatchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except TimeoutError:
        print(f"not done after {options.time_limit} s", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
