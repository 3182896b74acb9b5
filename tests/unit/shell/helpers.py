"""Helpers for tests of the shell: settings, handlers, recording consumers, and a broker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    Message,
    MessageResult,
    Observer,
)
from aio_pika_batch.testing.broker import BatchBroker

QUEUE = "jobs"

ACK, NACK = MessageResult.ACK, MessageResult.NACK
REQUEUE, REQUEUE_IMMEDIATE = MessageResult.REQUEUE, MessageResult.REQUEUE_IMMEDIATE


DEFAULTS = {
    "url": "memory://",
    "queue_name": QUEUE,
    "requeue_delay": 0,
    "without_dead_letter": "reject",
}


def settings(**given: Any) -> BatchConsumerSettings:
    """Return settings that do not depend on the environment.

    Retries follow at once, and what can't be dead-lettered is rejected, unless a test says
    otherwise: most of them are about other things.
    """
    return BatchConsumerSettings(_env_file=None, **DEFAULTS | given)


def bodies(messages: Sequence[Message]) -> list[bytes]:
    """Return the bodies of messages."""
    return [message.body for message in messages]


def numbered(count: int, first: int = 0) -> list[bytes]:
    """Return bodies b"0", b"1", …."""
    return [b"%d" % number for number in range(first, first + count)]


async def ack(messages: Sequence[Message]) -> AsyncIterator[Any]:
    """ACK every message."""
    for _ in messages:
        yield ACK


def answering(*yields: object, error: BaseException | None = None) -> Callable[..., Any]:
    """Return a handler that yields these results, and then raises."""

    async def answer(messages: Sequence[Message]) -> AsyncIterator[Any]:
        for each in yields:
            yield each
        if error is not None:
            raise error

    return answer


def first_then(*handlers: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler that uses one handler for each batch, in order; the last one stays."""
    left = list(handlers)

    def answer(messages: Sequence[Message]) -> Any:
        return (left.pop(0) if len(left) > 1 else left[0])(messages)

    return answer


def taking(seconds: float, then: Callable[..., Any] = ack) -> Callable[..., Any]:
    """Return a handler that sleeps first."""

    async def answer(messages: Sequence[Message]) -> AsyncIterator[Any]:
        await asyncio.sleep(seconds)
        async for each in then(messages):
            yield each

    return answer


class RecordingConsumer(BatchConsumer):
    """Runs the given handler, and records what it gets.

    Attributes:
        batches: The bodies of each batch.
        times: When each batch came.
        messages: All messages.
    """

    def __init__(
        self,
        answer: Callable[..., Any] = ack,
        *,
        transport: Any,
        observers: Sequence[Observer] = (),
        **given: Any,
    ) -> None:
        super().__init__(settings(**given), transport=transport, observers=observers)
        self.answer = answer
        self.batches: list[list[bytes]] = []
        self.times: list[float] = []
        self.messages: list[Message] = []

    def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Any]:
        self.batches.append(bodies(messages))
        self.times.append(asyncio.get_running_loop().time())
        self.messages.extend(messages)
        return self.answer(messages)

    @property
    def handled(self) -> list[bytes]:
        """Every body that was handed over, in order."""
        return [body for batch in self.batches for body in batch]


class SingleConsumer(Consumer):
    """A `Consumer` that runs the given handler."""

    def __init__(self, answer: Callable[[Message], Any], *, transport: Any, **given: Any) -> None:
        super().__init__(ConsumerSettings(_env_file=None, **DEFAULTS | given), transport=transport)
        self.answer = answer

    async def process_message(self, message: Message) -> Any:
        return await self.answer(message)


class EventRecorder(Observer):
    """Records every event, as (origin, event)."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def _note(self, origin: Any, event: Any) -> None:
        self.seen.append((origin, event))

    batch_cut = batch_handled = settled = requeued = dead_lettered = connected = _note
    discarded = _note
    lost = stale_results = handler_error = settle_failed = _note
    worker_started = worker_stopped = received = _note
    breaker_opened = breaker_probing = breaker_closed = duplicates_dropped = _note

    def of(self, kind: type) -> list[Any]:
        """Return the events of one type."""
        return [event for _, event in self.seen if type(event) is kind]


class QueueBroker(BatchBroker):
    """A BatchBroker whose methods use one queue by default."""

    def declare(self, queue: str = QUEUE, **arguments: Any) -> None:
        """Declare a durable queue."""
        super().declare(queue, **arguments)

    def put(self, *some: bytes, queue: str = QUEUE, **how: Any) -> None:
        """Put messages into the queue."""
        for body in some:
            assert self.broker.put(queue, body, **how)

    def waiting(self, queue: str = QUEUE) -> list[bytes]:
        """Return the bodies that wait in a queue."""
        return [message.body for message in self.broker.ready(queue)]

    def unsettled(self, queue: str = QUEUE) -> list[bytes]:
        """Return the bodies that are delivered and not settled."""
        return [message.body for message in self.broker.unacked(queue)]

    def times(self, *kinds: Any) -> list[float]:
        """Return when events happened."""
        return [event.at for event in self.broker.journal.of(*kinds)]

    def counts(self, *kinds: Any, queue: str | None = None) -> Counter[bytes]:
        """Count the events of each message, by its body."""
        return Counter(event.body for event in self.broker.journal.of(*kinds, queue=queue))
