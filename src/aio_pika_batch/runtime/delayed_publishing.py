"""How does a copy that shall wait find its wait queue there?

The queue is declared before the first copy is published to it, once for a consumer, and again if
the broker has no such queue any more. Copies whose wait queue cannot be had count as returned:
their originals are held, and not tried too early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aio_pika_batch.core.publication import Outcome, Outgoing
from aio_pika_batch.core.retry import NO_DELAY, DelayedCopy
from aio_pika_batch.core.topology import Topology, TopologyOptions, wait_queue
from aio_pika_batch.errors import TransportError
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.runtime.handler_slots import wait_until
from aio_pika_batch.runtime.publishing import ReconnectingPublisher
from aio_pika_batch.transport import Transport


class DelayedPublisher(ReconnectingPublisher):
    """An outbox for requeues, some of which wait.

    Args:
        log: Told when a wait queue cannot be had.
        wanted: What the wait queues are like, and which are there before anything is published.
    """

    def __init__(self, transport: Transport, log: KeywordLogger, wanted: TopologyOptions) -> None:
        super().__init__(transport, log)
        self._wanted = wanted
        self._there = set(wanted.wait_levels)
        self._declaring: dict[int, asyncio.Task[bool]] = {}
        self._complaints: dict[int, str] = {}

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish; but first see to it that there is a queue for what shall wait."""
        levels = {each.level for each in publications if isinstance(each, DelayedCopy)}
        if not levels:
            return await super().publish(publications)
        missing = {level for level in levels if not await self._is_there(level)}
        ready = [each for each in publications if _level(each) not in missing]
        published = iter(await super().publish(ready) if ready else ())
        outcomes = []
        for each in publications:
            level = _level(each)
            outcome = Outcome.RETURNED if level in missing else next(published)
            if outcome is Outcome.RETURNED:
                # It was deleted, or never there: the next attempt declares it.
                self._there.discard(level)
            outcomes.append(outcome)
        return outcomes

    async def _is_there(self, level: int) -> bool:
        """Whether there is a wait queue; batches that need it at the same time share an attempt."""
        if level in self._there:
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
            await self._transport.declare(Topology(queues=(wait_queue(self._wanted, level),)))
        except TransportError as error:
            text = format_error(error)
            repeated = text == self._complaints.get(level)
            tell = self._log.debug if repeated else self._log.error
            tell("no wait queue: what shall wait is held", delay=level / 1000, error=text)
            self._complaints[level] = text
            return False
        self._complaints.pop(level, None)
        self._there.add(level)
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
