"""What would a worker do with these messages?

`process` hands messages to a consumer's handler as a worker does, by the same code: they are cut
into batches, handled, tried once more where the settings say so, judged and routed. Only the broker
is left out: what it would be told is the outcome.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.batcher import Batch
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Outcome, Outgoing, Publication
from aio_pika_batch.core.topology import Topology
from aio_pika_batch.errors import ConfigurationError, SessionLost
from aio_pika_batch.lifecycle import BaseConsumer
from aio_pika_batch.observer import BatchCut, HandlerError, Observer, Observers, Origin
from aio_pika_batch.runtime.batching import BatchIntake
from aio_pika_batch.runtime.handler import HandlerRun
from aio_pika_batch.runtime.handler_events import Reporter
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.runtime.worker_pool import WorkerInstance, WorkerPool, terms_of
from aio_pika_batch.testing.messages import delivered
from aio_pika_batch.testing.outcome import BatchOutcome, sum_up
from aio_pika_batch.transport import Publisher, Session, Subscription


async def process(
    consumer: BaseConsumer[Any], messages: Iterable[bytes | Message], *, hooks: bool = True
) -> BatchOutcome:
    """Hand messages to a consumer as a worker does, and tell what it would tell the broker.

    They are cut into batches as the settings say, as if nothing more came; a `Consumer` gets them
    one by one. Batches are handled one after another. What is requeued is not handled again, but
    with `ordered_by_key`, where messages are tried again in place: without the waits in between.
    Nothing is sent anywhere; what is published counts as confirmed, and is in the outcome.

    Args:
        consumer: Not running.
        messages: Bodies, or messages of :func:`make_message`. They are numbered anew, from 1.
        hooks: Whether `on_start` and `on_stop` run around it.

    Returns:
        What the handler's errors mean is in it, too, and the errors themselves.

    Raises:
        ConfigurationError: The consumer is running.
        SessionLost: The handler went on for 5 s although it was cancelled, at `process_timeout`.
        DrainIncomplete: `on_stop` was cut off after `shutdown_timeout`.
        Exception: What a hook raises.
    """
    settings = consumer.settings
    if consumer.is_running:
        raise ConfigurationError(
            f"{type(consumer).__name__} is running: what it does is seen on its broker; process()"
            " is for consumers that have not been started"
        )
    rehearsal = _Rehearsal(
        consumer,
        delivered(
            messages,
            queue=settings.queue_name,
            retry_count_header=settings.retry_count_header,
        ),
    )
    life = consumer._life  # noqa: SLF001  -- our own
    try:
        await life.begin(
            rehearsal,
            on_start=consumer.on_start if hooks else _nothing,
            on_stop=consumer.on_stop if hooks else _nothing,
            seats=lambda: [consumer._seat(0)],  # noqa: SLF001  -- our own
            timeout=settings.shutdown_timeout,
        )
    finally:
        life.request_stop()
        incomplete = await life.drained()
    if incomplete is not None:
        raise incomplete
    return rehearsal.outcome


async def _nothing() -> None:
    """A hook that is left out."""


class _Rehearsal(WorkerPool):
    """A crew whose work is one worker's, on messages that are there already.

    Attributes:
        outcome: Complete once it has started.
    """

    def __init__(self, consumer: BaseConsumer[Any], messages: Sequence[Message]) -> None:
        name, settings, log = type(consumer).__name__, consumer.settings, consumer._log  # noqa: SLF001  -- our own
        self.outcome = BatchOutcome()
        observers = (_Witness(self.outcome), *consumer._observers)  # noqa: SLF001  -- our own
        super().__init__(name, settings, _Nowhere(self.outcome.published), observers, log)
        self._messages = messages
        origin = Origin(name, settings.queue_name, 0)
        self._reporter = Reporter(Observers(observers, origin, log), log)

    async def start(self, seats: Sequence[WorkerInstance]) -> None:
        """Handle all messages."""
        [seat] = seats
        terms = terms_of(self._settings, seat.exceptions)
        collector = BatchIntake(terms.cutting, seat.batch_key, terms.failure)
        now = asyncio.get_running_loop().time()
        together = BatchDecisions()
        refused = collector.add(self._messages, now)
        if refused is not None:
            self._reporter.refused(refused.not_acked)
            together.add(refused)
        # Whatever there is to wait for is over: the batch that does not fill, the pause of a retry.
        while (batch := collector.batcher.poll(math.inf)) is not None:
            keeps_failures = collector.keeps_failures(batch)
            handled = await self._handle(batch, seat, terms, keeps_failures=keeps_failures)
            self._reporter.kept(collector.take_back(batch, handled, now))
            collector.release(batch)
            together.add(handled)
        plan = terms.router.plan(together.not_acked, datetime.now(UTC))
        header = terms.router.retry.header
        sum_up(self.outcome, self._messages, together, plan, header)

    async def _handle(
        self, batch: Batch, seat: WorkerInstance, terms: WorkerConfig, *, keeps_failures: bool
    ) -> BatchDecisions:
        ignored = asyncio.get_running_loop().create_future()
        handling = HandlerRun(
            seat.process,
            batch,
            terms.failure,
            timeout=terms.process_timeout,
            on_ignored=lambda: ignored.set_result(None),
            on_yield=None,
            keeps_failures=keeps_failures,
            reporter=self._reporter,
        )
        running = asyncio.ensure_future(handling.run())
        try:
            await asyncio.wait({running, ignored}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.wait({running})
            raise
        if not running.done():
            running.cancel()
            raise SessionLost(
                "the handler goes on although it was cancelled, at process_timeout: a worker would"
                " give its session up, and the broker would deliver these messages again"
            )
        return await running


class _Witness(Observer):
    """Notes what the handler was given, and how it failed."""

    def __init__(self, outcome: BatchOutcome) -> None:
        self._outcome = outcome

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        del origin
        self._outcome.batches.append(list(event.messages))

    def handler_error(self, origin: Origin, event: HandlerError) -> None:
        del origin
        self._outcome.errors.append(event.error)


class _Nowhere:
    """A transport that keeps what is published, and has nothing else to offer."""

    def __init__(self, published: list[Publication]) -> None:
        self._published = published

    async def declare(self, topology: Topology) -> None:
        """Everything is as declared."""

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[Session]:
        """Never called: messages are there already."""
        raise NotImplementedError(subscription)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Confirm everything."""
        yield _Notes(self._published)


class _Notes:
    """A publisher that confirms everything."""

    is_open = True

    def __init__(self, published: list[Publication]) -> None:
        self._published = published

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Keep them."""
        self._published += [each for each in publications if isinstance(each, Publication)]
        return [Outcome.CONFIRMED] * len(publications)
