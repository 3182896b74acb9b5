"""Consumes from a queue over AMQP 1.0: from a connection to the last tag that only it can settle.

Laws:

- What was delivered before the answer to `cancel` is handed out; after a loss nothing is.
- A settlement is written whole or not at all, and never in another session or after the end.
- Leaving the context cancels, waits until the broker has applied what was settled, detaches, and
  closes the connection. Each step may fail or hang; the next one follows within seconds.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from aio_pika_batch.adapters.amqp10.broker_errors import is_crash, refused_queue, why_ended
from aio_pika_batch.adapters.amqp10.codec import Int
from aio_pika_batch.adapters.amqp10.connection import Connection, Lost, open_connection
from aio_pika_batch.adapters.amqp10.frames import Received, Transferred
from aio_pika_batch.adapters.amqp10.messages import MessageSource
from aio_pika_batch.adapters.amqp10.receiver import (
    Answered,
    Attached,
    Ended,
    LinkPhase,
    Receiver,
    TakenBack,
)
from aio_pika_batch.adapters.amqp10.settling import OUTCOMES, Decided, NativeReturn, modified
from aio_pika_batch.errors import (
    BrokerUnavailable,
    ConfigurationError,
    SessionClosed,
    SessionLost,
    TopologyError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from aio_pika_batch.adapters.amqp10.performatives import Error
    from aio_pika_batch.adapters.amqp10.reaching import Peer
    from aio_pika_batch.core.message import Message
    from aio_pika_batch.core.settlement import Settlement
    from aio_pika_batch.core.topology import Version
    from aio_pika_batch.transport import Subscription

WIND_UP_TIMEOUT: Final = 5.0
"""Seconds for all that comes before the connection's own close."""

DELAYS_SINCE: Final[Version] = (4, 3)
"""The first RabbitMQ whose quorum queues deliver again at a time that they are told."""

_ADDRESSES_SINCE: Final[Version] = (4, 2)
"""The first RabbitMQ that writes `reply_to` as an address."""

_PROOFS: Final = 2
"""How often to ask whether settlements were applied.

What the broker's session has held back goes out when it handles the first answer, so that only the
second question is certainly behind all of it.
"""

_STREAM_OFFSET: Final = "x-stream-offset"


@dataclass(frozen=True, slots=True)
class Retries:
    """What the queue's broker can do with a delivery that goes back.

    Attributes:
        delays: Deliver it again at a given time.
    """

    delays: bool


@asynccontextmanager
async def open_session(
    peers: Sequence[Peer], subscription: Subscription, timeout: float
) -> AsyncIterator[Amqp10Session]:
    """Connect, consume, and in the end close.

    Args:
        timeout: Seconds for connecting to one broker, and for opening the link.

    Raises:
        ConfigurationError: The subscription asks for what AMQP 1.0 doesn't have.
        TopologyError: The broker doesn't let the queue be consumed from.
        AccessRefused: It doesn't let us in.
        BrokerUnavailable: There is none (yet).
    """
    properties = _link_properties(subscription)
    connection = await open_connection(peers, timeout)
    session = Amqp10Session(connection, subscription, properties)
    try:
        await session.open(timeout)
        yield session
    finally:
        await session.close()


def _link_properties(subscription: Subscription) -> dict[str, object]:
    properties: dict[str, object] = {}
    unknown = dict(subscription.arguments)
    if isinstance(priority := unknown.get("x-priority"), int):
        properties["rabbitmq:priority"] = Int(priority)  # of any other type it is ignored
        del unknown["x-priority"]
    asked = [f"the consumer argument {name!r}" for name in unknown]
    if subscription.exclusive:
        asked.append("an exclusive consumer")
    if subscription.own.queues:
        asked.append("an exclusive queue")
    if asked:
        raise ConfigurationError(f"AMQP 1.0 has no counterpart of {asked[0]}; use AMQP 0-9-1")
    return properties


class Amqp10Session:
    """Implements :class:`~aio_pika_batch.transport.Session` and `PumpingSession`."""

    def __init__(
        self,
        connection: Connection,
        subscription: Subscription,
        properties: Mapping[str, object],
    ) -> None:
        self._connection = connection
        self._queue = subscription.queue
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
        self._failure: Exception | None = None
        self._lost: str | None = None
        self._refusal: Error | None = None
        self._answered = 0
        self._stopped_by: int | None = None
        self._is_first = True
        self._is_closed = False
        self._unproven = 0
        self.crashed_on: str | None = None
        """What the broker said, if its session failed over a message that it couldn't translate."""

    async def open(self, timeout: float) -> None:
        """Begin to consume. Raises TopologyError, BrokerUnavailable."""
        self._connection.listen(self._heard)
        self._flush()
        where = self._connection.peer
        try:
            async with asyncio.timeout(timeout):
                while self._receiver.phase is LinkPhase.OPENING and self._lost is None:
                    await self._wait()
        except TimeoutError as error:
            raise BrokerUnavailable(f"{where} did not open a link within {timeout:g} s") from error
        if self._receiver.phase is LinkPhase.OVER:
            raise refused_queue(self._refusal, self._queue, where)
        if self._lost is not None:
            raise BrokerUnavailable(f"{where} hung up while a link was opened: {self._lost}")

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
        """Hand chunks over in the moment they come: no task is woken for a read."""
        self._sink = sink
        try:
            while True:
                self._check()
                self._hand_over()
                if self._failure is not None:
                    raise self._failure
                if self._is_stopped:
                    return
                await self._wait()
        finally:
            self._sink = None

    async def cancel(self) -> None:
        """Ask for no more messages; returns once the broker has confirmed."""
        self._check()
        await self._stop()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Tell the broker what became of some messages."""
        await self._settle([Decided(OUTCOMES[each.disposition], each.tags) for each in settlements])

    # --- what the port doesn't have yet ------------------------------------------------

    @property
    def retries(self) -> Retries:
        """What deliveries that go back can have. Of quorum queues: classic ones ignore it."""
        version = self._connection.version
        return Retries(delays=version is not None and version >= DELAYS_SINCE)

    async def give_back(self, returns: Sequence[NativeReturn]) -> None:
        """Let deliveries go back without a copy. Raises what `settle` raises.

        Raises:
            SettlementError: Also if a header cannot be written, or a delay cannot be had.
        """
        await self._settle([Decided(modified(each), each.tags) for each in returns])

    async def settled(self) -> None:
        """Return when the queue has applied all that was settled so far.

        Raises:
            SessionLost: The session was lost before.
        """
        self._check()
        await self._prove()

    @property
    def unproven(self) -> int:
        """How many deliveries were settled, of which isn't known yet whether it was applied."""
        return self._unproven

    # --- what the connection tells -----------------------------------------------------

    def _heard(self, event: Transferred | Received | Lost) -> None:
        match event:
            case Transferred(messages):
                self._receiver.received()
                self._pending.extend(messages)
                if self._sink is None:
                    self._wake()
                else:
                    self._hand_over()
            case Received(channel, record):
                self._take_event(self._receiver.receive(channel, record))
                self._flush()
            case Lost(reason, error):
                self._lose(reason, error)

    def _take_event(self, event: object) -> None:
        match event:
            case Attached(transfers):
                self._connection.receive(transfers)
                self._wake()
            case Answered(number):
                self._answered = number
                self._wake()
            case Ended(error) if self._is_closed:
                self._wake()
            case Ended(error):
                self._refusal = error
                self._lose(why_ended("link", error), error)
            case TakenBack():
                # They come again; what is still settled about them is dropped.
                pass

    def _lose(self, why: str, error: Error | None) -> None:
        """The session has ended without having been asked to."""
        if self._lost is None:
            self._lost = why
            self._pending.clear()
            if is_crash(error):
                self.crashed_on = str(error)
        self._wake()

    # --- the end -----------------------------------------------------------------------

    async def close(self) -> None:
        """Close link and connection. Never raises, but for the cancellation of its task."""
        self._is_closed = True
        self._wake()
        try:
            if self._receiver.phase is LinkPhase.OPEN and self._lost is None:
                with suppress(TimeoutError, SessionLost):
                    async with asyncio.timeout(WIND_UP_TIMEOUT):
                        await self._wind_up()
        finally:
            await self._connection.close()

    async def _wind_up(self) -> None:
        await self._stop()
        if self._unproven:
            await self._prove()
        self._receiver.detach()
        self._flush()
        while self._receiver.phase is LinkPhase.DETACHING and self._lost is None:
            await self._wait()

    # --- helpers -----------------------------------------------------------------------

    async def _settle(self, decided: Sequence[Decided]) -> None:
        self._check()
        before = len(self._receiver.unsettled)
        self._receiver.settle(decided)
        self._unproven += before - len(self._receiver.unsettled)
        self._flush()
        if self._connection.is_clogged:
            await self._connection.drain()

    def _take(self) -> list[Message]:
        messages, self._pending = self._pending, []
        if self._is_first:
            self._is_first = False
            self._refuse_streams(messages[0])
        return messages

    def _hand_over(self) -> None:
        """Give what is pending to the sink. What that raises is raised where `pump` is awaited."""
        if self._pending and self._sink is not None and self._failure is None:
            try:
                self._sink(self._take())
            except Exception as error:  # noqa: BLE001  -- the connection has nothing to do with it
                self._failure = error
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
        settled = self._unproven
        for _ in range(_PROOFS):
            number = self._receiver.ask()
            self._flush()
            await self._answer(number)
        self._unproven -= settled

    async def _answer(self, number: int) -> None:
        while self._answered < number:
            self._check_lost()
            await self._wait()

    def _check(self) -> None:
        if self._is_closed:
            raise SessionClosed(f"the session on queue {self._queue!r} is over")
        self._check_lost()

    def _check_lost(self) -> None:
        if self._lost is not None:
            raise SessionLost(
                f"the session on queue {self._queue!r} at {self._connection.peer}"
                f" was lost: {self._lost}"
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

    def _refuse_streams(self, message: Message) -> None:
        if _STREAM_OFFSET in (message.properties.headers or {}):
            raise TopologyError(
                f"queue {self._queue!r} is a stream: its messages are neither rejected"
                " nor requeued one by one; consume from a classic or quorum queue"
            )
