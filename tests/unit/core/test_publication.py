"""Messages to publish."""

from __future__ import annotations

import time
from array import array
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.publication import (
    Outcome,
    Publication,
    StoredPublication,
    describe_outcome,
)
from aio_pika_batch.testing.strategies import headers, moments, short_texts
from tests.unit.core.strategies import StubSource

optional_texts = st.none() | short_texts

CARRIED = {
    "content_type": optional_texts,
    "content_encoding": optional_texts,
    "headers": st.none() | headers,
    "delivery_mode": st.none() | st.sampled_from([1, 2]),
    "priority": st.none() | st.integers(0, 255),
    "correlation_id": optional_texts,
    "reply_to": optional_texts,
    "message_id": optional_texts,
    "timestamp": st.none() | moments,
    "type": optional_texts,
    "user_id": optional_texts,
    "app_id": optional_texts,
}


@given(st.fixed_dictionaries({}, optional=CARRIED))
def test_only_given_properties_are_sent(stated):
    """Others are absent. Only the delivery mode has a default: persistent."""
    assert Properties(**{"delivery_mode": 2, **stated}) == Publication(b"", **stated).properties


@pytest.mark.parametrize(
    ("exchange", "routing_key", "mandatory"),
    [
        ("", "amq.rabbitmq.reply-to.g1h2AA", False),
        ("", "amq.rabbitmq.reply-to", True),
        ("events", "amq.rabbitmq.reply-to.g1h2AA", True),
    ],
)
def test_an_answer_to_a_direct_reply_to_address_is_not_mandatory(exchange, routing_key, mandatory):
    """Before 4.0, RabbitMQ returns it even though it has delivered it. An explicit value counts."""
    publication = Publication(b"", exchange=exchange, routing_key=routing_key)
    assert mandatory is publication.mandatory
    assert replace(publication, mandatory=True).mandatory


def test_the_defaults_are_the_default_exchange_and_mandatory():
    """If nothing else is given."""
    publication = Publication(b"body")

    assert (b"body", "", "", True) == (
        publication.body,
        publication.exchange,
        publication.routing_key,
        publication.mandatory,
    )


@given(st.integers(0, 2**32 - 1))
@example(1001)
def test_an_expiration_is_exact_to_a_millisecond(milliseconds):
    """In seconds or as a timedelta: no float rounds 1.001 s down to 1000 ms."""
    assert (
        str(milliseconds) == Publication(b"", expiration=milliseconds / 1000).properties.expiration
    )
    delta = timedelta(milliseconds=milliseconds)
    assert str(milliseconds) == Publication(b"", expiration=delta).properties.expiration


@pytest.mark.parametrize(
    ("expiration", "written"),
    [(None, None), (0, "0"), (-1, "0"), (timedelta(seconds=-1), "0"), (0.0004, "0"), (60, "60000")],
)
def test_examples_of_expirations(expiration, written):
    """A time in the past is 0."""
    assert written == Publication(b"", expiration=expiration).properties.expiration


@pytest.fixture
def far_from_utc(monkeypatch):
    """A machine whose local time is nine hours ahead."""
    monkeypatch.setenv("TZ", "XXX-9")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
def test_a_naive_timestamp_is_taken_as_utc():
    """And not as the local time."""
    naive = datetime(2025, 1, 2, 3, 4, 5)  # noqa: DTZ001  -- the point of the test

    assert (
        datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
        == Publication(b"", timestamp=naive).properties.timestamp
    )


def test_a_timestamp_of_another_time_zone_is_the_same_moment():
    """AMQP has no time zones."""
    moment = datetime(2025, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=5)))

    assert moment == Publication(b"", timestamp=moment).properties.timestamp


def test_only_the_body_is_positional():
    """Other arguments have names, and nothing can be changed later."""
    with pytest.raises(TypeError):
        Publication(b"", "exchange")  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        Publication(b"").body = b"other"  # type: ignore[misc]


@pytest.mark.parametrize("body", ["text", None, 5, [1], {"a": 1}])
def test_a_body_that_is_not_bytes_is_refused(body):
    """When the message is created, and not when it is sent."""
    with pytest.raises(TypeError, match=f"body must be bytes, not {type(body).__name__}"):
        Publication(body)


@pytest.mark.parametrize(
    ("view", "stored"),
    [
        (memoryview(array("H", [1, 2])), array("H", [1, 2]).tobytes()),
        (memoryview(b"abcdef")[::2], b"ace"),
        (memoryview(b"abcdef").cast("B", (2, 3)), b"abcdef"),
    ],
)
def test_a_view_is_sent_byte_for_byte(view, stored):
    """Also if its items have several bytes, or are not contiguous."""
    assert Publication(view).body == stored


def test_a_buffer_may_be_changed_after_the_call():
    """What is sent is what it contained before."""
    buffer = bytearray(b"before")
    publication = Publication(buffer)
    buffer[:] = b"after"
    assert publication.body == b"before"


@pytest.mark.parametrize("body", [b"x", bytearray(b"x"), memoryview(b"x")])
def test_other_types_of_bytes_are_accepted(body):
    """They become bytes; what is bytes already is not copied."""
    assert Publication(body).body == b"x"
    assert (Publication(body).body is body) is isinstance(body, bytes)


@pytest.mark.parametrize("name", ["exchange", "routing_key"])
@pytest.mark.parametrize(
    ("text", "fits"), [("x" * 255, True), ("x" * 256, False), ("é" * 128, False)]
)
def test_a_short_string_has_at_most_255_bytes(name, text, fits):
    """In UTF-8. A longer one would break the frame. The error has its name."""
    if fits:
        assert text == getattr(Publication(b"", **{name: text}), name)
        return
    with pytest.raises(ValueError, match=f"^{name} has more than 255 bytes"):
        Publication(b"", **{name: text})


@pytest.mark.parametrize(("stated", "read"), [({"a": 1}, {"a": 1}), (None, {})])
def test_a_stored_publication_has_the_properties_of_its_template_and_its_own_id(stated, read):
    """Changing the headers of a stored publication doesn't change the template."""
    template = Properties(headers=stated, priority=3)
    message = StoredPublication(StubSource(), 1, False, b"", ("", "orders"), template)
    message.template, message.message_id = template, "own"
    assert replace(template, message_id="own") == message.properties
    assert read == message.headers
    assert message.properties.headers is not stated or stated is None


@pytest.mark.parametrize("outcome", Outcome)
def test_each_outcome_is_described_with_the_route(outcome):
    """For errors and log lines."""
    text = describe_outcome(outcome, Publication(b"", exchange="events", routing_key="created"), 5)
    assert "exchange 'events', routing key 'created'" in text
