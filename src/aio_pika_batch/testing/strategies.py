"""Strategies for hypothesis: all messages that AMQP allows, all results, and stories.

The headers that the library reads and writes are drawn as often as all others together, with values
of every type, since any client may have set them.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import strategies as st

from aio_pika_batch.core.message import Message, Properties
from aio_pika_batch.core.results import MessageResult, Nack, Requeue, Result
from aio_pika_batch.testing.messages import MadeSource
from aio_pika_batch.testing.stories.story import LATER, RAISE, Answer, Fault, FaultKind, Story

UNDECODABLE = "not UTF-8"
"""The reason why a property of `broken_properties` can't be decoded."""

short_texts = st.text(st.characters(codec="utf-8"), max_size=12)
"""Texts that fit into an AMQP short string, such as a routing key or a `message_id`."""

moments = st.datetimes(
    min_value=datetime(1970, 1, 1),  # noqa: DTZ001  -- hypothesis adds the zone
    max_value=datetime(9999, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
).map(lambda moment: moment.replace(microsecond=0))
"""Timestamps in whole seconds."""

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    short_texts,
    st.binary(max_size=8),
    st.decimals(allow_nan=False, allow_infinity=False, places=2).map(Decimal),
    moments,
)
"""Header values that contain no other values."""

field_values = st.one_of(
    scalars,
    st.lists(scalars, max_size=2),
    st.dictionaries(short_texts, scalars, max_size=2),
    st.just([{"deep": [{"deeper": None}]}]),
)
"""Header values, nested ones included."""

known_headers = st.sampled_from(
    [
        "CC",
        "BCC",
        "x-acquired-count",
        "x-dead-letter-detail",
        "x-dead-letter-reason",
        "x-dead-lettered-at",
        "x-death",
        "x-delivery-count",
        "x-exception-message",
        "x-exception-type",
        "x-first-failed-at",
        "x-original-exchange",
        "x-original-expiration",
        "x-original-queue",
        "x-original-routing-key",
        "x-retry-count",
    ]
)
"""Names of headers that this library or RabbitMQ interprets."""

headers = st.dictionaries(known_headers | short_texts, field_values, max_size=5)
"""Headers with any names, and values of any type."""

sound_properties = st.builds(
    Properties,
    content_type=st.none() | short_texts,
    content_encoding=st.none() | short_texts,
    headers=st.none() | headers,
    delivery_mode=st.none() | st.sampled_from([1, 2]),
    priority=st.none() | st.integers(0, 255),
    correlation_id=st.none() | short_texts,
    reply_to=st.none() | short_texts,
    expiration=st.none() | st.integers(0, 2**32 - 1).map(str),
    message_id=st.none() | short_texts,
    timestamp=st.none() | moments,
    type=st.none() | short_texts,
    user_id=st.none() | short_texts,
    app_id=st.none() | short_texts,
    cluster_id=st.none() | short_texts,
)
"""Properties that can be decoded."""

broken_properties = st.builds(
    lambda names: Properties(undecodable=dict.fromkeys(names, UNDECODABLE)),
    st.sets(
        st.sampled_from(["headers", "message_id", "expiration", "timestamp", "user_id"]),
        min_size=1,
    ),
)
"""Properties of which some raise MessageDecodeError when they are read."""

properties = sound_properties | broken_properties
"""Properties, decodable or not."""


def messages(
    bodies: st.SearchStrategy[bytes] | None = None,
    *,
    of: st.SearchStrategy[Properties] = properties,
    queue: str | None = None,
    retry_count_header: str | None = None,
) -> st.SearchStrategy[Message]:
    """Messages, as :func:`~aio_pika_batch.testing.make_message` makes them.

    Args:
        bodies: The bodies; None: up to 20 bytes.
        of: The properties; by default some can't be decoded.
        queue: The queue; None: that of the consumer that gets the message.
        retry_count_header: None: the consumer's.
    """
    return st.builds(
        Message,
        st.builds(MadeSource, st.just(queue), st.just(retry_count_header)),
        st.just(1),
        st.booleans(),
        st.binary(max_size=20) if bodies is None else bodies,
        st.tuples(short_texts, short_texts),
        of,
    )


reasons = st.none() | st.text(max_size=5)
"""Reasons of a Nack or a Requeue."""

delays = st.none() | st.sampled_from([0, 1, 2.5, 1000]) | st.just(timedelta(seconds=90))
"""Delays of a Requeue."""

requeues = st.builds(Requeue, reasons, delay=delays)
"""Requeues with reasons and delays."""

results: st.SearchStrategy[Result] = st.one_of(
    st.sampled_from(MessageResult), st.builds(Nack, reasons), requeues
)
"""All results that a handler may yield for a message."""

_ANSWERS: list[Answer] = [
    MessageResult.ACK,
    MessageResult.NACK,
    MessageResult.REQUEUE,
    MessageResult.REQUEUE_IMMEDIATE,
    LATER,
    RAISE,
]


def stories(
    *, faults: Collection[FaultKind] = tuple(FaultKind), max_messages: int = 12
) -> st.SearchStrategy[Story]:
    """Stories, see :mod:`aio_pika_batch.testing.stories`.

    Args:
        faults: The kinds of faults that may occur; empty: none.
        max_messages: The maximum number of messages.
    """
    some_faults = st.lists(
        st.builds(
            Fault,
            at=st.floats(0, 15),
            kind=st.sampled_from([each for each in FaultKind if each in faults]),
            seconds=st.sampled_from([0.0, 0.5, 5.0, 40.0]),
        ),
        max_size=3,
    )
    return st.builds(
        Story,
        answers=st.lists(
            st.lists(st.sampled_from(_ANSWERS), max_size=4).map(tuple), max_size=max_messages
        ).map(tuple),
        pauses=st.lists(st.sampled_from([0.0, 0.3, 2.0]), min_size=1, max_size=3).map(tuple),
        durations=st.lists(st.sampled_from([0.0, 0.05, 1.0, 6.0]), min_size=1, max_size=4).map(
            tuple
        ),
        size=st.integers(1, 5),
        concurrency=st.integers(1, 3),
        workers=st.integers(1, 2),
        prefetch=st.none() | st.integers(0, 12),
        attempts=st.integers(0, 3),
        settle=st.sampled_from(["batch", "yield", "atomic"]),
        isolate=st.sampled_from([0, 0, 1, 10]),  # more often without
        breaker=st.sampled_from([None, None, 0.3, 1.0]),
        quorum=st.booleans(),
        faults=some_faults.map(tuple) if faults else st.just(()),
        stop_at=st.none() | st.floats(0, 20),
        restart_after=st.none() | st.sampled_from([0.0, 0.5, 10.0]),
    )
