"""How are publications sent with nothing but the client library's own calls?

Several at a time, each with its confirm awaited. The library tells a returned message by its
`message_id` only: of two in flight with the same one, it takes a lost one for stored, and one
without is not told at all. So returns are taken out by the tap and looked up in our books, as on
the fast wire. Where no tap is, no two with the same `message_id` are in flight at once, and one
that has none gets one, in a copy too.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from aiormq.exceptions import DeliveryError
from aiormq.exceptions import PublishError as ReturnedError
from pamqp.commands import Basic

from aio_pika_batch.adapters.aio_pika.client_errors import said
from aio_pika_batch.adapters.aio_pika.confirms import Call, Entry
from aio_pika_batch.adapters.aio_pika.events import Cut
from aio_pika_batch.adapters.aio_pika.properties import decode, encode
from aio_pika_batch.adapters.aio_pika.publisher import AioPikaPublisher
from aio_pika_batch.adapters.aio_pika.tables import encode_text
from aio_pika_batch.adapters.aio_pika.translate import describe, translated
from aio_pika_batch.core.publication import Copy, Outcome
from aio_pika_batch.errors import BrokerUnavailable, PublishError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.abc import AbstractChannel

    from aio_pika_batch.core.publication import Outgoing

_log = logging.getLogger("aio_pika_batch.publisher")

AT_ONCE = 200
"""Publications that one call has in flight."""

BYTES_AT_ONCE = 1 << 20
"""Of their bodies: the library writes each one into memory once more."""


class RawProperties(Basic.Properties):
    """A property list that is written as it stands.

    The library asks a `Basic.Properties` for its bytes (`marshal`), and for its `message_id`.
    """

    def __init__(self, raw: bytes, message_id: str | None = None) -> None:
        super().__init__(message_id=message_id)
        self.raw = raw

    def marshal(self) -> bytes:
        """The property list, as it goes on the wire."""
        return self.raw


class PlainPublisher(AioPikaPublisher):
    """Implements :class:`~aio_pika_batch.transport.Publisher` over `basic_publish`."""

    def _attach(self, channel: AbstractChannel) -> None:
        self._turn = asyncio.Lock()
        if self._link.tap is not None:
            self._link.tap.returns(channel.number, self._heard)
        elif self._link.untapped is not None:
            self._link.untapped.watch(channel, self._heard)

    def _pack(self, publication: Outgoing) -> tuple[bytes, bytes] | None:
        packed = super()._pack(publication)
        why = _unspeakable(publication.exchange, publication.routing_key)
        if why is None:
            return packed
        text = f"the client library refuses exchange {publication.exchange!r} or its key: {why}"
        if not isinstance(publication, Copy):
            raise PublishError(text)
        _log.warning("%s: not published", text)
        return None

    def _properties(self, publication: Outgoing) -> bytes:
        raw = super()._properties(publication)
        if self._link.tap is not None:
            return raw
        values = decode(raw)
        if values.message_id:
            return raw
        return encode(replace(values, message_id=uuid.uuid4().hex))

    async def _write(
        self,
        call: Call,
        publications: Sequence[Outgoing],
        packed: Sequence[tuple[bytes, bytes] | None],
    ) -> None:
        group: list[tuple[Outgoing, Entry, str | None]] = []
        names: set[str | None] = set()
        size = 0
        for index, (publication, pack) in enumerate(zip(publications, packed, strict=True)):
            if pack is None:
                call.settle(index, Outcome.REFUSED)
                continue
            properties = pack[1]
            name = None if self._link.tap is not None else decode(properties).message_id
            route = (encode_text(publication.exchange), encode_text(publication.routing_key))
            body = bytes(publication.body)
            if len(group) == AT_ONCE or size > BYTES_AT_ONCE or (name and name in names):
                await self._send(group)
                group, names, size = [], set(), 0
            names.add(name)
            size += len(body)
            group.append((publication, Entry(call, index, route, properties, body), name))
        await self._send(group)

    async def _send(self, group: Sequence[tuple[Outgoing, Entry, str | None]]) -> None:
        if self._link.tap is not None:
            await asyncio.gather(*(self._publish(*each) for each in group))
            return
        async with self._turn:
            await asyncio.gather(*(self._publish(*each) for each in group))

    async def _publish(self, publication: Outgoing, entry: Entry, name: str | None) -> None:
        channel = self._channel
        if not self._is_open or channel is None:
            entry.call.settle(entry.index, Outcome.UNKNOWN)
            return
        number = self._books.enter([entry])
        outcome = Outcome.UNKNOWN
        try:
            with translated(lambda error: BrokerUnavailable(describe(error))):
                outcome = await _ask(channel, publication, entry, name)
            self._heard_at = self._loop.time()
        except BrokerUnavailable as error:
            if self._is_open:
                self._heard(said(error) or Cut(str(error)))
        finally:
            self._books.close(number, outcome)


async def _ask(
    channel: AbstractChannel, publication: Outgoing, entry: Entry, name: str | None
) -> Outcome:
    """Publish one, and wait for the broker's word. Raises what the library raises."""
    try:
        answer = await channel.basic_publish(
            entry.body,
            exchange=publication.exchange,
            routing_key=publication.routing_key,
            properties=RawProperties(entry.properties, name),
            mandatory=publication.mandatory,
        )
    except ReturnedError:
        return Outcome.RETURNED
    except DeliveryError:
        return Outcome.REFUSED
    return Outcome.CONFIRMED if isinstance(answer, Basic.Ack) else Outcome.UNKNOWN


@lru_cache(maxsize=512)  # a program publishes to few routes, again and again
def _unspeakable(exchange: str, routing_key: str) -> str | None:
    """Why the client library would not send to this route; None if it would."""
    try:
        Basic.Publish(exchange=exchange, routing_key=routing_key).marshal()
    except (TypeError, ValueError) as error:
        return str(error)
    return None
