"""`make_message`: a message that a test has made is like one that a session delivers."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from aio_pika_batch.testing import make_message


def test_given_values_can_be_read():
    """As a handler reads them, decoded and with their types."""
    published = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
    message = make_message(
        b'{"id": 1}',
        headers={"x-retry-count": 2, "kind": "new"},
        exchange="events",
        routing_key="order.created",
        redelivered=True,
        delivery_tag=7,
        message_id="m1",
        expiration=1.5,
        priority=3,
        timestamp=published,
    )
    assert {"id": 1} == message.json()
    assert ("new", 2) == (message.headers["kind"], message.retry_count)
    assert ("events", "order.created") == (message.exchange, message.routing_key)
    assert ("m1", 1.5, 3) == (message.message_id, message.expiration, message.priority)
    assert (7, True) == (message.delivery_tag, message.redelivered)
    assert 60 <= message.age <= 60 + time.time() - published.timestamp()


def test_default_values_are_those_of_a_first_delivery():
    """Published directly to its queue."""
    message = make_message(b"x")
    assert ("", "test", "test") == (message.exchange, message.routing_key, message.queue)
    assert ({}, 0, False) == (message.headers, message.retry_count, message.redelivered)
    assert "test" == message.consumer_tag
    assert ("x", "jobs") == (make_message(b"", exchange="x").exchange, jobs().routing_key)
    assert not make_message(b"", exchange="x").routing_key


def jobs():
    """Return a message of a named queue."""
    return make_message(b"", queue="jobs")


@pytest.mark.parametrize(
    ("given", "error"),
    [({"body": "text"}, TypeError), ({"body": b"", "massage_id": "1"}, TypeError)],
    ids=["text", "unknown property"],
)
def test_impossible_messages_are_refused(given, error):
    """When they are made."""
    with pytest.raises(error):
        make_message(**given)


def test_nothing_needs_decoding():
    """So the source never has to decode anything."""
    source = make_message(b"x")._source
    for decode in (source.decode_properties, source.decode_headers):
        with pytest.raises(NotImplementedError):
            decode(b"")
