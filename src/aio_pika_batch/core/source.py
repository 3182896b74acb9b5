"""What do messages share that come decoded?

For transports whose client library, or whose broker, has decoded the properties already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aio_pika_batch.core.message import Headers, Properties


@dataclass(frozen=True, slots=True)
class DecodedSource:
    """A :class:`~aio_pika_batch.core.message.Source` that has nothing to decode.

    Its messages are made with a route that is a pair, and with `Properties`.

    Attributes:
        wall_clock: Seconds since the epoch, such as `time.time`; for `Message.age`.
    """

    queue: str
    consumer_tag: str
    retry_count_header: str
    wall_clock: Callable[[], float]

    def decode_properties(self, raw: bytes, /) -> Properties:
        """Never called: messages come decoded."""
        raise NotImplementedError("a message of a DecodedSource was made with raw properties")

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        """Never called either."""
        raise NotImplementedError("a message of a DecodedSource was made with raw properties")

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        """Never called either."""
        raise NotImplementedError("a message of a DecodedSource was made with a raw route")

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.wall_clock()
