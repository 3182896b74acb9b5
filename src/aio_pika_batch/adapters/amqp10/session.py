"""Consumes from a queue over AMQP 1.0.

Laws:

- What was delivered before the answer to `cancel` is handed out. After a loss nothing is.
- A settlement is written whole or not at all, and never in another session or after the end.
- Leaving the context stops deliveries, waits until the broker has applied what was settled,
  detaches, and closes the connection. Each step may fail or hang; the next one follows within
  seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from aio_pika_batch.adapters.amqp10.connection import Amqp10Connection, Disconnected, end_reason
from aio_pika_batch.adapters.amqp10.frames import ReceivedRecord, TransferredMessages
from aio_pika_batch.adapters.amqp10.messages import MessageSource
from aio_pika_batch.adapters.amqp10.receiver import (
    Answered,
    Attached,
    LinkEnded,
    LinkEvent,
    LinkPhase,
    Receiver,
)
from aio_pika_batch.adapters.amqp10.settling import OUTCOMES, Decided, modified
from aio_pika_batch.adapters.buffered_session import (
    ANSWER_TIMEOUT,
    WIND_UP_TIMEOUT,
    BufferedSession,
)
from aio_pika_batch.core.refusals import ReplyCode, refusal_error
from aio_pika_batch.errors import BrokerUnavailable, SessionLost, SettlementError, TransportError
from aio_pika_batch.transport import NativeRetries

if TYPE_CHECKING:
    from aio_pika_batch.adapters.amqp10.performatives import PeerError
    from aio_pika_batch.adapters.url import Address
    from aio_pika_batch.core.settlement import Modification, Settlement
    from aio_pika_batch.core.topology import Version
    from aio_pika_batch.transport import Subscription

_CODES: Final = {
    "amqp:unauthorized-access": ReplyCode.ACCESS_REFUSED,
    "amqp:not-found": ReplyCode.NOT_FOUND,
    "amqp:resource-locked": ReplyCode.RESOURCE_LOCKED,
    "amqp:invalid-field": ReplyCode.NOT_ALLOWED,
    "amqp:precondition-failed": ReplyCode.PRECONDITION_FAILED,
    "amqp:not-allowed": ReplyCode.NOT_ALLOWED,
    "amqp:not-implemented": ReplyCode.NOT_IMPLEMENTED,
}
"""The reply codes of AMQP 0-9-1 for the same refusals."""

_ADDRESSES_SINCE: Final[Version] = (4, 2)
"""The first RabbitMQ that writes `reply_to` as an address."""

_PROOFS: Final = 2
"""How often to ask whether settlements were applied.

The broker's session sends what it has kept back when it handles the first answer. So only the
second question is certainly behind all of it.
"""


class Amqp10Session(BufferedSession):
    """Implements :class:`~aio_pika_batch.transport.Session` and its extensions.

    Args:
        properties: The link's properties.
        retries: What is possible with the queue on this broker.

    Attributes:
        crashed_on: The broker's error if its own session failed, probably at a message that it
            cannot translate.
    """

    def __init__(
        self,
        connection: Amqp10Connection,
        subscription: Subscription,
        properties: Mapping[str, object],
        retries: NativeRetries,
    ) -> None:
        super().__init__(subscription.queue, connection.address)
        self._connection = connection
        self.retries = retries
        self.crashed_on: str | None = None
        version = connection.version
        source = MessageSource(
            subscription.queue,
            subscription.consumer_tag,
            subscription.retry_count_header,
            has_addresses=version is None or version >= _ADDRESSES_SINCE,
        )
        name = f"{subscription.consumer_tag}-{uuid4().hex[:8]}"
        self._receiver = Receiver(source, name, subscription.prefetch, properties)
        self._refusal: PeerError | None = None
        self._answered = 0
        self._stopped_by: int | None = None
        self._paused_by: int | None = None
        self._settled = self._proven = 0

    async def open(self, timeout: float) -> None:
        """Start to consume. Raises TopologyError or BrokerUnavailable."""
        self._connection.listen(self._on_event)
        self._flush()
        address = self._address
        try:
            async with asyncio.timeout(timeout):
                while self._receiver.phase is LinkPhase.OPENING and self._loss is None:
                    await self._wait()
        except TimeoutError as error:
            raise BrokerUnavailable(
                f"{address} did not open a link within {timeout:g} s"
            ) from error
        if self._receiver.phase is LinkPhase.ENDED:
            raise _refused_queue(self._refusal, self._queue, address)
        if self._loss is not None:
            raise BrokerUnavailable(
                f"{address} closed the connection while a link was opened: {self._loss}"
            )

    # --- the port ----------------------------------------------------------------------

    async def cancel(self) -> None:
        """Ask for no more messages."""
        self._check()
        await self._stop()

    async def pause(self) -> None:
        """Take the credit back."""
        self._check()
        if self._stopped_by is None and self._paused_by is None:
            self._paused_by = self._receiver.stop()
            self._flush()
        stop = self._paused_by if self._stopped_by is None else self._stopped_by
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._answer(stop or 0)
        except TimeoutError:
            self._lose(f"the broker has not answered for {ANSWER_TIMEOUT:g} s")
            self._check()

    async def resume(self, prefetch: int) -> None:
        """Give credit again."""
        self._check()
        if self._stopped_by is None and self._paused_by is not None:
            self._paused_by = None
            self._receiver.resume(prefetch)
            self._flush()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Settle messages."""
        await self._settle([Decided(OUTCOMES[each.disposition], each.tags) for each in settlements])

    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        """Modify messages and give them back, and settle others."""
        if not self.retries.delays and any(each.until is not None for each in modifications):
            # The broker would deliver them again at once.
            raise SettlementError(f"queue {self._queue!r} cannot delay messages on this broker")
        decided = [Decided(modified(each), each.tags) for each in modifications]
        decided += [Decided(OUTCOMES[each.disposition], each.tags) for each in settlements]
        await self._settle(decided)

    async def settled(self) -> None:
        """Return when the queue has applied everything that was settled so far."""
        self._check()
        await self._prove()

    @property
    def unproven(self) -> int:
        """The number of settled messages that the broker may deliver again."""
        return self._settled - self._proven

    # --- events of the connection ------------------------------------------------------

    def _on_event(self, event: TransferredMessages | ReceivedRecord | Disconnected) -> None:
        match event:
            case TransferredMessages(messages):
                self._receiver.received()
                self._receive(messages)
            case ReceivedRecord(channel, record):
                self._on_link_event(self._receiver.receive(channel, record))
                self._flush()
            case Disconnected(reason, error):
                self._on_end(reason, error)

    def _on_link_event(self, event: LinkEvent | None) -> None:
        match event:
            case Attached(transfers):
                self._connection.receive(transfers)
                self._wake()
            case Answered(number):
                self._answered = number
                self._is_drained = self._stopped_by is not None and number >= self._stopped_by
                self._wake()
            case LinkEnded() if self._is_closed:
                self._wake()
            case LinkEnded(error):
                self._refusal = error
                self._on_end(end_reason("link", error), error)
            case None:
                pass

    def _on_end(self, reason: str, error: PeerError | None) -> None:
        if self._loss is None and _is_crash(error):
            self.crashed_on = str(error)
        self._lose(reason)

    # --- the end -----------------------------------------------------------------------

    async def close(self) -> None:
        """Close link and connection. Raises only if its own task is cancelled."""
        self._is_closed = True
        self._wake()
        try:
            if self._receiver.phase is LinkPhase.OPEN and self._loss is None:
                with suppress(TimeoutError, SessionLost):
                    async with asyncio.timeout(WIND_UP_TIMEOUT):
                        await self._wind_up()
        finally:
            await self._connection.close()

    async def _wind_up(self) -> None:
        await self._stop()
        if self.unproven:
            await self._prove()
        self._receiver.detach()
        self._flush()
        while self._receiver.phase is LinkPhase.DETACHING and self._loss is None:
            await self._wait()

    # --- helpers -----------------------------------------------------------------------

    async def _settle(self, decided: Sequence[Decided]) -> None:
        self._check()
        before = len(self._receiver.unsettled)
        self._receiver.settle(decided)
        self._settled += before - len(self._receiver.unsettled)
        self._flush()
        if self._connection.is_clogged:
            await self._connection.drain()

    async def _stop(self) -> None:
        if self._stopped_by is None:
            self._stopped_by = self._receiver.stop()
            self._flush()
        await self._answer(self._stopped_by)

    async def _prove(self) -> None:
        settled = self._settled
        for _ in range(_PROOFS):
            number = self._receiver.ask()
            self._flush()
            await self._answer(number)
        self._proven = max(self._proven, settled)

    async def _answer(self, number: int) -> None:
        while self._answered < number:
            if self._loss is not None:
                raise self._lost(self._loss)
            await self._wait()

    def _flush(self) -> None:
        self._connection.write(self._receiver.output)


def _refused_queue(error: PeerError | None, queue: str, address: Address) -> TransportError:
    """Return the error for a queue that the broker refuses to let be consumed."""
    subject = f"consuming from queue {queue!r} at {address}"
    if error is None:
        return BrokerUnavailable(f"{subject}: the broker gives no reason; try again later")
    return refusal_error(_CODES.get(error.condition, 0), str(error), subject)


def _is_crash(error: PeerError | None) -> bool:
    """Whether the broker's own session failed, probably at a message that it cannot translate."""
    if error is None or error.condition != "amqp:internal-error":
        return False
    # An operator, a stopping node, or maintenance.
    return "forced" not in str(error).lower()
