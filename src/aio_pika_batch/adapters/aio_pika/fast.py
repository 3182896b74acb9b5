"""How does a session consume over the frame tap?

The channel is the client library's, so that it opens, cancels and closes it; the deliveries are
taken out from under it, and settlements are written past it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.consumer_channel import ConsumingChannel
from aio_pika_batch.adapters.aio_pika.frame_writer import pack_settlements
from aio_pika_batch.adapters.aio_pika.translate import describe, translated
from aio_pika_batch.errors import SessionLost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from aiormq.abc import AbstractChannel, DeliveredMessage

    from aio_pika_batch.adapters.aio_pika.connection import Link
    from aio_pika_batch.adapters.aio_pika.tap import Tap
    from aio_pika_batch.adapters.aio_pika.wire import Ear
    from aio_pika_batch.core.message import Source
    from aio_pika_batch.core.settlement import Frame


class FastWire(ConsumingChannel):
    """Implements :class:`~aio_pika_batch.adapters.aio_pika.wire.Wire`."""

    def __init__(self, link: Link, tap: Tap, ear: Ear) -> None:
        super().__init__(link, ear)
        self._tap = tap

    async def _listen(
        self, channel: AbstractChannel, source: Source
    ) -> Callable[[DeliveredMessage], Coroutine[Any, Any, None]]:
        self._tap.consume(channel.number, source, self._heard)
        return _untapped

    def settle(self, frames: Sequence[Frame]) -> bool:
        """Send, at once and in this order; False if nothing can be sent any more."""
        return self._tap.write(pack_settlements(self._number, frames))

    async def drained(self) -> None:
        """Wait if too much is waiting to be sent."""
        if self._tap.is_clogged:
            with translated(lambda error: SessionLost(f"the connection broke: {describe(error)}")):
                await self._tap.drain()


async def _untapped(message: DeliveredMessage) -> None:
    raise AssertionError(f"{message!r} came past the tap")
