"""What becomes of each publication? Confirmed publishing on the broker in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.memory.channels import Channel, Gone
from aio_pika_batch.adapters.memory.frames import Closed, Confirmed, Returned
from aio_pika_batch.adapters.memory.refusals import Refusal
from aio_pika_batch.adapters.memory.stored_message import Letter, letter
from aio_pika_batch.core.publication import Copy, Outcome, Outgoing
from aio_pika_batch.errors import SessionClosed

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.connections import Connection


class _Call:
    """One call of `publish`: its outcomes so far, and whether they are complete."""

    def __init__(self, size: int) -> None:
        # Nothing heard is not known.
        self.outcomes = [Outcome.UNKNOWN] * size
        self.waiting: dict[int, int] = {}
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def decide(self, number: int, outcome: Outcome) -> None:
        """The broker's word on a publication."""
        self.outcomes[self.waiting.pop(number)] = outcome
        self.finish_if_complete()

    def finish_if_complete(self) -> None:
        """Wake the caller, if nothing is open any more."""
        if not self.waiting and not self.complete.done():
            self.complete.set_result(None)


class MemoryPublisher:
    """A publisher. Publications are validated before the first of them is sent.

    A refusal that closes the channel (a missing exchange, another's `user_id`) ends the publisher,
    as on the wire: the culprit is refused, and of those behind it nothing is known.

    Args:
        connection: Where it opens a channel.
        publish_timeout: Seconds to wait for confirmations.

    Attributes:
        channel: Its channel.
        refusal: What the broker has closed the channel over.
    """

    def __init__(self, connection: Connection, *, publish_timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self.channel: Channel = connection.channel(self._notified)
        self._publish_timeout = publish_timeout
        self._calls: dict[int, _Call] = {}
        self._returned: set[int] = set()
        self._hearing = False
        self._ended = False
        self.refusal: Refusal | None = None

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed."""
        return not self._ended and self.channel.closed is None

    def end(self) -> None:
        """End it from this side; nothing more is heard of what is open."""
        self._ended = True
        self._connection.close()

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish, and wait for the broker's word on each.

        Raises:
            SessionClosed: The publisher was left before.
            TypeError: A value is of a type that AMQP does not have; nothing was sent.
            ValueError: A value is out of the range that AMQP allows; nothing was sent.
        """
        if self._ended:
            raise SessionClosed("the publisher is closed; it was left before")
        letters = [(self._letter(each), each.mandatory) for each in publications]
        call = _Call(len(letters))
        try:
            self._send(call, letters)
            async with asyncio.timeout(self._publish_timeout):
                await call.complete
        except TimeoutError:
            pass
        finally:
            for number in call.waiting:
                del self._calls[number]
        return call.outcomes

    def _send(self, call: _Call, letters: Sequence[tuple[Letter, bool]]) -> None:
        for at, (each, mandatory) in enumerate(letters):
            try:
                number = self.channel.publish(each, mandatory=mandatory)
            except Refusal as refusal:
                self.refusal = refusal
                call.outcomes[at] = Outcome.REFUSED
                break
            except Gone:
                break
            call.waiting[number] = at
            self._calls[number] = call
        # If nothing was sent there is nothing to hear; others have a turn first even so.
        self._loop.call_soon(call.finish_if_complete)

    def _letter(self, outgoing: Outgoing) -> Letter:
        properties = outgoing.properties
        if isinstance(outgoing, Copy) and properties.user_id != self._connection.user:
            properties = replace(properties, user_id=None)
        return letter(outgoing.exchange, outgoing.routing_key, outgoing.body, properties)

    def _notified(self) -> None:
        if not self._hearing and not self._loop.is_closed():
            self._hearing = True
            self._loop.call_soon(self._hear)

    def _hear(self) -> None:
        """Take in what the broker has sent. What nobody waits for any more is not listened to."""
        self._hearing = False
        for incoming in self.channel.take():
            match incoming:
                case Returned(number):
                    self._returned.add(number)
                case Confirmed(number, accepted):
                    self._decide(number, accepted=accepted)
                case Closed():
                    for number, call in list(self._calls.items()):
                        call.decide(number, Outcome.UNKNOWN)
                        del self._calls[number]

    def _decide(self, number: int, *, accepted: bool) -> None:
        returned = number in self._returned
        self._returned.discard(number)
        call = self._calls.pop(number, None)
        if call is not None:
            outcome = Outcome.CONFIRMED if accepted else Outcome.REFUSED
            call.decide(number, Outcome.RETURNED if returned else outcome)
