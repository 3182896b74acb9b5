"""Delivers messages to a worker, and settles them on the server.

All sessions of a queue share one durable consumer. Each pulls for itself, at most as many messages
as its prefetch allows. A pull is open for a moment, and the server says when it has ended. Then no
message is in flight any more, and `cancel` returns. The server confirms settlements. While the
session lives, it tells the server regularly to keep its unsettled messages. If it dies, the server
delivers them to another session after `ack_wait` seconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import assert_never

from nats.aio.msg import Msg

from aio_pika_batch.transport import (
    DELIVERY_COUNT,
    DecodedSource,
    Disposition,
    Ledger,
    Message,
    Native,
    SessionClosed,
    SessionLost,
    Settlement,
    Subscription,
)
from aio_pika_batch_nats.headers import decoded
from aio_pika_batch_nats.link import NO_RESPONDERS, Link
from aio_pika_batch_nats.names import route_of, token
from aio_pika_batch_nats.native import NatsChannel

CONSUMER = "aio-pika-batch"
"""The durable consumer that all sessions of a queue share."""

_PULL = 0.5
"""Seconds for which a pull is open; `cancel` waits for so long at most."""

_NO_LIMIT = 1000
"""Number of messages that a pull asks for if prefetch is unlimited."""

_WORKING = b"+WPI"
_EXPIRED = {"404", "408"}
_HEARTBEAT = "100"


class NatsSession:
    """A session. It is iterated once, by one task."""

    def __init__(self, link: Link, subscription: Subscription, ack_wait: float) -> None:
        self._link = link
        self._queue = subscription.queue
        self._prefetch = subscription.prefetch
        self._ack_wait = ack_wait
        self._source = DecodedSource(
            subscription.queue,
            subscription.consumer_tag,
            subscription.retry_count_header,
            time.time,
        )
        self._ledger = Ledger()
        self._unsettled: dict[int, str] = {}
        self._arrived: list[Message] = []
        self._last_tag = 0
        self._pulled = 0
        self._settling = 0
        self._heard = 0.0
        self._cancelled = self._ended = False
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._inbox = ""
        self._keeping: asyncio.Task[None] | None = None
        self._native: Native | None = None

    async def open(self) -> None:
        """Start receiving."""
        self._link.watchers.append(self._news.set)
        self._inbox = self._link.client.new_inbox()
        await self._link.client.subscribe(
            self._inbox, cb=self._received, pending_msgs_limit=0, pending_bytes_limit=0
        )
        self._keeping = self._loop.create_task(self._keep())
        await self._pull()

    async def close(self) -> None:
        """Return all unsettled messages to the queue."""
        self._ended = self._cancelled = True
        self._news.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._link.timeout):
                await self._until(lambda: self._is_dry)
        answers = await self._tell(Disposition.RETURN, list(self._unsettled.values()))
        await self._link.answers(answers)
        if self._keeping is not None:
            self._keeping.cancel()

    # -- the port --

    def __aiter__(self) -> NatsSession:
        return self

    async def __anext__(self) -> Sequence[Message]:
        await self._until(lambda: bool(self._arrived) or self._ended or self._is_dry)
        self._check()
        if not self._arrived:
            raise StopAsyncIteration
        chunk, self._arrived = self._arrived, []
        self._ledger.deliver([message.delivery_tag for message in chunk])
        return chunk

    async def cancel(self) -> None:
        """Stop pulling messages, and wait until none is in flight."""
        self._check()
        self._cancelled = True
        self._news.set()
        await self._until(lambda: self._ended or self._is_dry)
        self._check()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Settle messages, and wait for the server's confirmation."""
        self._check()
        settlements = list(settlements)
        self._ledger.settle(settlements)
        subjects = {
            settlement: [self._unsettled.pop(tag) for tag in settlement.tags]
            for settlement in settlements
        }
        settling = sum(map(len, subjects.values()))
        self._settling += settling
        try:
            asked = []
            for settlement, those in subjects.items():
                asked.extend(await self._tell(settlement.disposition, those))
            for answer in await self._link.answers(asked):
                if answer is None:
                    self._link.lose("the server has not confirmed a settlement")
                elif answer.headers and answer.headers.get("Status") == NO_RESPONDERS:
                    self._link.lose("its consumer was deleted")
        finally:
            self._settling -= settling
        self._check()
        await self._pull()

    async def native(self) -> Native:
        """Return JetStream's own context, and the calls that handlers know from aio-pika."""
        self._check()
        if self._native is None:
            self._native = Native(NatsChannel(self._link), token(self._queue))
        return self._native

    # -- the server's side --

    @property
    def _is_dry(self) -> bool:
        return self._cancelled and not self._pulled

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not (is_so() or self._link.lost):
            self._news.clear()
            await self._news.wait()

    def _check(self) -> None:
        if self._ended:
            raise SessionClosed("the session is over; it was left before")
        if self._link.lost is not None:
            raise SessionLost(f"the session on queue {self._queue!r} is lost: {self._link.lost}")

    async def _pull(self) -> None:
        """Pull as many messages as prefetch allows, unless a pull is open."""
        if self._cancelled or self._pulled or self._link.lost:
            return
        in_hand = len(self._unsettled) + self._settling
        room = self._prefetch - in_hand if self._prefetch else _NO_LIMIT
        if room > 0:
            self._pulled = room
            self._heard = self._loop.time()
            wanted = {"batch": room, "expires": round(_PULL * 1e9)}
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{token(self._queue)}.{CONSUMER}"
            await self._link.send(subject, json.dumps(wanted).encode(), self._inbox)

    async def _received(self, incoming: Msg) -> None:
        self._heard = self._loop.time()
        if incoming.reply:
            self._pulled = max(0, self._pulled - 1)
            self._arrived.append(self._message(incoming))
        else:
            said = incoming.headers or {}
            status = said.get("Status")
            if status in _EXPIRED:
                self._pulled = max(0, self._pulled - int(said.get("Nats-Pending-Messages", 0)))
            elif status == NO_RESPONDERS:
                self._link.lose("its consumer was deleted")
            elif status != _HEARTBEAT:
                self._link.lose(said.get("Description", f"status {status}"))
        self._news.set()
        await self._pull()

    def _message(self, incoming: Msg) -> Message:
        self._last_tag += 1
        self._unsettled[self._last_tag] = incoming.reply
        properties = decoded(incoming.headers)
        before = incoming.metadata.num_delivered - 1
        if before:
            properties.headers = {**(properties.headers or {}), DELIVERY_COUNT: before}
        route = route_of(incoming.subject)
        return Message(self._source, self._last_tag, before > 0, incoming.data, route, properties)

    async def _tell(
        self, disposition: Disposition, subjects: Sequence[str]
    ) -> list[asyncio.Future[Msg | None]]:
        word = _word(disposition)
        return [await self._link.ask(subject, word) for subject in subjects]

    async def _keep(self) -> None:
        """Keep unsettled messages, and notice a server that has lost a pull."""
        while self._link.lost is None:
            await asyncio.sleep(self._ack_wait / 3)
            for subject in list(self._unsettled.values()):
                await self._link.send(subject, _WORKING)
            if self._pulled and self._loop.time() - self._heard > _PULL + self._ack_wait:
                self._link.lose("the server has not answered a pull")


def _word(disposition: Disposition) -> bytes:
    match disposition:
        case Disposition.ACK:
            return b"+ACK"
        case Disposition.REJECT:
            return b"+TERM"
        case Disposition.REQUEUE | Disposition.RETURN:
            return b"-NAK"
        case never:
            assert_never(never)
