"""Names and headers survive NATS, which knows neither exchanges nor types.

The pure parts of the example of a transport. What it does on a server is an integration test.
"""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.transport import Properties, TopologyError

FOLDER = Path(__file__).parents[2] / "examples/transports/nats_jetstream/src/aio_pika_batch_nats"


def part(name: str) -> Any:
    """A module of the example, which is not installed here."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


names = part("names")
headers = part("headers")

TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | TEXTS
    | st.sampled_from(["json:1", " edge ", "5", "line\r\nbreak", ""])
    | st.binary(max_size=20)
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(
    TEXTS | st.sampled_from(["Nats-Msg-Id", "nats-x", "Amqp-type", "a:b", "x-retry-count"]),
    VALUES,
    min_size=1,
    max_size=5,
)
PROPERTIES = st.builds(
    Properties,
    headers=st.none() | HEADERS,
    delivery_mode=st.none() | st.integers(1, 2),
    priority=st.none() | st.integers(0, 255),
    timestamp=st.none() | st.datetimes(timezones=st.just(UTC)),
    expiration=st.none() | st.integers(0).map(str),
    **{
        name: st.none() | TEXTS
        for name in ("content_type", "correlation_id", "message_id", "reply_to", "type", "user_id")
    },
)


@given(PROPERTIES)
def test_properties_come_back_as_they_were(properties):
    """Also their types, and what was absent; as lines that a client passes on as they are."""
    lines = headers.encoded(properties)

    assert properties == headers.decoded(lines)
    for name, line in (lines or {}).items():
        assert name.isascii()
        assert not set(name) & set(": \r\n")
        assert line.isascii()
        assert line.isprintable()
        assert (name, line) == (name.strip(), line.strip())
        assert not name.lower().startswith("nats-"), "the server would obey it"


def test_text_stays_as_others_write_and_read_it():
    """Only values that aren't plain text have a mark."""
    properties = Properties(headers={"source": "till 5", "count": 5}, type="order")
    lines = {"source": "till 5", "count": "json:5", "Amqp-type": "order"}

    assert lines == headers.encoded(properties)
    assert {"X-Theirs": "a, b"} == headers.decoded({"X-Theirs": "a, b"}).headers


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (("X-Theirs", "json:{"), "headers"),
        (("X-Theirs", 'json:{"decimal": "a lot"}'), "headers"),
        (("X-Theirs", 'json:{"foreign": 1}'), "headers"),
        (("X-Theirs", "json:" + "[" * 100_000), "headers"),
        (("Amqp-timestamp", "yesterday"), "timestamp"),
        (("Amqp-priority", "json:"), "priority"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_others_got_wrong_costs_that_property_only(line, field):
    """A reader sees that it was undecodable, and not a wrong value."""
    properties = headers.decoded(dict([line, ("Amqp-type", "order")]))

    assert [field] == list(properties.undecodable)
    assert ("order", None) == (properties.type, getattr(properties, field))


def test_values_of_each_type_are_lines():
    """So that the format is not changed by accident: others have messages in it."""
    told = {
        "a": b"\x00",
        "b": Decimal("1.50"),
        "c": datetime(2026, 1, 2, tzinfo=UTC),
        "d": {"x": None},
        "e": [1.5, "json:"],
    }
    assert {
        "a": 'json:{"bytes": "AA=="}',
        "b": 'json:{"decimal": "1.50"}',
        "c": 'json:{"datetime": "2026-01-02T00:00:00+00:00"}',
        "d": 'json:{"table": {"x": null}}',
        "e": 'json:[1.5, "json:"]',
    } == headers.encoded(Properties(headers=told))


@given(TEXTS, TEXTS)
def test_a_route_comes_back_as_it_was(exchange, routing_key):
    """Whatever is in the names, a subject holds it."""
    subject = names.subject_of(exchange, routing_key)

    assert (exchange, routing_key) == names.route_of(subject)
    assert subject.isascii()
    assert not set(subject) & set("*> \t\r\n%/\\")
    assert "" not in subject.split(".")


def test_the_subject_of_another_program_is_a_routing_key():
    """A stream that was not declared here can be consumed, too."""
    assert ("", "orders.new") == names.route_of("orders.new")
    assert ("", "exchange.only") == names.route_of("exchange.only")


@pytest.mark.parametrize(
    ("kind", "key", "subjects"),
    [
        ("fanout", "any", ["exchange.x.>"]),
        ("direct", "a.b", ["exchange.x.a.b"]),
        ("direct", "", ["exchange.x.="]),
        ("topic", "a.*.c", ["exchange.x.a.*.c"]),
        ("topic", "#", ["exchange.x.>"]),
        ("topic", "a.#", ["exchange.x.a", "exchange.x.a.>"]),
    ],
)
def test_a_binding_is_subjects(kind, key, subjects):
    """Those of all keys that it lets through."""
    assert subjects == names.bound_subjects("x", kind, key)


@pytest.mark.parametrize(("kind", "key"), [("topic", "#.a"), ("headers", ""), ("x-random", "")])
def test_a_binding_that_subjects_cannot_say_is_refused(kind, key):
    """At the start, rather than by losing messages."""
    with pytest.raises(TopologyError, match="NATS has"):
        names.bound_subjects("x", kind, key)
