"""`make_message` makes a message as a session would deliver it, without a broker.

The queue and the header that counts retries are those of the consumer that gets the message, unless
the test sets them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aio_pika_batch.core.message import Headers, Message, Properties
from aio_pika_batch.core.publication import Publication

_AS_QUEUED = b""
"""The raw route of a message that was published directly to its queue, whose name is not known."""


# Not frozen: the message exists before its session is known.
@dataclass(slots=True)
class MadeSource:
    """The source of one message that a test has made; None stands for a value not known yet."""

    given_queue: str | None
    given_header: str | None
    consumer_tag: str = "test"

    @property
    def queue(self) -> str:
        """The queue from which the message comes."""
        return "test" if self.given_queue is None else self.given_queue

    @property
    def retry_count_header(self) -> str:
        """The header that counts its retries."""
        return "x-retry-count" if self.given_header is None else self.given_header

    def join(self, queue: str, retry_count_header: str) -> None:
        """Set the values that are not known yet."""
        if self.given_queue is None:
            self.given_queue = queue
        if self.given_header is None:
            self.given_header = retry_count_header

    def decode_properties(self, raw: bytes, /) -> Properties:
        """Never called: the properties are decoded."""
        raise NotImplementedError(raw)

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        """Never called: the headers are decoded."""
        raise NotImplementedError(raw)

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        """Return the route to the queue, which is now known."""
        del raw
        return "", self.queue

    def now(self) -> float:
        """Return the current time in seconds since the epoch."""
        return time.time()


def make_message(
    body: bytes,
    *,
    headers: Headers | None = None,
    exchange: str = "",
    routing_key: str | None = None,
    redelivered: bool = False,
    delivery_tag: int = 1,
    queue: str | None = None,
    retry_count_header: str | None = None,
    **properties: Any,  # noqa: ANN401  -- those of Publication, each with its own type
) -> Message:
    """Make a message as a handler gets it.

    Args:
        routing_key: None: the queue's name with the default exchange, otherwise empty.
        queue: None: that of the consumer given to :func:`~aio_pika_batch.testing.process`.
        retry_count_header: None: the consumer's.
        **properties: Other properties of :class:`~aio_pika_batch.Publication`, e.g. `message_id`.
    """
    publication = Publication(
        body, exchange=exchange, routing_key=routing_key or "", headers=headers, **properties
    )
    as_queued = routing_key is None and not exchange
    return Message(
        MadeSource(queue, retry_count_header),
        delivery_tag,
        redelivered,
        bytes(body),
        _AS_QUEUED if as_queued else (exchange, publication.routing_key),
        publication.properties,
    )


def delivered(
    given: Iterable[bytes | Message], *, queue: str, retry_count_header: str
) -> list[Message]:
    """Make one session's deliveries of the given messages, with delivery tags from 1.

    Raises:
        ValueError: A message occurs twice.
    """
    messages: list[Message] = []
    for tag, each in enumerate(given, 1):
        message = each if isinstance(each, Message) else make_message(each)
        # By identity: two equal messages are allowed, as on a broker.
        if any(message is other for other in messages):
            raise ValueError(f"{message!r} occurs twice; pass each message once")
        message.delivery_tag = tag
        source = message._source  # noqa: SLF001  -- the library's own
        if isinstance(source, MadeSource):
            source.join(queue, retry_count_header)
        messages.append(message)
    return messages
