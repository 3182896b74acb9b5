"""Publishes on behalf of a whole consumer: reconnects, and declares delay queues when needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from aio_pika_batch.core.publication import Copy, Outcome, Outgoing
from aio_pika_batch.core.retry import NO_DELAY, DelayedCopy
from aio_pika_batch.core.topology import Topology, wait_queue
from aio_pika_batch.core.topology_options import TopologyOptions
from aio_pika_batch.errors import AccessRefused, TopologyError, TransportError
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.runtime.shutdown import wait_until
from aio_pika_batch.transport import Publisher, Transport


class ReconnectingPublisher:
    """Publishes over one connection at a time, opened on first use.

    A publisher that left anything unconfirmed is closed and replaced: its late confirms couldn't be
    told apart from others, so each message gets one attempt per connection.

    Args:
        log: Gets a line when a publisher can't be opened.
    """

    def __init__(self, transport: Transport, log: KeywordLogger) -> None:
        self._transport = transport
        self._log = log
        self._opening = asyncio.Lock()
        self._current: tuple[AbstractAsyncContextManager[Publisher], Publisher] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._has_complained = False

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish; without a connection all outcomes are `Outcome.UNKNOWN`."""
        try:
            publisher = await self._open()
        except TransportError as error:
            if not self._has_complained:
                self._has_complained = True
                self._log.warning("no connection for publishing", error=error)
            return [Outcome.UNKNOWN] * len(publications)
        outcomes = await publisher.publish(publications)
        if Outcome.UNKNOWN in outcomes or not publisher.is_open:
            self._replace(publisher)
        return outcomes

    async def _open(self) -> Publisher:
        async with self._opening:
            if self._current is not None:
                publisher = self._current[1]
                if publisher.is_open:
                    return publisher
                self._replace(publisher)
            self._refuse_if_closed()
            context = self._transport.publisher()
            publisher = await context.__aenter__()
            try:
                self._refuse_if_closed()
            except TransportError:
                await self._close(context)
                raise
            self._current = context, publisher
            self._has_complained = False
            return publisher

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise TransportError("the consumer has stopped: nothing can be published any more")

    def _replace(self, publisher: Publisher) -> None:
        if self._current is not None and self._current[1] is publisher:
            context = self._current[0]
            self._current = None
            task = asyncio.get_running_loop().create_task(self._close(context))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, context: AbstractAsyncContextManager[Publisher]) -> None:
        try:
            await context.__aexit__(None, None, None)
        except TransportError as error:
            self._log.debug("a publisher did not close cleanly", error=error)

    async def close(self, deadline: float) -> None:
        """Close the connection, and wait for those that are closing, until the deadline."""
        self._is_closed = True
        if self._current is not None:
            self._replace(self._current[1])
        await wait_until(self._closing, deadline)
        for task in self._closing:
            task.cancel()


class DelayedPublisher(ReconnectingPublisher):
    """Publishes retries, some of which wait in a delay queue.

    Delay queues that are certainly needed are declared with the topology, others before the first
    copy goes there, and again if the broker doesn't have them any more. If a delay queue can't be
    used, its copies count as returned, and the consumer holds their originals instead: they are
    never retried too early.

    Args:
        log: Gets a line when delay queues can't be used.
        options: Describes the delay queues, and which of them are certainly needed.

    Attributes:
        can_delay: Whether delay queues can be used, as far as is known.
        on_undelivered: Called with each dead letter that the broker has returned or refused.
    """

    def __init__(self, transport: Transport, log: KeywordLogger, options: TopologyOptions) -> None:
        super().__init__(transport, log)
        self._options = options
        self._declared: set[int] = set()
        self._declaring: dict[int, asyncio.Task[bool]] = {}
        self._complaints: dict[int, str] = {}
        self.can_delay = True
        self.on_undelivered: Callable[[Copy, Outcome], None] = lambda *_: None

    async def declare_delay_queues(self) -> None:
        """Declare the delay queues that are certainly needed.

        Raises:
            BrokerUnavailable: The broker doesn't answer.
        """
        levels = self._options.wait_levels
        if not levels or not self.can_delay:
            return
        queues = tuple(wait_queue(self._options, level) for level in levels)
        try:
            await self._transport.declare(Topology(queues=queues))
        except (AccessRefused, TopologyError) as error:
            self._hold_from_now_on(error)
        else:
            self._declared.update(levels)

    def _hold_from_now_on(self, error: TransportError) -> None:
        if self.can_delay:
            self.can_delay = False
            self._log.warning(
                "delay queues can't be used: the consumer holds delayed retries instead",
                error=format_error(error),
            )

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish; delay queues that are needed are declared first."""
        outcomes = await self._publish(publications)
        for each, outcome in zip(publications, outcomes, strict=True):
            is_undelivered = outcome in (Outcome.RETURNED, Outcome.REFUSED)
            if is_undelivered and isinstance(each, Copy) and self._is_dead_letter(each):
                self.on_undelivered(each, outcome)
        return outcomes

    def _is_dead_letter(self, copy: Copy) -> bool:
        # All other copies are retries: they go to the consumer's queue, or to a delay queue.
        to_own_queue = (copy.exchange, copy.routing_key) == ("", self._options.queue_name)
        return not to_own_queue and not isinstance(copy, DelayedCopy)

    async def _publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        levels = {each.level for each in publications if isinstance(each, DelayedCopy)}
        if not levels:
            return await super().publish(publications)
        missing = {level for level in levels if not await self._is_declared(level)}
        ready = [each for each in publications if _level(each) not in missing]
        published = iter(await super().publish(ready) if ready else ())
        outcomes = []
        for each in publications:
            level = _level(each)
            outcome = Outcome.RETURNED if level in missing else next(published)
            if outcome is Outcome.RETURNED:
                # It was deleted or never existed: the next attempt declares it.
                self._declared.discard(level)
            outcomes.append(outcome)
        return outcomes

    async def _is_declared(self, level: int) -> bool:
        """Declare a delay queue if needed; batches that need it at the same time share a try."""
        if level in self._declared:
            return True
        declaring = self._declaring.get(level)
        if declaring is None:
            declaring = asyncio.get_running_loop().create_task(self._declare(level))
            self._declaring[level] = declaring
            declaring.add_done_callback(lambda _: self._declaring.pop(level))
        await asyncio.wait({declaring})
        return not declaring.cancelled() and declaring.result()

    async def _declare(self, level: int) -> bool:
        try:
            await self._transport.declare(Topology(queues=(wait_queue(self._options, level),)))
        except (AccessRefused, TopologyError) as error:
            self._hold_from_now_on(error)
            return False
        except TransportError as error:
            text = format_error(error)
            is_repeated = text == self._complaints.get(level)
            log = self._log.debug if is_repeated else self._log.error
            log(
                "a delay queue can't be declared for now: its retries are held",
                delay=level / 1000,
                error=text,
            )
            self._complaints[level] = text
            return False
        self._complaints.pop(level, None)
        self._declared.add(level)
        return True

    async def close(self, deadline: float) -> None:
        """Declare nothing more, and close the connection."""
        declaring = set(self._declaring.values())
        for task in declaring:
            task.cancel()
        await wait_until(declaring, deadline)
        await super().close(deadline)


def _level(publication: Outgoing) -> int:
    return publication.level if isinstance(publication, DelayedCopy) else NO_DELAY
