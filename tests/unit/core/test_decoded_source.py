"""The source of messages that arrive decoded."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from aio_pika_batch.core.message import DecodedSource, Message, Properties

SOURCE = DecodedSource("orders", "tag", "x-count", lambda: 100.0)


def test_it_has_the_queue_and_the_clock_of_its_messages():
    """And the header that counts retries."""
    properties = Properties(headers={"x-count": 2}, timestamp=datetime.fromtimestamp(40, UTC))
    message = Message(SOURCE, 1, False, b"", ("ex", "key"), properties)

    assert ("orders", "tag", 2) == (message.queue, message.consumer_tag, message.retry_count)
    assert ("ex", "key", 60.0) == (message.exchange, message.routing_key, message.age)


@pytest.mark.parametrize("part", ["properties", "headers", "exchange"])
def test_raw_properties_are_an_error(part):
    """A transport that decodes on demand needs a source of its own."""
    message = Message(SOURCE, 1, False, b"", b"raw", b"raw")
    with pytest.raises(NotImplementedError, match="of a DecodedSource was created with"):
        getattr(message, part)
