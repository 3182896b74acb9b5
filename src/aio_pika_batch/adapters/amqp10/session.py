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
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from aio_pika_batch.adapters.amqp10.broker_errors import end_reason, is_crash, refused_queue
from aio_pika_batch.adapters.amqp10.connection import Amqp10Connection, Disconnected
from aio_pika_batch.adapters.amqp10.frames import ReceivedRecord, TransferredMessages
from aio_pika_batch.adapters.amqp10.messages import MessageSource
from aio_pika_batch.adapters.amqp10.receiver import (
    Answered,
    Attached,
    LinkEnded,
    LinkPhase,
    Receiver,
)
from aio_pika_batch.adapters.amqp10.settling import OUTCOMES, Decided, modified
from aio_pika_batch.errors import (
    BrokerUnavailable,
    SessionClosed,
    SessionLost,
    SettlementError,
)
from aio_pika_batch.transport import NativeRetries

if TYPE_CHECKING:
    from aio_pika_batch.adapters.amqp10.performatives import PeerError
    from aio_pika_batch.core.message import Message
    from aio_pika_batch.core.settlement import Modification, Settlement
    from aio_pika_batch.core.topology import Version
    from aio_pika_batch.transport import Subscription

WIND_UP_TIMEOUT: Final = 5.0
"""Seconds for everything that comes before the close of the connection."""

ANSWER_TIMEOUT: Final = 10.0
"""Seconds that a broker has to confirm a pause. A queue without a leader doesn't answer."""

_ADDRESSES_SINCE: Final[Version] = (4, 2)
"""The first RabbitMQ that writes `reply_to` as an address."""

_PROOFS: Final = 2
"""How often to ask whether settlements were applied.

The broker's session sends what it has kept back when it handles the first answer. So only the
second question is certainly behind all of it.
"""


class Amqp10Session:
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
        self._connection = connection
        self._queue = subscription.queue
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
        self._loop = asyncio.get_running_loop()
        self._pending: list[Message] = []
        self._waiters: set[asyncio.Future[None]] = set()
        self._sink: Callable[[Sequence[Message]], None] | None = None
        self._sink_error: Exception | None = None
        self._loss: str | None = None
        self._refusal: PeerError | None = None
        self._answered = 0
        self._stopped_by: int | None = None
        self._paused_by: int | None = None
        self._is_closed = False
        self._settled = self._proven = 0

    async def open(self, timeout: float) -> None:
        """Start to consume. Raises TopologyError or BrokerUnavailable."""
        self._connection.listen(self._on_event)
        self._flush()
        address = self._connection.address
        try:
            async with asyncio.timeout(timeout):
                while self._receiver.phase is LinkPhase.OPENING and self._loss is None:
                    await self._wait()
        except TimeoutError as error:
            raise BrokerUnavailable(
                f"{address} did not open a link within {timeout:g} s"
            ) from error
        if self._receiver.phase is LinkPhase.ENDED:
            raise refused_queue(self._refusal, self._queue, address)
        if self._loss is not None:
            raise BrokerUnavailable(
                f"{address} closed the connection while a link was opened: {self._loss}"
            )

    # --- the port ----------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        return self

    async def __anext__(self) -> Sequence[Message]:
        while True:
            self._check()
            if self._pending:
                return self._take()
            if self._is_stopped:
                raise StopAsyncIteration
            await self._wait()

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        """Hand chunks over as soon as they arrive: no task is woken for a read."""
        self._sink = sink
        try:
            while True:
                self._check()
                self._hand_over()
                if self._sink_error is not None:
                    raise self._sink_error
                if self._is_stopped:
                    return
                await self._wait()
        finally:
            self._sink = None

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
            self._lose(f"the broker has not answered for {ANSWER_TIMEOUT:g} s", None)
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
                self._pending.extend(messages)
                if self._sink is None:
                    self._wake()
                else:
                    self._hand_over()
            case ReceivedRecord(channel, record):
                self._on_link_event(self._receiver.receive(channel, record))
                self._flush()
            case Disconnected(reason, error):
                self._lose(reason, error)

    def _on_link_event(self, event: object) -> None:
        match event:
            case Attached(transfers):
                self._connection.receive(transfers)
                self._wake()
            case Answered(number):
                self._answered = number
                self._wake()
            case LinkEnded() if self._is_closed:
                self._wake()
            case LinkEnded(error):
                self._refusal = error
                self._lose(end_reason("link", error), error)
            case _:
                pass  # the receiver drops later settlements of what the broker has taken back

    def _lose(self, reason: str, error: PeerError | None) -> None:
        if self._loss is None:
            # The broker delivers the pending messages again, to another session.
            self._loss = reason
            self._pending.clear()
            if is_crash(error):
                self.crashed_on = str(error)
        self._wake()

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

    def _take(self) -> list[Message]:
        messages, self._pending = self._pending, []
        return messages

    def _hand_over(self) -> None:
        """Give the pending messages to the sink. What it raises is raised by `pump`."""
        if self._pending and self._sink is not None and self._sink_error is None:
            try:
                self._sink(self._take())
            except Exception as error:  # noqa: BLE001  -- not the connection's fault
                self._sink_error = error
                self._wake()

    @property
    def _is_stopped(self) -> bool:
        return self._stopped_by is not None and self._answered >= self._stopped_by

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
            self._check_loss()
            await self._wait()

    def _check(self) -> None:
        if self._is_closed:
            raise SessionClosed(f"the session on queue {self._queue!r} is closed")
        self._check_loss()

    def _check_loss(self) -> None:
        if self._loss is not None:
            raise SessionLost(
                f"the session on queue {self._queue!r} at {self._connection.address}"
                f" was lost: {self._loss}"
            )

    async def _wait(self) -> None:
        waiter = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _flush(self) -> None:
        self._connection.write(self._receiver.output)
