"""Implements the port's session and publisher on the broker in memory.

A session is one connection with one channel and one consumer, or one session and one link of AMQP
1.0. A publisher is one connection with one channel in confirm mode.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby

from aio_pika_batch.adapters.memory.channel import (
    CancelFrame,
    Channel,
    ChannelIsClosed,
    CloseFrame,
    ConfirmFrame,
    Connection,
    DeliverFrame,
)
from aio_pika_batch.adapters.memory.native import NativeChannel
from aio_pika_batch.adapters.memory.rabbitmq import QueueType, Refusal, translate_refusals
from aio_pika_batch.adapters.memory.stored_message import StoredMessage, check_publication
from aio_pika_batch.adapters.memory.unacked import acks_first
from aio_pika_batch.core.message import DecodedSource, Message
from aio_pika_batch.core.publication import (
    Copy,
    Outcome,
    Outgoing,
    Publication,
    fit,
    property_list_size,
)
from aio_pika_batch.core.settlement import (
    SAFE_COMMANDS,
    CommandBudget,
    Disposition,
    DrainMode,
    Frame,
    Ledger,
    Modification,
    Settlement,
    check_modified_headers,
    drain_mode,
)
from aio_pika_batch.errors import PublishError, SessionClosed, SessionLost, SettlementError
from aio_pika_batch.transport import Native, NativeRetries, Subscription, resumed_consumer_tag


class MemorySession:
    """A session. It is iterated once, by one task."""

    def __init__(
        self,
        connection: Connection,
        subscription: Subscription,
        *,
        publish_timeout: float,
        wall_clock: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._subscription = subscription
        self._publish_timeout = publish_timeout
        self._source = DecodedSource(
            subscription.queue,
            subscription.consumer_tag,
            subscription.retry_count_header,
            wall_clock,
        )
        self._channel: Channel = connection.channel(self._wake_reader)
        self._ledger = Ledger()
        self._arrived: list[Message] = []
        self._is_iterated = False
        self._is_cancelled = False
        self._budget: CommandBudget | None = None
        self._consumer_tag = ""
        self._settled_in_pause = 0
        self._pauses = 0
        self._has_ended = False
        self._lost_reason: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._native: Native | None = None

    def consume(self) -> None:
        """Start the consumer.

        Raises:
            TopologyError: The queue does not exist, or may not be consumed.
        """
        subscription = self._subscription
        with translate_refusals(f"queue {subscription.queue!r}"):
            self._start(subscription.consumer_tag, subscription.prefetch)

    def _start(self, tag: str, prefetch: int) -> None:
        subscription = self._subscription
        # Before the consumer starts: a prefetch count holds for later consumers only.
        self._channel.qos(prefetch)
        self._channel.consume(
            subscription.queue,
            tag,
            exclusive=subscription.exclusive,
            arguments=subscription.arguments,
        )
        self._consumer_tag = tag
        with self._channel.operation() as vhost:
            self._spec = vhost.queue(subscription.queue, self._connection).spec

    def end(self) -> None:
        """Close the connection; a task that waits for messages gets `SessionClosed`."""
        if self._channel.close_reason is None:
            self._finish()
        self._has_ended = True
        self._connection.close()

    def _finish(self) -> None:
        if self._budget is not None:
            self._commit(self._budget)

    # -- the port --

    @property
    def unproven(self) -> int:
        """The number of settled messages that were not sent before the connection was cut."""
        return self._ledger.held

    def __aiter__(self) -> MemorySession:
        if self._is_iterated:
            raise RuntimeError("a session can only be iterated once")
        self._is_iterated = True
        return self

    async def __anext__(self) -> Sequence[Message]:
        # As with a socket: other tasks run first, and what arrived meanwhile is read at once.
        await asyncio.sleep(0)
        while True:
            self._check()
            if self._arrived:
                # Only what was handed out may be settled, not all that has arrived.
                chunk, self._arrived = self._arrived, []
                self._ledger.deliver([message.delivery_tag for message in chunk])
                return chunk
            if self._is_cancelled:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def cancel(self) -> None:
        """Cancel the consumer. Messages that were delivered before are still handed out."""
        self._check()
        if not self._is_cancelled:
            self._cancel()
        await asyncio.sleep(0)
        self._check()

    def _cancel(self) -> None:
        # Only an answer of the queue proves anything. A paused session has no consumer to cancel,
        # so it starts one.
        settled, left = self._settled_in_pause, len(self._ledger) + len(self._arrived)
        if not self._consumer_tag and settled + left > SAFE_COMMANDS:
            self._resume(1)
        self._stop_consumer()
        left = len(self._ledger) + len(self._arrived)
        if drain_mode(left, is_rabbitmq=True) is DrainMode.COMMITTED:
            self._channel.tx_select()
            self._budget = CommandBudget()

    def _stop_consumer(self) -> None:
        self._channel.cancel(self._consumer_tag)
        self._is_cancelled = True
        # The iteration ends, although no message comes.
        self._wake_reader()
        self._check()

    async def pause(self) -> None:
        """Cancel the consumer, and keep its channel."""
        self._check()
        if self._consumer_tag:
            self._channel.cancel(self._consumer_tag)
            self._consumer_tag = ""
            self._settled_in_pause = 0
        await asyncio.sleep(0)
        self._check()

    async def resume(self, prefetch: int) -> None:
        """Start another consumer on the same channel."""
        self._check()
        if not self._consumer_tag and not self._is_cancelled:
            self._resume(prefetch)
        await asyncio.sleep(0)
        self._check()

    def _resume(self, prefetch: int) -> None:
        self._pauses += 1
        tag = resumed_consumer_tag(self._subscription.consumer_tag, self._pauses)
        with suppress(ChannelIsClosed, Refusal):
            self._start(tag, prefetch)

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Send the frames that settle these messages."""
        self._check()
        with suppress(ChannelIsClosed, Refusal):
            self._send(settlements)
        # A frame that the broker refused has ended the session.
        self._check()
        await asyncio.sleep(0)

    def _send(self, settlements: Sequence[Settlement]) -> None:
        if self._budget is None:
            unsettled = len(self._ledger)
            frames: Sequence[Frame] = self._ledger.settle(settlements)
            if self._spec.type is QueueType.CLASSIC:
                # Messages which acks make room for come before those that are requeued with them.
                frames = acks_first(frames, self._channel.unsettled)
            self._channel.settle_all(frames)
            self._settled_in_pause += unsettled - len(self._ledger)
        else:
            self._ledger.hold(settlements)
            commit_at = self._budget.commit_at(self._ledger.held_kinds)
            # Without a timer: what can't be committed at once waits for the next settlement.
            if commit_at is not None and commit_at <= asyncio.get_running_loop().time():
                self._commit(self._budget)

    def _commit(self, budget: CommandBudget) -> None:
        budget.spend(self._ledger.held_kinds, asyncio.get_running_loop().time())
        self._channel.settle_all(self._ledger.release(joined=False))
        self._channel.tx_commit()

    async def settled(self) -> None:
        """Let the queue answer, which proves that it has carried out everything before."""
        self._check()
        with suppress(ChannelIsClosed, Refusal):
            self._await_answer()
        await asyncio.sleep(0)
        self._check()

    def _await_answer(self) -> None:
        self._finish()
        # A real session starts and cancels a consumer. It has no use for the message that may come.
        self._channel.await_answer()

    async def native(self) -> Native:
        """Return objects with aio-pika's calls, on a channel of their own."""
        self._check()
        # A channel of its own: a mistake made on it does not end the session.
        if self._native is None:
            publisher = MemoryPublisher(self._connection, publish_timeout=self._publish_timeout)
            channel = NativeChannel(self._connection, publisher.channel, publisher)
            self._native = Native(channel, await channel.get_queue(self._subscription.queue))
        return self._native

    # -- what the broker sends --

    def _wake_reader(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check(self) -> None:
        """Read what the broker has sent, and raise if the session is over."""
        if self._has_ended:
            raise SessionClosed("the session is over: its context was left before")
        # The first reason is the cause of the others.
        for frame in self._channel.take():
            match frame:
                case DeliverFrame():
                    self._arrived.append(self._message(frame))
                case CancelFrame():
                    self._lost_reason = self._lost_reason or "the broker has cancelled the consumer"
                case CloseFrame(reason):
                    self._lost_reason = self._lost_reason or reason
        if self._lost_reason is not None:
            raise SessionLost(
                f"the session on queue {self._source.queue!r} is lost: {self._lost_reason}"
            )

    def _message(self, frame: DeliverFrame) -> Message:
        if frame.consumer_tag != self._source.consumer_tag:
            self._source = replace(self._source, consumer_tag=frame.consumer_tag)
        return Message(
            self._source,
            frame.tag,
            frame.redelivered,
            frame.body,
            (frame.exchange, frame.routing_key),
            frame.properties,
        )


_PRECISION = 0.05
"""Seconds to which the delay of a modified message is rounded up."""

DELIVERY_TIME = "x-opt-delivery-time"
"""The annotation that delays a modified message; the broker leaves it in the message."""


class MemoryModifyingSession(MemorySession):
    """A session that uses AMQP 1.0, on a quorum queue."""

    @property
    def retries(self) -> NativeRetries:
        """What this version can do with the queue's messages."""
        rules = self._connection.rules
        return NativeRetries(
            delays=rules.delays_modified,
            headers=True,
            dead_letters=self._spec.at_least_once,
            uncounted=rules.counts_failures,
        )

    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        """Send a frame for each of these."""
        self._check()
        for each in modifications:
            check_modified_headers(each.headers)
            if each.until is not None and not self.retries.delays:
                raise SettlementError(
                    f"RabbitMQ {self._connection.rules.version} cannot delay messages"
                )
        modified = [Settlement(Disposition.REQUEUE, each.tags) for each in modifications]
        self._ledger.settle([*modified, *settlements])
        with suppress(ChannelIsClosed, Refusal):
            for each in modifications:
                self._modify(each)
            self._settle_runs(settlements)
        self._check()
        await asyncio.sleep(0)

    def _modify(self, modification: Modification) -> None:
        until = None
        if modification.until is not None:
            moment = modification.until.timestamp()
            delivery_time = {DELIVERY_TIME: math.ceil(moment * 1000)}
            modification = replace(modification, headers={**modification.headers, **delivery_time})
            # The broker's clock is that of the event loop, which may run in virtual time. Rounded
            # up, so that the time that this code takes doesn't count.
            until = math.ceil((moment - self._source.now()) / _PRECISION) * _PRECISION
            with self._channel.operation() as vhost:
                until += vhost.now
        self._channel.modify(modification, until)

    def _cancel(self) -> None:
        self._stop_consumer()

    def _await_answer(self) -> None:
        self._channel.await_answer()

    def _finish(self) -> None:
        self._channel.await_answer()
        self._channel.detach()

    def _send(self, settlements: Sequence[Settlement]) -> None:
        self._ledger.settle(settlements)
        self._settle_runs(settlements)

    def _settle_runs(self, settlements: Sequence[Settlement]) -> None:
        for each in settlements:
            numbered = enumerate(sorted(each.tags))
            for _, run in groupby(numbered, key=lambda pair: pair[1] - pair[0]):
                self._channel.settle_run(each.disposition, [tag for _, tag in run])


class MemoryPublisher:
    """A publisher that checks all publications of a call before it sends the first of them.

    A refusal that closes the channel (a missing exchange, another user's `user_id`) ends the
    publisher, as on a real broker: that publication is refused, and the outcome of those behind it
    is unknown.

    Args:
        connection: The publisher opens a channel on it.
        publish_timeout: Seconds to wait for confirms.

    Attributes:
        channel: Its channel.
        on_late: See `ListeningPublisher`.
    """

    def __init__(self, connection: Connection, *, publish_timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self.channel: Channel = connection.channel(self._on_frame)
        self._publish_timeout = publish_timeout
        # The publications without a confirm, by their number.
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}
        self.on_late: Callable[[Outgoing, Outcome], None] | None = None
        self._is_reading_scheduled = False
        self._has_ended = False

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed."""
        return not self._has_ended and self.channel.close_reason is None

    def end(self) -> None:
        """Close the connection; publications without a confirm stay unknown."""
        self._has_ended = True
        self._connection.close()

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish, and return the outcome of each publication.

        Raises:
            SessionClosed: The publisher's context was left before.
            PublishError: The properties don't fit into a frame; nothing was sent.
            TypeError: A value is of a type that AMQP does not have; nothing was sent.
            ValueError: A value is out of the range that AMQP allows; nothing was sent.
        """
        if self._has_ended:
            raise SessionClosed("the publisher is closed: its context was left before")
        checked = [self._check(each) for each in publications]
        if not checked:
            return []
        answers: list[asyncio.Future[Outcome]] = []
        numbers = []
        for publication, outgoing in zip(checked, publications, strict=True):
            answer = self._loop.create_future()
            answers.append(answer)
            if publication is None:
                answer.set_result(Outcome.UNPUBLISHABLE)
                continue
            try:
                number = self.channel.publish(publication, mandatory=outgoing.mandatory)
            except Refusal:
                # It has closed the channel.
                answer.set_result(Outcome.REFUSED)
            except ChannelIsClosed:
                answer.set_result(Outcome.UNKNOWN)
            else:
                self._waiting[number] = answer
                numbers.append(number)
        try:
            # Also if nothing was sent: other tasks run, as they do while a real broker answers.
            await asyncio.wait(answers, timeout=self._publish_timeout)
        except asyncio.CancelledError:
            self._forget(numbers)
            raise
        outcomes = [each.result() if each.done() else Outcome.UNKNOWN for each in answers]
        self._listen(publications, answers, numbers)
        return outcomes

    def _listen(
        self,
        publications: Sequence[Outgoing],
        answers: Sequence[asyncio.Future[Outcome]],
        numbers: Sequence[int],
    ) -> None:
        if self.on_late is None:
            self._forget(numbers)
            return
        for each, answer in zip(publications, answers, strict=True):
            if not answer.done():
                answer.add_done_callback(partial(_report_late, self.on_late, each))

    def _forget(self, numbers: Sequence[int]) -> None:
        """Ignore late confirms."""
        for number in numbers:
            self._waiting.pop(number, None)

    def _check(self, outgoing: Outgoing) -> StoredMessage | None:
        """Check what a client would encode; None if a copy or a stored publication can't be."""
        limit = self._connection.faults.frame_max
        if isinstance(outgoing, Publication):
            if property_list_size(outgoing.properties) > limit:
                raise PublishError(f"the properties must fit into one frame of {limit}")
            return self._encoded(outgoing)
        fitting: Outgoing | None = outgoing
        if isinstance(outgoing, Copy):
            fitting = fit(outgoing, limit, lambda copy: property_list_size(copy.properties))
        elif property_list_size(outgoing.properties) > limit:
            fitting = None
        try:
            return None if fitting is None else self._encoded(fitting)
        except (TypeError, ValueError):
            return None

    def _encoded(self, outgoing: Outgoing) -> StoredMessage:
        properties = outgoing.properties
        is_own = isinstance(outgoing, Publication)
        if not is_own and properties.user_id != self._connection.user:
            # The broker refuses another user's name, which the original may well have.
            properties = replace(properties, user_id=None)
        return check_publication(outgoing.exchange, outgoing.routing_key, outgoing.body, properties)

    def _on_frame(self) -> None:
        # Called within an operation of the broker, so the frames are read after it. A broker may
        # outlive the loop.
        if not self._is_reading_scheduled and not self._loop.is_closed():
            self._is_reading_scheduled = True
            self._loop.call_soon(self._read_frames)

    def _read_frames(self) -> None:
        self._is_reading_scheduled = False
        for frame in self.channel.take():
            match frame:
                case ConfirmFrame(number, outcome):
                    if (answer := self._waiting.pop(number, None)) is not None:
                        answer.set_result(outcome)
                case CloseFrame():
                    for answer in self._waiting.values():
                        answer.set_result(Outcome.UNKNOWN)
                    self._waiting.clear()


def _report_late(
    on_late: Callable[[Outgoing, Outcome], None],
    publication: Outgoing,
    answer: asyncio.Future[Outcome],
) -> None:
    on_late(publication, answer.result())
