"""Publishes with publisher confirms on the broker in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from aio_pika_batch.adapters.memory.channel import (
    Channel,
    ChannelIsClosed,
    CloseFrame,
    ConfirmFrame,
    Connection,
    ReturnFrame,
)
from aio_pika_batch.adapters.memory.refusals import Refusal
from aio_pika_batch.adapters.memory.stored_message import CheckedPublication, check_publication
from aio_pika_batch.core.publication import Copy, Outcome, Outgoing
from aio_pika_batch.errors import SessionClosed


class _PendingPublish:
    """One call of `publish`: its outcomes so far, and the publications that wait for a confirm."""

    def __init__(self, size: int) -> None:
        # Unknown until the broker answers, so a timeout is not a special case.
        self.outcomes = [Outcome.UNKNOWN] * size
        self.waiting: dict[int, int] = {}
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set_outcome(self, number: int, outcome: Outcome) -> None:
        """Set the outcome of one publication."""
        self.outcomes[self.waiting.pop(number)] = outcome
        self.finish_if_complete()

    def finish_if_complete(self) -> None:
        """Wake the caller if no publication is waiting any more."""
        if not self.waiting and not self.complete.done():
            self.complete.set_result(None)


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
    """

    def __init__(self, connection: Connection, *, publish_timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self.channel: Channel = connection.channel(self._on_frame)
        self._publish_timeout = publish_timeout
        self._calls: dict[int, _PendingPublish] = {}
        self._returned: set[int] = set()
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
        """Publish, and return what became of each publication.

        Raises:
            SessionClosed: The publisher's context was left before.
            TypeError: A value is of a type that AMQP does not have; nothing was sent.
            ValueError: A value is out of the range that AMQP allows; nothing was sent.
        """
        if self._has_ended:
            raise SessionClosed("the publisher is closed: its context was left before")
        checked = [(self._check(each), each.mandatory) for each in publications]
        call = _PendingPublish(len(checked))
        try:
            self._send(call, checked)
            async with asyncio.timeout(self._publish_timeout):
                await call.complete
        except TimeoutError:
            pass
        finally:
            # Also after a cancellation: a late confirm finds no call.
            for number in call.waiting:
                del self._calls[number]
        return call.outcomes

    def _check(self, outgoing: Outgoing) -> CheckedPublication:
        properties = outgoing.properties
        if isinstance(outgoing, Copy) and properties.user_id != self._connection.user:
            # The broker refuses another user's name, which the original may well have.
            properties = replace(properties, user_id=None)
        return check_publication(outgoing.exchange, outgoing.routing_key, outgoing.body, properties)

    def _send(
        self, call: _PendingPublish, publications: Sequence[tuple[CheckedPublication, bool]]
    ) -> None:
        for index, (publication, mandatory) in enumerate(publications):
            try:
                number = self.channel.publish(publication, mandatory=mandatory)
            except Refusal:
                # The channel is closed now: those behind it are not sent and stay unknown.
                call.outcomes[index] = Outcome.REFUSED
                break
            except ChannelIsClosed:
                break
            call.waiting[number] = index
            self._calls[number] = call
        # If nothing was sent, no frame will complete the call. Not at once: other tasks run first,
        # as they do while a real broker answers.
        self._loop.call_soon(call.finish_if_complete)

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
                case ReturnFrame(number):
                    self._returned.add(number)
                case ConfirmFrame(number, accepted):
                    self._on_confirm(number, accepted=accepted)
                case CloseFrame():
                    for number, call in list(self._calls.items()):
                        call.set_outcome(number, Outcome.UNKNOWN)
                        del self._calls[number]

    def _on_confirm(self, number: int, *, accepted: bool) -> None:
        returned = number in self._returned
        self._returned.discard(number)
        call = self._calls.pop(number, None)
        if call is not None:
            outcome = Outcome.CONFIRMED if accepted else Outcome.REFUSED
            call.set_outcome(number, Outcome.RETURNED if returned else outcome)
