"""One session: from opening a connection to the last delivery tag that only this one can settle.

Laws:

- What was delivered before the broker's answer to `cancel` is handed out. After a loss, nothing is.
- A settlement is written completely or not at all, and never after the end of its session.
- Leaving the context cancels, writes the last settlements, closes the channel, and closes the
  connection, in this order. Each step may fail or hang; the next one follows within seconds.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from aio_pika_batch.adapters.aio_pika.client_errors import (
    consume_exception,
    describe_channel_close,
    finish_within,
    lost_on_error,
)
from aio_pika_batch.adapters.aio_pika.connection import OpenConnection, open_connection
from aio_pika_batch.adapters.aio_pika.consumer_channel import (
    STREAM_OFFSET,
    ConsumerChannel,
)
from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ChannelCloseOk,
    ConnectionClosed,
    ConnectionLost,
    ConsumerCancelled,
    Deliveries,
    Malformed,
)
from aio_pika_batch.adapters.aio_pika.frame_fastpath import pack_settlements
from aio_pika_batch.adapters.aio_pika.topology import declare_on
from aio_pika_batch.adapters.buffered_session import (
    ANSWER_TIMEOUT,
    WIND_UP_TIMEOUT,
    BufferedSession,
)
from aio_pika_batch.core.refusals import STREAM_ADVICE
from aio_pika_batch.core.settlement import (
    SAFE_COMMANDS,
    CommandBudget,
    Disposition,
    DrainMode,
    Frame,
    Ledger,
    Settlement,
    drain_mode,
)
from aio_pika_batch.errors import BrokerUnavailable, SessionLost, TopologyError
from aio_pika_batch.transport import Native

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.adapters.aio_pika.frame_tap import FrameTap
    from aio_pika_batch.core.message import Message
    from aio_pika_batch.core.topology import Version
    from aio_pika_batch.transport import Endpoint, Subscription

UNCOUNTED_NACKS_SINCE: Version = (4, 3)
"""The first RabbitMQ that doesn't count a return by nack, but counts one by the close. Earlier ones
count both, and a nack moves the message to the back of a queue without a delivery limit."""

SETTLE_PAUSE = 0.2
"""Seconds between the last settlement and the close, on brokers that don't call themselves
RabbitMQ. It is unknown what their answers prove."""

_T = TypeVar("_T")


@asynccontextmanager
async def open_session(
    endpoint: Endpoint, subscription: Subscription
) -> AsyncIterator[AioPikaSession]:
    """Connect and consume; close on leaving the context."""
    # Only here: a consumer has further connections, and one line about a block is enough.
    connection = await open_connection(endpoint, watches_loop=True)
    session = AioPikaSession(connection, subscription)
    try:
        await session.open(endpoint.connect_timeout)
        yield session
    finally:
        await session.close()


class AioPikaSession(BufferedSession):
    """Implements :class:`~aio_pika_batch.transport.Session` and its extensions."""

    def __init__(self, connection: OpenConnection, subscription: Subscription) -> None:
        super().__init__(subscription.queue, connection.address)
        self._connection = connection
        self._tap = connection.tap
        self._own = subscription.own
        self._channel = ConsumerChannel(connection, subscription, self.on_event)
        # A classic queue keeps nothing. An exclusive one may belong to another consumer by then.
        self._asks_queue = subscription.queue_type == "quorum" and not subscription.exclusive
        self._writer = SettlementWriter(
            self._tap,
            self._channel,
            is_rabbitmq=connection.is_rabbitmq,
            commits_prove=not self._asks_queue,
        )
        self.is_expired = False
        self._is_first = True
        self._capacity = subscription.prefetch or math.inf
        self._cancelling: asyncio.Task[None] | None = None
        self._confirming: asyncio.Task[None] | None = None
        self._has_asked = False
        self._adjusting = asyncio.Lock()
        self._opening_native: asyncio.Task[Native] | None = None

    async def open(self, timeout: float) -> None:
        """Start to consume. Raises TopologyError or BrokerUnavailable."""
        try:
            async with asyncio.timeout(timeout):
                await declare_on(self._connection, self._own, timeout)
                await self._channel.consume()
        except TimeoutError as error:
            raise BrokerUnavailable(
                f"{self._address} did not start a consumer within {timeout:g} s"
            ) from error

    # --- the port ----------------------------------------------------------------

    async def cancel(self) -> None:
        """Ask for no more messages."""
        self._check()
        if self._cancelling is None:
            self._cancelling = self._in_own_task(self._cancel())
        await self._shielded(self._cancelling)

    async def pause(self) -> None:
        """Cancel the consumer, and keep its channel."""

        async def if_consuming() -> None:
            if self._channel.is_consuming:
                settled = self._writer.unproven
                await self._channel.cancel()
                self._writer.prove(settled)

        await self._adjust(if_consuming)

    async def resume(self, prefetch: int) -> None:
        """Start another consumer on the same channel."""

        async def if_paused() -> None:
            if self._cancelling is None and not self._channel.is_consuming:
                settled = self._writer.unproven
                await self._channel.resume(prefetch)
                self._writer.prove(settled)
                self._capacity += prefetch or math.inf

        await self._adjust(if_paused)

    async def _adjust(self, step: Callable[[], Awaitable[None]]) -> None:
        """Change the consumer, one change after the other."""

        async def adjust() -> None:
            async with self._adjusting:
                await step()

        self._check()
        task = self._in_own_task(adjust())
        if not (await asyncio.wait({task}, timeout=ANSWER_TIMEOUT))[0]:
            self._lose(f"the broker has not answered for {ANSWER_TIMEOUT:g} s")
            self._check()
        await self._shielded(task)

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Settle messages."""
        self._check()
        try:
            self._writer.settle(settlements)
        except SessionLost as lost:
            self._lose(str(lost))
            self._check()
        # Usually nothing is waited for: 64 KiB may wait in the transport by default.
        if self._tap.is_clogged:
            with lost_on_error("the connection broke"):
                await self._tap.drain()

    @property
    def unproven(self) -> int:
        """The number of settled messages that the broker may deliver again."""
        # Before the broker has confirmed a settlement, the message counts against the prefetch.
        return int(min(self._writer.unproven, self._capacity))

    async def settled(self) -> None:
        """Write what is held, and let a quorum queue answer."""
        self._check()
        self._confirming = self._in_own_task(self._confirm(self._confirming))
        await self._shielded(self._confirming)

    async def _confirm(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait({earlier})
        await self._writer.finish()
        while self._asks_queue and self._writer.unproven and not self._is_closed:
            if await self._channel.has_leader():
                await self._await_queue()

    def expire(self) -> None:
        """End the iteration, so that another session can replace this one."""
        self.is_expired = True
        if self._cancelling is None and not self._is_closed and self._loss is None:
            self._cancelling = self._in_own_task(self._cancel())

    async def native(self) -> Native:
        """Open (once) a channel for the user on the session's connection."""
        self._check()
        if self._opening_native is None:
            self._opening_native = self._in_own_task(self._open_native())
        return await self._shielded(self._opening_native)

    # --- events of the connection ------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Handle what the frame tap reports. Never raises or blocks."""
        match event:
            case Deliveries(messages):
                self._receive(messages)
            case ChannelClosed():
                self._lose(describe_channel_close(event))
            case ConnectionClosed(code, text):
                self._lose(f"the broker closed the connection: {code} {text}")
            case ConsumerCancelled():
                self._lose(
                    "the broker cancelled the consumer: the queue was deleted or is unavailable, or"
                    " messages were held for too long"
                )
            case ChannelCloseOk():
                self._writer.on_channel_closed()
            case Malformed(reason) | ConnectionLost(reason):
                self._lose(reason)
            case _:
                pass  # there are no confirms on this channel

    # --- the end ---------------------------------------------------------------------

    async def close(self) -> None:
        """Close channel and connection. Raises only if its own task is cancelled."""
        self._is_closed = True
        self._wake()
        if self._opening_native is not None:
            self._opening_native.cancel()
        try:
            if self._channel.number and self._loss is None:
                await finish_within(WIND_UP_TIMEOUT, self._wind_up(), self._tap.abort)
        finally:
            await self._connection.close()

    async def _wind_up(self) -> None:
        if self._cancelling is None:
            await self._cancel()
        else:
            await asyncio.wait({self._cancelling})
        if self._confirming is not None:
            await asyncio.wait({self._confirming})
        await self._writer.finish()
        # Without a leader the channel would hang in the question, and so couldn't be closed.
        if self._asks_queue and self._writer.unproven and await self._channel.has_leader():
            await self._await_queue()
        untaken: Sequence[Message] = ()
        # Before 4.3, the close returns it to a better place, and it counts either way.
        if self._has_asked and self._channel.version >= UNCOUNTED_NACKS_SINCE:
            untaken = self._pending
        await self._writer.give_back([message.delivery_tag for message in untaken])
        await self._channel.close()

    async def _await_queue(self) -> None:
        """Wait until the queue has carried out the last settlements. Raises SessionLost.

        The channel returns what still reaches it for a cancelled consumer, with one command for
        each delivery. After many of them it keeps even a single settlement, and the close drops it.
        A queue answers a consume and a cancel only after the commands before them.
        """
        self._has_asked = True
        await self._channel.resume(1)
        await self._channel.cancel()
        self._writer.unproven = 0

    async def _cancel(self) -> None:
        writer, channel = self._writer, self._channel
        async with self._adjusting:
            writer.hold()
            if not channel.is_consuming and writer.unproven + self._remaining > SAFE_COMMANDS:
                # Only an answer of the queue proves anything. A paused session has no consumer to
                # cancel, so it starts one.
                await channel.resume(1)
            is_proof = channel.is_consuming
            await channel.cancel()
        self._is_drained = True
        self._wake()
        await writer.on_cancelled(self._remaining, is_proof=is_proof)

    @property
    def _remaining(self) -> int:
        """The number of messages whose settlement is held, or may still come."""
        ledger = self._writer.ledger
        return ledger.held if self._is_closed else len(ledger) + len(self._pending)

    async def _open_native(self) -> Native:
        with lost_on_error("cannot open a native channel"):
            async with asyncio.timeout(ANSWER_TIMEOUT):
                # Raise on return, or a message that reaches no queue would be lost silently.
                channel = await self._connection.connection.channel(on_return_raises=True)
                queue = await channel.get_queue(self._queue, ensure=False)
                return Native(channel, queue)

    # --- helpers -----------------------------------------------------------------------

    def _take(self) -> list[Message]:
        messages, self._pending = self._pending, []
        if self._is_first:
            # A queue is a stream or it is not: the first message is enough to know.
            self._is_first = False
            if STREAM_OFFSET in (messages[0].properties.headers or {}):
                raise TopologyError(f"queue {self._queue!r}: {STREAM_ADVICE}")
        self._writer.ledger.deliver([message.delivery_tag for message in messages])
        return messages

    def _in_own_task(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Start what goes on if its caller is cancelled: that would close aiormq's channel."""
        task = self._loop.create_task(work)
        task.add_done_callback(consume_exception)
        return task

    async def _shielded(self, task: asyncio.Task[_T]) -> _T:
        """Wait for a task that goes on if its waiter is cancelled."""
        try:
            return await asyncio.shield(task)
        except SessionLost:
            self._check()  # raises with the reason of the loss, if there is one
            raise


class SettlementWriter:
    """Writes settlements: at once until the cancel, then as `drain_mode` decides.

    It knows which ones the broker has certainly received. :mod:`~aio_pika_batch.core.settlement`
    explains why a quorum queue can lose settlements, and how to send those after a cancel. Laws:

    - The answer to `basic.cancel` proves everything that was written before it. What is settled
      from the cancel on is held until then, so that it can be counted.
    - After that, `SAFE_COMMANDS` commands are sent at most, the last ones before the channel is
      closed. Unless a quorum queue can be asked once more, the answers to `tx.commit` and
      `channel.close` prove what was written before them.

    Attributes:
        ledger: The session's unsettled deliveries.
        unproven: The number of settled messages whose settlement may not have been received.
    """

    def __init__(
        self,
        tap: FrameTap,
        channel: ConsumerChannel,
        *,
        is_rabbitmq: bool,
        commits_prove: bool,
    ) -> None:
        self.ledger = Ledger()
        self.unproven = 0
        self._tap = tap
        self._channel = channel
        self._is_rabbitmq = is_rabbitmq
        self._commits_prove = commits_prove
        self._returns: dict[int, None] | None = None
        self._loop = asyncio.get_running_loop()
        self._is_holding = False
        self._is_transactional = False
        self._budget = CommandBudget()
        self._timer: asyncio.TimerHandle | None = None
        self._committing: asyncio.Task[None] | None = None
        self._settled_at = -SETTLE_PAUSE  # no pause if nothing was settled

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Write or hold settlements. Raises SettlementError, or SessionLost."""
        ledger = self.ledger
        if self._returns is not None:
            settlements = self._without_returns(settlements, self._returns)
        if self._is_holding:
            held = ledger.held
            ledger.hold(settlements)
            self.unproven += ledger.held - held
            self._plan_commit()
            return
        unsettled = len(ledger)
        frames = ledger.settle(settlements)
        self.unproven += unsettled - len(ledger)
        self._write(frames)

    def _without_returns(
        self, settlements: Sequence[Settlement], returns: dict[int, None]
    ) -> Sequence[Settlement]:
        """Keep the returns for `give_back`: what is delivered for an answer comes after them."""
        decided = self.ledger.decide(settlements, returns)
        returns.update({tag: None for tag in decided if decided[tag] is Disposition.RETURN})
        return [each for each in settlements if each.disposition is not Disposition.RETURN]

    def hold(self) -> None:
        """Hold what is settled from now on, because `basic.cancel` is being sent."""
        self._is_holding = True

    def prove(self, settled: int) -> None:
        """Note how many of the unproven settlements the broker has received."""
        self.unproven = max(0, self.unproven - settled)

    async def on_cancelled(self, remaining: int, *, is_proof: bool) -> None:
        """Go on after the answer to `basic.cancel`. Raises SessionLost.

        Args:
            remaining: The number of messages that are held, or may still be settled.
            is_proof: Whether a consumer was cancelled, so that the queue itself has answered.
        """
        if is_proof:
            self.unproven = self.ledger.held
        if not self._commits_prove:
            self._returns = {}
        match drain_mode(remaining, is_rabbitmq=self._is_rabbitmq):
            case DrainMode.DIRECT:
                self._is_holding = False
                self._write(self.ledger.release(joined=True))
            case DrainMode.COMMITTED:
                await self._channel.select()
                self._is_transactional = True
                self._plan_commit()
            case DrainMode.JOINED:
                pass  # `finish` joins them

    async def finish(self) -> None:
        """Write what is held; return when the channel may be closed. Raises SessionLost."""
        while self._committing is not None:
            await asyncio.wait({self._committing})
        if self._timer is not None:
            # Otherwise its commit could still be on its way when the channel is closed.
            self._timer.cancel()
        if self._is_transactional:
            await self._commit()
        else:
            self._write(self.ledger.release(joined=True))
        if not self._is_rabbitmq:
            await asyncio.sleep(self._settled_at + SETTLE_PAUSE - self._loop.time())

    async def give_back(self, untaken: Sequence[int]) -> None:
        """Return the messages that were kept for it, and then others. Raises SessionLost.

        Args:
            untaken: Deliveries that were never handed out, and so aren't in the ledger.
        """
        frames = [Frame(Disposition.RETURN, tag) for tag in untaken]
        if self._returns:
            # Nothing is lost without a proof: what isn't received is returned by the close.
            returns, self._returns = self._returns, {}
            frames[:0] = self.ledger.settle([Settlement(Disposition.RETURN, tuple(returns))])
        self._write(frames)
        if frames and self._is_transactional:
            await self._channel.commit()

    def on_channel_closed(self) -> None:
        """Take note of `channel.close-ok`."""
        self.unproven = self.ledger.held

    def _write(self, frames: Sequence[Frame]) -> None:
        if frames:
            if not self._tap.write(pack_settlements(self._channel.number, frames)):
                raise SessionLost("the connection was closed")
            self._settled_at = self._loop.time()

    # -- transactions -----------------------------------------------------------------------------

    def _plan_commit(self) -> None:
        """Commit what is held as soon as the budget allows."""
        is_planned = self._timer is not None or self._committing is not None
        if not self._is_transactional or is_planned or not self.ledger.held:
            return
        commit_at = self._budget.commit_at(self.ledger.held_kinds)
        if commit_at is not None:
            # By a timer even if it is due: results that come together share a commit.
            self._timer = self._loop.call_at(max(commit_at, self._loop.time()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        # Another disposition may have come meanwhile, for which the budget is too small.
        if self._budget.commit_at(self.ledger.held_kinds) is not None:
            # In a task of its own: cancelling a pending tx.commit would close the channel.
            self._committing = self._loop.create_task(self._commit())
            self._committing.add_done_callback(self._on_commit)

    def _on_commit(self, task: asyncio.Task[None]) -> None:
        consume_exception(task)  # only a lost session fails it, and that is noticed elsewhere
        self._committing = None
        self._plan_commit()

    async def _commit(self) -> None:
        held = self.ledger.held
        if held:
            self._budget.spend(self.ledger.held_kinds, self._loop.time())
            # Singles, because they can be sorted: the broker makes one command of those of one
            # disposition that follow each other.
            self._write(self.ledger.release(joined=False))
            await self._channel.commit()
            if self._commits_prove:
                self.prove(held)
