"""How are publications sent past the client library? Packed, many in one write.

Laws:

- Nothing is written on a channel that the broker has closed.
- A publication is entered into the books in the moment in which it is written, so that its number
  is the channel's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.confirms import Call, Entry, Route
from aio_pika_batch.adapters.aio_pika.frame_writer import pack_content
from aio_pika_batch.adapters.aio_pika.publisher import AioPikaPublisher, unknown
from aio_pika_batch.adapters.aio_pika.tables import encode_text
from aio_pika_batch.adapters.aio_pika.translate import describe, translated
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.errors import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.abc import AbstractChannel

    from aio_pika_batch.adapters.aio_pika.connection import Link
    from aio_pika_batch.adapters.aio_pika.tap import Tap
    from aio_pika_batch.core.publication import Outgoing

WRITE_SIZE = 1 << 20
"""Bytes that are packed at a time: a thousand large messages need not stand in memory twice."""


@lru_cache(maxsize=512)  # a program publishes to few routes, again and again
def _route(exchange: str, routing_key: str) -> Route:
    return encode_text(exchange), encode_text(routing_key)


class FastPublisher(AioPikaPublisher):
    """Implements :class:`~aio_pika_batch.transport.Publisher` over the frame tap."""

    def __init__(self, link: Link, tap: Tap, timeout: float) -> None:
        super().__init__(link, timeout)
        self._tap = tap

    def _attach(self, channel: AbstractChannel) -> None:
        self._tap.publish(channel.number, self._heard)

    async def _write(
        self,
        call: Call,
        publications: Sequence[Outgoing],
        packed: Sequence[tuple[bytes, bytes] | None],
    ) -> None:
        parts: list[bytes] = []
        entries: list[Entry] = []
        size = 0
        number, frame_max = self._number, self._frame_max
        for index, (publication, pack) in enumerate(zip(publications, packed, strict=True)):
            if pack is None:
                call.settle(index, Outcome.REFUSED)
                continue
            method, properties = pack
            body = publication.body
            parts.append(method)
            parts += pack_content(number, properties, body, frame_max)
            route = _route(publication.exchange, publication.routing_key)
            entries.append(Entry(call, index, route, properties, body))
            size += len(body)
            if size >= WRITE_SIZE:
                await self._send(parts, entries)
                parts, entries, size = [], [], 0
        if entries:
            await self._send(parts, entries)

    async def _send(self, parts: list[bytes], entries: list[Entry]) -> None:
        if not self._is_open or not self._tap.write(b"".join(parts)):
            self._is_open = False
            for entry in entries:
                entry.call.settle(entry.index, Outcome.UNKNOWN)
            return
        # In the same moment, so that the numbers are the channel's, whoever else publishes.
        self._books.enter(entries)
        if self._tap.is_clogged:
            try:
                with translated(lambda error: BrokerUnavailable(describe(error))):
                    await self._tap.drain()
            except BrokerUnavailable:
                self._end(unknown)
