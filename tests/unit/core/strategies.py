"""Hypothesis strategies for the core: messages, results, policies and settings.

Messages and results come from `aio_pika_batch.testing.strategies`, as in tests of users.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from aio_pika_batch.core.message import Headers, Message, Properties
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.results import Cause, MessageOutcome, Result
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.topology import TopologyOptions, build_topology
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.testing.strategies import UNDECODABLE, results
from aio_pika_batch.testing.strategies import messages as made_messages

if TYPE_CHECKING:
    from collections.abc import Mapping

QUEUE = "jobs"
NOW = datetime(2025, 3, 4, 5, 6, 7, tzinfo=UTC)


@dataclass(slots=True)
class StubSource:
    """The source of a session that records what it decodes."""

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
    """One delivery. Properties that are not given are absent."""
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


def delivered(copy: Copy, tag: int = 1, *, queue: str = QUEUE) -> Message:
    """The delivery that a broker makes of a copy."""
    return Message(
        StubSource(queue),
        tag,
        False,
        copy.body,
        (copy.exchange, copy.routing_key),
        copy.properties,
    )


def without(headers: Mapping[str, object] | None, *names: str) -> dict[str, object]:
    """The headers without some of them."""
    return {name: value for name, value in (headers or {}).items() if name not in names}


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
"""For batches in which only the results matter."""


messages = functools.partial(made_messages, queue=QUEUE)
"""Deliveries of one session."""


class Odd(RuntimeError):
    """An exception whose `str()` raises."""

    def __str__(self) -> str:
        raise AttributeError


texts = st.text(st.characters(), max_size=2000)

errors = st.one_of(
    st.none(),
    st.builds(ValueError, st.text(max_size=5)),
    st.just(Odd()),
    st.just(KeyboardInterrupt()),
)

causes = st.sampled_from(Cause)

dispositions = st.sampled_from(Disposition)


@st.composite
def batches_of_outcomes(
    draw: st.DrawFn, *, max_size: int = 6, of: st.SearchStrategy[Result] = results
) -> list[MessageOutcome]:
    """Outcomes of distinct deliveries."""
    decided = draw(st.lists(st.tuples(typical_properties, of, causes, errors), max_size=max_size))
    tags = draw(st.permutations(range(1, len(decided) + 1)))
    return [
        MessageOutcome(
            Message(StubSource(), tag, False, b"", ("events", "order.created"), has), *outcome
        )
        for tag, (has, *outcome) in zip(tags, decided, strict=True)
    ]


entity_names = st.sampled_from(["a", "b", "c", "order.created"])
routing_keys = st.sampled_from(["", "a", "dead", "order.created"])
exchange_types = st.sampled_from(["direct", "fanout", "topic", "headers", "x-consistent-hash"])
queue_types = st.none() | st.sampled_from(["classic", "quorum"])

any_options = st.builds(
    TopologyOptions,
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
    exchange_auto_delete=st.booleans(),
    exchange_internal=st.booleans(),
    exchange_arguments=st.just({}) | st.just({"alternate-exchange": "unrouted"}),
    routing_keys=st.lists(entity_names, max_size=3, unique=True).map(tuple),
    binding_arguments=st.just({}) | st.just({"x-match": "all"}),
    dead_letter_exchange=st.none() | st.sampled_from(["", "dlx"]),
    dead_letter_exchange_type=st.none() | exchange_types,
    dead_letter_routing_key=st.none() | routing_keys,
    dead_letter_queue=st.none() | st.just("jobs.dlq"),
    broker_dead_letters=st.booleans(),
    republishes=st.booleans(),
    wait_levels=st.sampled_from([(), (1000, 2000)]),
    declare=st.booleans(),
)


def can_be_built(settings: TopologyOptions) -> bool:
    """Whether dead letters can reach their queue."""
    try:
        build_topology(settings)
    except TopologyError:
        return False
    return True


options = any_options.filter(can_be_built)
