"""What do messages share that come decoded?"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from aio_pika_batch.core.message import DecodedSource, Message, Properties

SOURCE = DecodedSource("orders", "tag", "x-count", lambda: 100.0)


def test_it_says_where_its_messages_are_from():
    """And gives them the time."""
    properties = Properties(headers={"x-count": 2}, timestamp=datetime.fromtimestamp(40, UTC))
    message = Message(SOURCE, 1, False, b"", ("ex", "key"), properties)

    assert ("orders", "tag", 2) == (message.queue, message.consumer_tag, message.retry_count)
    assert ("ex", "key", 60.0) == (message.exchange, message.routing_key, message.age)


@pytest.mark.parametrize("part", ["properties", "headers", "exchange"])
def test_what_is_raw_is_a_mistake_that_is_told(part):
    """A transport that decodes on demand needs a source of its own."""
    message = Message(SOURCE, 1, False, b"", b"raw", b"raw")
    with pytest.raises(NotImplementedError, match="of a DecodedSource was created with"):
        getattr(message, part)
