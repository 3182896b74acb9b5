"""Declares what a consumer needs on its broker: before each session, and if dead letters come back.

Whatever ended the last session, or returned a dead letter, may have deleted a queue or a binding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from aio_pika_batch.core.publication import Copy, Outcome
from aio_pika_batch.core.topology import (
    Topology,
    UnfulfilledWishes,
    build_topology,
    exchange_to_look_up,
    split_exclusive,
)
from aio_pika_batch.core.topology_options import TopologyOptions, policy_command
from aio_pika_batch.errors import TransportError
from aio_pika_batch.logs import BURST_INTERVAL, KeywordLogger, format_error
from aio_pika_batch.runtime.publishing import CopyPublishers
from aio_pika_batch.runtime.shutdown import wait_until
from aio_pika_batch.transport import InspectingTransport, Transport

REDECLARE_AFTER = 5.0
"""Minimum seconds between two declarations because of dead letters that came back."""


class TopologyDeclarer:
    """Declares the topology of one consumer.

    Args:
        vhost: The virtual host, for commands in the log.
        copies: Say which dead letters came back, and declare delay queues.

    Attributes:
        own: What each session must declare on its own connection.
    """

    def __init__(
        self,
        transport: Transport,
        options: TopologyOptions,
        vhost: str,
        copies: CopyPublishers,
        log: KeywordLogger,
    ) -> None:
        self._transport = transport
        # Wait queues are declared apart, since the consumer can do without them.
        self._options = replace(options, wait_levels=())
        self._vhost = vhost
        self._log = log
        self._copies = copies
        copies.dead_letters.on_undelivered = self._on_undelivered
        self._exchange_type: str | None = None
        self._declaring: asyncio.Future[None] | None = None
        self._has_checked = False
        self._has_warned = False
        self._redeclaring: asyncio.Task[None] | None = None
        self._redeclared_at = -BURST_INTERVAL
        self._complained_at = -BURST_INTERVAL
        self.own = Topology()

    async def declare(self) -> None:
        """Declare the topology; workers that need it at the same time share one attempt.

        Raises:
            TransportError: It can't be declared.
        """
        if self._declaring is None or self._declaring.done():
            self._declaring = asyncio.ensure_future(self._declare())
            # Marks an exception as retrieved: all who wait may have been stopped meanwhile.
            self._declaring.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._declaring)

    async def _declare(self) -> None:
        exchange = exchange_to_look_up(self._options)
        if (
            exchange is not None
            and self._exchange_type is None
            and isinstance(self._transport, InspectingTransport)
        ):
            self._exchange_type = await self._transport.exchange_type(exchange)
        topology = build_topology(self._options, dead_letter_exchange_type=self._exchange_type)
        shared, self.own = split_exclusive(topology)
        if self._has_checked:
            # Once is enough to find a user without permission, and it takes a publish.
            shared = replace(shared, publishes=())
        unfulfilled = await self._transport.declare(shared)
        self._has_checked = True
        if exchange is not None and self._exchange_type is None:
            # It was missing, and is there now.
            self._exchange_type = exchange.type
        self._warn(unfulfilled or {})
        await self._copies.retries.declare_delay_queues()

    def _warn(self, unfulfilled: Mapping[str, UnfulfilledWishes]) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        for name, wishes in unfulfilled.items():
            if wishes.differing:
                self._log.warning(
                    "queue has other dead-letter arguments: what the broker gives up goes there",
                    arguments=dict(wishes.differing),
                )
            else:
                self._log.warning(
                    "queue lacks dead-letter arguments: what the broker gives up may be lost"
                    " without this policy",
                    lacking=sorted(wishes.lacking),
                    policy=policy_command(name, wishes.lacking, self._vhost),
                )

    def _on_undelivered(self, copy: Copy, outcome: Outcome) -> None:
        """Log why a dead letter did not arrive, and declare its queue again."""
        now = asyncio.get_running_loop().time()
        if now - self._complained_at >= BURST_INTERVAL:
            self._complained_at = now
            reason = "no queue is bound for its routing key"
            if outcome is Outcome.REFUSED:
                reason = "its queue is full, or its exchange is missing"
            self._log.error(
                "a dead letter did not arrive: its message is held, and it is published again",
                reason=reason,
                exchange=copy.exchange,
                routing_key=copy.routing_key,
            )
        if self._redeclaring is None and now - self._redeclared_at >= REDECLARE_AFTER:
            self._redeclared_at = now
            self._redeclaring = asyncio.get_running_loop().create_task(self._redeclare())

    async def _redeclare(self) -> None:
        # The exchange may have been deleted and created again, with another type.
        self._exchange_type = None
        try:
            await self.declare()
        except Exception as error:  # noqa: BLE001  -- the next dead letter that comes back tries again
            expected = isinstance(error, TransportError)
            self._log.warning(
                "the topology can't be declared again",
                error=format_error(error),
                exc_info=None if expected else error,
            )
        finally:
            self._redeclaring = None

    async def close(self, deadline: float) -> None:
        """Stop declaring."""
        pending = {each for each in (self._declaring, self._redeclaring) if each is not None}
        for each in pending:
            each.cancel()
        await wait_until(pending, deadline)
