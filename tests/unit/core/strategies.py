"""What may a message look like? Everything that the wire lets through, and a little more.

The headers that the core itself reads and writes are drawn as often as all others together, with
values of every type: any client may have set them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from aio_pika_batch.core.message import Headers, Message, Properties
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.results import Cause, MessageResult, Nack, Requeue, Result, Verdict
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.topology import Wanted

if TYPE_CHECKING:
    from collections.abc import Mapping

QUEUE = "jobs"
NOW = datetime(2025, 3, 4, 5, 6, 7, tzinfo=UTC)

UNDECODABLE = "not UTF-8"


@dataclass(slots=True)
class StubSource:
    """A session's share of its messages; it notes what it was asked to decode."""

    queue: str = QUEUE
    consumer_tag: str = "ctag-1"
    retry_count_header: str = "x-retry-count"
    clock: float = 0.0
    decoded: Properties = field(default_factory=Properties)
    route: tuple[str, str] = ("events", "order.created")
    seen: list[bytes] = field(default_factory=list)

    def decode_properties(self, raw: bytes, /) -> Properties:
        self.seen.append(raw)
        return self.decoded

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        self.seen.append(raw)
        if "headers" in self.decoded.undecodable:
            raise ValueError(self.decoded.undecodable["headers"])
        return self.decoded.headers

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        self.seen.append(raw)
        return self.route

    def now(self) -> float:
        return self.clock


def a_message(
    tag: int = 1,
    *,
    body: bytes = b"payload",
    exchange: str = "events",
    routing_key: str = "order.created",
    source: StubSource | None = None,
    **properties: Any,
) -> Message:
    """One delivery; what is not given is absent."""
    return Message(
        source or StubSource(),
        tag,
        False,
        body,
        (exchange, routing_key),
        Properties(**properties),
    )


def some_messages(count: int, first: int = 1) -> list[Message]:
    """Messages with consecutive delivery tags."""
    return [a_message(tag) for tag in range(first, first + count)]


def delivered(copy: Copy, tag: int = 1) -> Message:
    """The delivery that a broker makes of a copy."""
    return Message(
        StubSource(),
        tag,
        False,
        copy.body,
        (copy.exchange, copy.routing_key),
        copy.properties,
    )


def without(headers: Mapping[str, object] | None, *names: str) -> dict[str, object]:
    """The headers but for some."""
    return {name: value for name, value in (headers or {}).items() if name not in names}


short_texts = st.text(st.characters(codec="utf-8"), max_size=12)

moments = st.datetimes(
    min_value=datetime(1970, 1, 1),  # noqa: DTZ001  -- hypothesis adds the zone
    max_value=datetime(9999, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
).map(lambda moment: moment.replace(microsecond=0))

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

field_values = st.one_of(
    scalars,
    st.lists(scalars, max_size=2),
    st.dictionaries(short_texts, scalars, max_size=2),
    st.just([{"deep": [{"deeper": None}]}]),
)

core_headers = st.sampled_from(
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

headers = st.dictionaries(core_headers | short_texts, field_values, max_size=5)

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

broken_properties = st.builds(
    lambda names: Properties(undecodable=dict.fromkeys(names, UNDECODABLE)),
    st.sets(
        st.sampled_from(["headers", "message_id", "expiration", "timestamp", "user_id"]),
        min_size=1,
    ),
)

properties = sound_properties | broken_properties

typical_properties = st.sampled_from(
    [
        Properties(),
        Properties(headers={}),
        Properties(headers={"x-retry-count": 1, "CC": ["elsewhere"]}, expiration="60000"),
        Properties(headers={"x-retry-count": 5, "x-original-routing-key": "first"}),
        Properties(headers={"x-retry-count": "many"}),
        Properties(undecodable={"headers": UNDECODABLE}),
        Properties(undecodable={"message_id": UNDECODABLE, "expiration": UNDECODABLE}),
    ]
)
"""For batches of several, where what matters is who gets which result."""


def messages(
    of: st.SearchStrategy[Properties] = properties,
) -> st.SearchStrategy[Message]:
    """Deliveries of one session."""
    return st.builds(
        Message,
        st.just(StubSource()),
        st.just(1),
        st.booleans(),
        st.binary(max_size=20),
        st.tuples(short_texts, short_texts),
        of,
    )


class Odd(RuntimeError):
    """An exception that cannot say what it is."""

    def __str__(self) -> str:
        raise AttributeError


texts = st.text(st.characters(), max_size=2000)

errors = st.one_of(
    st.none(),
    st.builds(ValueError, st.text(max_size=5)),
    st.just(Odd()),
    st.just(KeyboardInterrupt()),
)

reasons = st.none() | st.text(max_size=5)

delays = st.none() | st.sampled_from([0, 1, 2.5, 1000]) | st.just(timedelta(seconds=90))

requeues = st.builds(Requeue, reasons, delay=delays)

results: st.SearchStrategy[Result] = st.one_of(
    st.sampled_from(MessageResult), st.builds(Nack, reasons), requeues
)

causes = st.sampled_from(Cause)

dispositions = st.sampled_from(Disposition)


@st.composite
def batches_of_verdicts(
    draw: st.DrawFn, *, max_size: int = 6, of: st.SearchStrategy[Result] = results
) -> list[Verdict]:
    """Verdicts over distinct deliveries."""
    decided = draw(st.lists(st.tuples(typical_properties, of, causes, errors), max_size=max_size))
    tags = draw(st.permutations(range(1, len(decided) + 1)))
    return [
        Verdict(Message(StubSource(), tag, False, b"", ("events", "order.created"), has), *verdict)
        for tag, (has, *verdict) in zip(tags, decided, strict=True)
    ]


entity_names = st.sampled_from(["a", "b", "c", "order.created"])
routing_keys = st.sampled_from(["", "a", "dead", "order.created"])
exchange_types = st.sampled_from(["direct", "fanout", "topic", "headers", "x-consistent-hash"])
queue_types = st.none() | st.sampled_from(["classic", "quorum"])

wanted = st.builds(
    Wanted,
    queue_name=st.just("jobs"),
    queue_durable=st.booleans(),
    queue_exclusive=st.booleans(),
    queue_auto_delete=st.booleans(),
    queue_type=queue_types,
    queue_arguments=st.fixed_dictionaries(
        {},
        optional={
            "x-queue-type": st.sampled_from(["classic", "quorum"]),
            "x-dead-letter-exchange": st.sampled_from(["", "dlx-of-arguments", 5]),
            "x-dead-letter-routing-key": routing_keys | st.just(5),
            "x-max-length": st.integers(1, 9),
        },
    ),
    exchange_name=st.none() | st.just("") | entity_names,
    exchange_type=exchange_types,
    exchange_durable=st.booleans(),
    routing_keys=st.lists(entity_names, max_size=3, unique=True).map(tuple),
    binding_arguments=st.just({}) | st.just({"x-match": "all"}),
    dead_letter_exchange=st.none() | st.sampled_from(["", "dlx"]),
    dead_letter_exchange_type=exchange_types,
    dead_letter_routing_key=st.none() | routing_keys,
    dead_letter_queue=st.none() | st.just("jobs.dlq"),
    wait_levels=st.sampled_from([(), (1000, 2000)]),
    unsafe_delay=st.booleans(),
    declare=st.booleans(),
)
