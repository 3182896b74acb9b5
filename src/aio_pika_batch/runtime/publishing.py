"""How does a publication find an open connection?

One publisher at a time, opened when it is first needed. A publisher that kept silent about anything
is given up and replaced: what it may still confirm can no longer be told apart, so that each
message gets one attempt for each connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from aio_pika_batch.core.publication import Outcome, Outgoing, Publication
from aio_pika_batch.errors import TransportError
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.runtime.handler_slots import wait_until
from aio_pika_batch.transport import Publisher, Transport


class ReconnectingPublisher:
    """Publishes on behalf of a whole consumer.

    Args:
        log: Told when a publisher cannot be opened.
    """

    def __init__(self, transport: Transport, log: KeywordLogger) -> None:
        self._transport = transport
        self._log = log
        self._opening = asyncio.Lock()
        self._current: tuple[AbstractAsyncContextManager[Publisher], Publisher] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._complained = False

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish; a connection that cannot be had makes `Outcome.UNKNOWN` of all of them."""
        try:
            publisher = await self._open()
        except TransportError as error:
            if not self._complained:
                self._complained = True
                self._log.warning("no connection for publishing", error=error)
            return [Outcome.UNKNOWN] * len(publications)
        outcomes = await publisher.publish(publications)
        if Outcome.UNKNOWN in outcomes or not publisher.is_open:
            self._give_up(publisher)
        return outcomes

    async def _open(self) -> Publisher:
        async with self._opening:
            if self._current is not None:
                publisher = self._current[1]
                if publisher.is_open:
                    return publisher
                self._give_up(publisher)
            self._refuse_if_closed()
            context = self._transport.publisher()
            publisher = await context.__aenter__()
            try:
                self._refuse_if_closed()
            except TransportError:
                await self._close(context)
                raise
            self._current = context, publisher
            self._complained = False
            return publisher

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            msg = "the consumer has stopped: nothing can be published any more"
            raise TransportError(msg)

    def _give_up(self, publisher: Publisher) -> None:
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
        """Close the connection, and wait for those that are closing; not beyond the deadline."""
        self._is_closed = True
        if self._current is not None:
            self._give_up(self._current[1])
        await wait_until(self._closing, deadline)
        for task in self._closing:
            task.cancel()


def describe_outcome(outcome: Outcome, publication: Publication, timeout: float) -> str:
    """Say why a publication is not confirmed.

    Args:
        timeout: The seconds that it waited, at most.
    """
    where = f"exchange {publication.exchange!r}, routing key {publication.routing_key!r}"
    match outcome:
        case Outcome.RETURNED:
            return f"returned: no queue is bound for {where}"
        case Outcome.REFUSED:
            return f"refused by the broker ({where}): a full queue, or no such exchange"
        case Outcome.UNKNOWN | Outcome.CONFIRMED:
            return (
                f"unconfirmed ({where}): the connection was lost, or silent for {timeout} s;"
                " it may or may not be stored"
            )
