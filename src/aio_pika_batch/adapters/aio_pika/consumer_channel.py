"""The channel that a session consumes and settles on. aiormq opens, cancels and closes it.

On the fast wire, the frame tap takes the deliveries out before aiormq sees them. On the plain wire
(`wire="plain"`), aiormq carries them and calls back for each. Its callback only emits an event:
handlers run in tasks of ours, which a lost connection does not cancel. On both wires, settlements
are packed frames that the tap writes.

Law: what was delivered before the broker's answer to `cancel` was emitted when it returns.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aio_pika_batch.adapters.aio_pika.client_errors import consume_exception, lost_on_error
from aio_pika_batch.adapters.aio_pika.connection import (
    BasicConsume,
    OpenConnection,
    QueueDeclare,
    starting,
)
from aio_pika_batch.adapters.aio_pika.events import Deliveries
from aio_pika_batch.adapters.aio_pika.frame_fastpath import pack_settlements
from aio_pika_batch.adapters.aio_pika.header_guard import HeaderGuard
from aio_pika_batch.adapters.aio_pika.properties import (
    decode,
    decode_headers,
    decode_message_ids,
    decode_route,
)
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.settlement import (
    CommandBudget,
    Disposition,
    DrainMode,
    Frame,
    Ledger,
    Settlement,
    drain_mode,
)
from aio_pika_batch.core.topology import Version, parse_version
from aio_pika_batch.errors import SessionLost
from aio_pika_batch.transport import resumed_consumer_tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from aio_pika_batch.adapters.aio_pika.frame_tap import Listener
    from aio_pika_batch.transport import Subscription

STREAM_OFFSET = "x-stream-offset"
"""An argument of a stream's consumer, and a header of its messages."""

ARGUMENTS_CHECKED_SINCE: Version = (3, 10)
"""The first RabbitMQ that refuses arguments of consumers that a queue's type doesn't have."""

SETTLE_PAUSE = 0.2
"""Seconds between the last settlement and the close, on brokers that don't call themselves
RabbitMQ. It is unknown what their answers prove."""

LEADER_TIMEOUT = 0.2
"""Seconds in which the leader of a quorum queue answers a passive declare. Without it RabbitMQ
answers after 0.25 s, as if there were no consumers."""

QUESTIONS = 2  # on a busy machine, a leader may need as long once

_TURNS = 4
"""Turns of the event loop after cancel-ok on the plain wire. aiormq has started a task for each
delivery before it handles the answer, so one would do."""


@dataclass(frozen=True, slots=True)
class RawSource:
    """What the messages of one session share: :class:`~aio_pika_batch.core.message.Source`."""

    queue: str
    consumer_tag: str
    retry_count_header: str

    decode_properties = staticmethod(decode)
    decode_headers = staticmethod(decode_headers)
    decode_message_ids = staticmethod(decode_message_ids)
    decode_route = staticmethod(decode_route)

    def now(self) -> float:
        """Return seconds since the epoch."""
        return time.time()


class ConsumerChannel:
    """One channel with one consumer.

    Attributes:
        number: The channel's number; 0 before it is open.
    """

    def __init__(
        self, connection: OpenConnection, subscription: Subscription, listener: Listener
    ) -> None:
        self.number = 0
        self._connection = connection
        self._subscription = subscription
        self._listener = listener
        self._channel: Channel  # opened by `consume`
        self._consumer_tag = ""
        self._pauses = 0

    @property
    def is_consuming(self) -> bool:
        """Whether it has a consumer, which `cancel` would cancel."""
        return bool(self._consumer_tag)

    @property
    def version(self) -> Version:
        """The version of RabbitMQ; empty for other brokers."""
        return parse_version(*self._connection.product) or ()

    async def consume(self) -> None:
        """Open the channel and start the consumer. Raises TopologyError or BrokerUnavailable."""
        subject = f"consuming from queue {self._subscription.queue!r}"
        with starting(self._connection, subject, "a consumer was started"):
            self._channel = await self._connection.channel()
            self.number = self._channel.number
            await self._start(self._subscription)

    async def resume(self, prefetch: int) -> None:
        """Start a consumer again after `cancel`, with a new tag. Raises SessionLost."""
        if self._consumer_tag:
            return
        first = self._subscription
        self._pauses += 1
        tag = resumed_consumer_tag(first.consumer_tag, self._pauses)
        with lost_on_error("cannot resume the deliveries"):
            await self._start(replace(first, consumer_tag=tag, prefetch=prefetch))

    async def _start(self, subscription: Subscription) -> None:
        self._consumer_tag = subscription.consumer_tag
        source = RawSource(
            subscription.queue, subscription.consumer_tag, subscription.retry_count_header
        )
        # Tap before the consumer exists, so that no delivery can come earlier.
        if self._connection.is_fast:
            self._connection.tap.listen(self._listener).tap_consumer(self.number, source)
            on_message = _unexpected
        else:
            on_message = self._guarded(source)
        # Set prefetch first: it applies to consumers that start after it.
        await self._channel.basic_qos(prefetch_count=subscription.prefetch)
        # What `Channel.basic_consume` does, for every name that the broker accepts.
        self._channel.consumers[subscription.consumer_tag] = on_message
        await self._channel.rpc(
            BasicConsume(
                queue=subscription.queue,
                consumer_tag=subscription.consumer_tag,
                exclusive=subscription.exclusive,
                arguments=self._arguments(subscription),
            )
        )

    def _arguments(self, subscription: Subscription) -> dict[str, Any]:
        arguments = dict[str, Any](subscription.arguments)
        # Changes nothing, except that a stream refuses the consumer. If it is asked for an offset,
        # its first message tells.
        if self.version >= ARGUMENTS_CHECKED_SINCE and STREAM_OFFSET not in arguments:
            arguments.setdefault("x-priority", 0)
        return arguments

    def _guarded(self, source: RawSource) -> Any:  # noqa: ANN401  -- a callback
        guard = HeaderGuard()
        self._connection.tap.listen(self._listener).guard(self.number, guard)

        async def on_message(message: DeliveredMessage) -> None:
            tag = message.delivery_tag or 0
            redelivered = bool(getattr(message.delivery, "redelivered", False))
            delivered = Message(source, tag, redelivered, message.body, *guard.take(tag))
            self._listener(Deliveries([delivered]))

        return on_message

    async def cancel(self) -> None:
        """Cancel the consumer, and wait for the broker's answer. Raises SessionLost."""
        if not self._consumer_tag:
            return
        with lost_on_error("basic.cancel failed"):
            await self._channel.basic_cancel(self._consumer_tag)
        self._consumer_tag = ""
        if not self._connection.is_fast:
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    async def has_leader(self) -> bool:
        """Return whether the queue's leader answers questions. Raises SessionLost."""
        loop = asyncio.get_running_loop()
        question = QueueDeclare(queue=self._subscription.queue, passive=True)
        for _ in range(QUESTIONS):
            asked_at = loop.time()
            with lost_on_error("queue.declare failed"):
                answer = await self._channel.rpc(question)
            if answer.consumer_count or loop.time() - asked_at < LEADER_TIMEOUT:
                return True
        return False

    def settle(self, frames: Sequence[Frame]) -> bool:
        """Write frames at once; return whether the channel is still open."""
        return self._connection.tap.write(pack_settlements(self.number, frames))

    async def select(self) -> None:
        """Begin to settle in transactions. Raises SessionLost."""
        with lost_on_error("tx.select failed"):
            await self._channel.tx_select()

    async def commit(self) -> None:
        """Commit what was settled since the last commit. Raises SessionLost."""
        with lost_on_error("tx.commit failed"):
            await self._channel.tx_commit()

    async def close(self) -> None:
        """Close the channel. Raises what aiormq raises."""
        if self._connection.tap.end is None:
            await self._channel.close()


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

    def __init__(self, channel: ConsumerChannel, *, is_rabbitmq: bool, commits_prove: bool) -> None:
        self.ledger = Ledger()
        self.unproven = 0
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
            if not self._channel.settle(frames):
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


async def _unexpected(message: DeliveredMessage) -> None:
    raise AssertionError(f"{message!r} was delivered past the tap")
