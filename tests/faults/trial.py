"""A trial: a consumer under load, the fault that a test causes, and the figures.

At the end, every message that the broker has confirmed must be acked or dead-lettered. The figures
show how many messages were duplicated, and how long none was handled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import aio_pika

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Message,
    MessageResult,
    Observer,
)
from aio_pika_batch.core.message import ORIGINAL_ROUTING_KEY
from aio_pika_batch.core.topology import DELAYS_SINCE, parse_version
from aio_pika_batch.observer import DeadLettered, Lost, Origin
from tests.faults.figures import Figures
from tests.faults.load import Load
from tests.integration.helpers import ready, take_all, until

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

_log = logging.getLogger("tests.faults")

KINDS = ("good",) * 15 + ("flaky",) * 2 + ("impatient", "bad", "doomed")
"""What messages do, by their number: one in four is not simply ACKed."""

ATTEMPTS = 3
"""Retries of a message, the last of which fails for good."""

PACE = 0.05
"""Seconds that a handler takes for a batch, so that some messages are always unsettled."""

SETTINGS = {
    "batch_size": 50,
    "batch_timeout": 0.05,
    "num_workers": 2,
    "heartbeat": 2,
    "connect_timeout": 3.0,
    "publish_timeout": 3.0,
    "reconnect_delay_max": 2.0,
    "max_requeue_attempts": ATTEMPTS,
    # Retries are copies at once. If the consumer held them, a stop would return them uncounted, and
    # a retry that the handler wanted would look like a duplicate.
    "requeue_delay": 0,
}
"""Shorter times than the defaults, so that tests wait less."""


def amqp10_settings(version: str) -> dict[str, Any]:
    """Return the settings of a consumer that uses AMQP 1.0 on a version of RabbitMQ.

    Faults on purpose must not make suspects of healthy messages: suspects are copied, so that the
    broker counts from 0 again.
    """
    found = parse_version("RabbitMQ", version)
    assert found is not None
    # Before 4.3 AMQP 1.0 needs a queue without a delivery limit.
    arguments = {} if found >= DELAYS_SINCE else {"x-delivery-limit": -1}
    return {
        "wire": "amqp10",
        "queue_type": "quorum",
        "queue_arguments": arguments,
        "crash_suspect_after": 10_000,
        "crash_limit": 20_000,
    }


class HandlingRecord(Observer):
    """Records what was handled, when and how often.

    Attributes:
        handled: How often each message was handled, by number and retry count.
        done: The numbers of ACKed messages.
        dead: The numbers of messages that the library reported as dead-lettered.
        failed: The numbers of messages that failed for good.
        losses: When and why sessions ended, or could not start.
        copies: How many of the handled messages were copies of others.
    """

    def __init__(self) -> None:
        self.handled: Counter[tuple[int, int]] = Counter()
        self.done: set[int] = set()
        self.dead: set[int] = set()
        self.failed: set[int] = set()
        self.losses: list[tuple[float, str]] = []
        self.copies = 0
        self._at_once: Counter[tuple[int, int]] = Counter()
        self._batches: list[tuple[float, str]] = []

    def lost(self, origin: Origin, event: Lost) -> None:
        """Record why a session ended, or could not start."""
        self.losses.append((time.monotonic(), str(event.error)))

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """Record a dead letter."""
        self.dead.add(_number(event.message))

    def begin(self, messages: Sequence[Message]) -> None:
        """Record the start of a batch."""
        self._batches.append((time.monotonic(), messages[0].consumer_tag))

    def answer(self, message: Message) -> MessageResult:
        """Return the result of a message, and record it."""
        number = _number(message)
        attempt = number, message.retry_count
        self.handled[attempt] += 1
        self.copies += ORIGINAL_ROUTING_KEY in message.headers
        match KINDS[number % len(KINDS)]:
            case "bad":
                self.failed.add(number)
                return MessageResult.NACK
            case "doomed":
                if message.retry_count == ATTEMPTS:
                    self.failed.add(number)
                return MessageResult.REQUEUE
            case "flaky" if message.retry_count < 2:
                return MessageResult.REQUEUE
            case "impatient" if not self._at_once[attempt]:
                self._at_once[attempt] += 1
                return MessageResult.REQUEUE_IMMEDIATE
            case _:
                self.done.add(number)
                return MessageResult.ACK

    def since(self, mark: float, *, only_new: bool) -> float | None:
        """Return the seconds from *mark* to the first batch after it, or None if there is none.

        Args:
            only_new: Whether only sessions count that handled nothing before: older ones may still
                have buffered messages.
        """
        known = {tag for at, tag in self._batches if only_new and at <= mark}
        after = (at for at, tag in self._batches if at > mark and tag not in known)
        return next((at - mark for at in after), None)

    def longest_pause(self, mark: float) -> float:
        """Return the longest time without a batch since *mark*, in seconds."""
        times = [mark, *(at for at, _ in self._batches if at > mark), time.monotonic()]
        return max(after - before for before, after in pairwise(times))

    @property
    def repeated(self) -> int:
        """How often a message was handled although nothing required it."""
        return sum(
            max(0, count - 1 - self._at_once[attempt]) for attempt, count in self.handled.items()
        )


def _number(message: Message) -> int:
    return int(message.message_id or "")


class LoadedConsumer(BatchConsumer):
    """Yields the results of its record."""

    def __init__(self, settings: BatchConsumerSettings, record: HandlingRecord) -> None:
        super().__init__(settings, observers=[record])
        self._record = record
        self._lingers = 0.0

    def linger(self, seconds: float) -> None:
        """Take this long for the next batch."""
        self._lingers = seconds

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        """Yield the results in order."""
        self._record.begin(messages)
        pace, self._lingers = self._lingers or PACE, 0.0
        await asyncio.sleep(pace)
        for message in messages:
            yield self._record.answer(message)


class Trial:
    """A running consumer under load.

    Attributes:
        consumer: The consumer.
        load: The publisher to its queue.
        record: What it has handled.
        remark: A remark that readers of the figures need, if any.
        figures: The figures; they exist after the trial.
        dead_copies: How many of the dead letters are copies.
    """

    def __init__(
        self, consumer: LoadedConsumer, load: Load, record: HandlingRecord, url: str
    ) -> None:
        self.consumer = consumer
        self.load = load
        self.record = record
        self.remark = ""
        self.figures: Figures
        self.recoveries: list[float] = []
        self.dead_copies = 0
        self._mark = time.monotonic()
        self._url = url

    async def flows(self, more: int = 200) -> None:
        """Wait until this many more messages are handled."""
        goal = self.record.handled.total() + more
        await until(lambda: self.record.handled.total() >= goal, what=self.consumer.status)

    def ends(self) -> None:
        """Mark the end of the fault, from which the recovery is measured."""
        self._mark = time.monotonic()

    async def breaks(self) -> None:
        """Wait until a session is lost, and measure the recovery from that moment.

        The fault must not begin before ``ends`` or this method is called.
        """
        began = self._mark
        await until(
            lambda: any(at > began for at, _ in self.record.losses), what=self.consumer.status
        )
        self._mark = next(at for at, _ in self.record.losses if at > began)

    async def recovers(self, *, only_new: bool = True) -> float:
        """Wait until a batch is handled and all workers are healthy; return the recovery time.

        Args:
            only_new: Whether the fault has ended the consumer's sessions.
        """
        await until(
            lambda: self.record.since(self._mark, only_new=only_new) is not None,
            what=self.consumer.status,
        )
        seconds = self.record.since(self._mark, only_new=only_new) or 0.0
        self.recoveries.append(seconds)
        await until(lambda: self.consumer.is_healthy, what=self.consumer.status)
        return seconds

    async def suffers(self) -> None:
        """Wait until the consumer has noticed the fault and is unhealthy."""
        await until(lambda: not self.consumer.is_healthy, what=self.consumer.status)

    async def carries_on(self) -> float:
        """Wait until messages flow and all workers are healthy; return the longest pause.

        This is for faults that don't end all of the consumer's sessions. The pause is measured
        since ``ends``, and publishing pauses during the fault, too.
        """
        await self.flows()
        await until(lambda: self.consumer.is_healthy, what=self.consumer.status)
        seconds = self.record.longest_pause(self._mark)
        self.recoveries.append(seconds)
        return seconds

    @property
    def unfinished(self) -> set[int]:
        """Confirmed messages that are neither acked nor known to be dead-lettered."""
        left = self.load.confirmed - self.record.done - self.record.dead
        # If a connection ends just after the ack of the original, the library can't know that the
        # broker has received it, and reports no dead letter.
        return left - self.record.failed if self.record.losses else left

    async def rests(self) -> None:
        """Pause the load, and wait until all published messages are finished."""
        self.load.pause()
        await self.load.is_pausing.wait()
        await self.idles()

    async def idles(self) -> None:
        """Wait until every message is acked or dead-lettered, and nothing is left in the queue."""
        # A copy whose connection was lost is sent again after 30 s at first, then after up to 120.
        await until(
            lambda: not self.unfinished,
            within=360,
            what=lambda: (sorted(self.unfinished)[:20], self.consumer.status()),
        )
        await until(lambda: self.consumer.is_healthy, what=self.consumer.status)
        queue = self.consumer.status().queue

        async def nothing_is_left() -> bool:
            seen = self.record.handled.total()
            if await ready(self._url, queue) or any(
                each.in_hand or each.held or each.buffered
                for each in self.consumer.status().workers
            ):
                return False
            return seen == self.record.handled.total()

        await until(nothing_is_left, within=360, what=self.consumer.status)


@asynccontextmanager
async def under_load(
    fault: str,
    did: str,
    *,
    urls: Sequence[str],
    url: str | None = None,
    broker: str,
    name: str,
    keep: Callable[[Figures], object],
    minimum: int = 1000,
    rate: int = 400,
    **settings: Any,
) -> AsyncIterator[Trial]:
    """Run a consumer under load, and check at the end that nothing is lost.

    Args:
        fault: The fault, as in :class:`Figures`, like *did*.
        urls: The URLs for publishing and for looking at queues, used in turn.
        url: The consumer's URL; by default the first of *urls*.
        broker: The broker's version.
        name: The queue's name; its dead letters are in ``<name>.dead``. Over AMQP 1.0, it is a
            quorum queue, and nothing must be copied while it is used.
        keep: Is called with the figures, whatever they are.
        minimum: The minimum number of messages; more if the body takes longer.
        rate: Messages per second.
        settings: Other settings of the consumer than ``SETTINGS``.
    """
    given: dict[str, Any] = {
        "url": url or urls[0],
        "queue_name": name,
        "dead_letter_queue": f"{name}.dead",
        "wire": "fast",
        **SETTINGS,
    }
    is_amqp10 = settings.get("wire") == "amqp10"
    if is_amqp10:
        given |= amqp10_settings(broker)
    given |= settings
    record = HandlingRecord()
    consumer = LoadedConsumer(BatchConsumerSettings(**given), record)
    async with consumer, Load(urls, name, rate=rate, minimum=minimum) as load:
        trial = Trial(consumer, load, record, urls[0])
        await trial.flows()
        yield trial
        await load.finish()
        try:
            await trial.idles()
        finally:
            await consumer.stop()
            trial.figures = await _count(trial, fault, did, urls[0], broker, given["wire"])
            keep(trial.figures)
    _log.info("%s", trial.figures)
    if is_amqp10 and not consumer.status().fallbacks:
        assert 0 == record.copies + trial.dead_copies
    assert 0 == trial.figures.lost
    assert len(load.confirmed) == trial.figures.handled


async def _count(trial: Trial, fault: str, did: str, url: str, broker: str, wire: str) -> Figures:
    """Count what is in the queues, and delete them."""
    queue = trial.consumer.status().queue
    if wire == "amqp10":
        await _dead_letters_arrive(trial, url)
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        left = Counter(_id(each) for each in await take_all(channel, queue))
        letters = await take_all(channel, f"{queue}.dead")
        dead = Counter(map(_id, letters))
        trial.dead_copies = sum(ORIGINAL_ROUTING_KEY in each.headers for each in letters)
        for each in (queue, f"{queue}.dead"):
            await channel.queue_delete(each)
    confirmed, done = trial.load.confirmed, trial.record.done
    return Figures(
        fault=fault,
        did=did,
        wire=wire,
        broker=broker,
        messages=len(confirmed),
        handled=len(confirmed & (done | dead.keys())),
        duplicated=trial.record.repeated + dead.total() - len(dead),
        lost=len(confirmed - done - dead.keys() - left.keys()),
        recovery=max(trial.recoveries, default=None),
        remark=trial.remark,
    )


async def _dead_letters_arrive(trial: Trial, url: str) -> None:
    """Wait until the dead-letter queue has what the queue itself has dead-lettered.

    Nothing confirms that. A queue tries again after three minutes if it was not possible.
    """
    queue = trial.consumer.status().queue
    with suppress(AssertionError):  # what is missing then is counted
        await until(
            partial(_has, url, f"{queue}.dead", len(trial.record.dead & trial.load.confirmed)),
            within=240,
        )


async def _has(url: str, queue: str, count: int) -> bool:
    await asyncio.sleep(0.2)
    return await ready(url, queue) >= count


def _id(message: AbstractIncomingMessage) -> int:
    return int(message.message_id or "")
