"""Where does a test get a message from, without a broker?

`make_message` makes one as a session would deliver it. What a session would know and a test does
not care about, the queue and the header that counts retries, is filled in by whoever is given it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aio_pika_batch.core.message import Headers, Message, Properties
from aio_pika_batch.core.publication import Publication

_AS_QUEUED = b""
"""The route of a message that was published straight to its queue, whichever that is."""


# Not frozen: a message is made before it is known what session it is going to be of.
@dataclass(slots=True)
class MadeSource:
    """The session of one message that a test has made. What is None is not known yet."""

    given_queue: str | None
    given_header: str | None
    consumer_tag: str = "test"

    @property
    def queue(self) -> str:
        """The queue that it claims to come from."""
        return "test" if self.given_queue is None else self.given_queue

    @property
    def retry_count_header(self) -> str:
        """The header in which its retries are counted."""
        return "x-retry-count" if self.given_header is None else self.given_header

    def join(self, queue: str, retry_count_header: str) -> None:
        """Learn what was left open."""
        if self.given_queue is None:
            self.given_queue = queue
        if self.given_header is None:
            self.given_header = retry_count_header

    def decode_properties(self, raw: bytes, /) -> Properties:
        """Never called: properties are given as values."""
        raise NotImplementedError(raw)

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        """Never called either."""
        raise NotImplementedError(raw)

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        """The route that is not known before the queue is."""
        del raw
        return "", self.queue

    def now(self) -> float:
        """Seconds since the epoch."""
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
        routing_key: None: the queue's name where the exchange is the default one, else empty.
        queue: None: that of the consumer which :func:`~aio_pika_batch.testing.process` hands it to.
        retry_count_header: None: the consumer's, likewise.
        **properties: Further ones of :class:`~aio_pika_batch.Publication`, such as `message_id`.
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
    """Make one session's deliveries of what a test hands in, numbered from 1.

    Raises:
        ValueError: A message is there twice.
    """
    messages: list[Message] = []
    for tag, each in enumerate(given, 1):
        message = each if isinstance(each, Message) else make_message(each)
        if any(message is other for other in messages):
            raise ValueError(f"{message!r} is there twice: no broker delivers one message twice")
        # The numbers are those of the session, and it begins here.
        message.delivery_tag = tag
        source = message._source  # noqa: SLF001  -- our own
        if isinstance(source, MadeSource):
            source.join(queue, retry_count_header)
        messages.append(message)
    return messages
