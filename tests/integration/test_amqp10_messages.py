"""A handler sees the same message over both protocols, whichever one it was published over."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from aio_pika_batch.adapters.aio_pika.properties import decode, decode_headers, decode_route, encode
from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import Symbol, Timestamp, UByte, UInt, ULong
from aio_pika_batch.adapters.amqp10.connection import open_amqp10
from aio_pika_batch.adapters.amqp10.frames import ReceivedRecord, pack
from aio_pika_batch.adapters.amqp10.performatives import (
    Attach,
    Begin,
    DispositionFrame,
    Flow,
    SourceTerminus,
    TargetTerminus,
)
from aio_pika_batch.adapters.rabbitmq import AioPikaTransport, Amqp10Transport
from aio_pika_batch.core.message import DecodedSource, Message, Properties
from aio_pika_batch.core.publication import Copy, Outcome
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.transport import Endpoint, Subscription
from tests.integration.helpers import ready, until
from tests.integration.test_amqp10_contract import (
    everywhere,  # noqa: F401  -- for all that is in this file
    speaks_amqp10,  # noqa: F401
)
from tests.unit.adapters.amqp10.spoken import section, transfers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ID = "urn:uuid:00112233-4455-6677-8899-aabbccddeeff"
COUNTS = ("x-delivery-count", "x-acquired-count")


class Source(DecodedSource):
    """Of a message that was never delivered, with raw properties."""

    def decode_properties(self, raw: bytes, /) -> Properties:
        return decode(raw)

    def decode_headers(self, raw: bytes, /) -> Any:
        return decode_headers(raw)

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        return decode_route(raw)


class Both:
    """A queue, and its messages over either protocol."""

    def __init__(self, url: str, queue: str) -> None:
        endpoint = Endpoint(url=url)
        self.queue = queue
        self.over_091 = AioPikaTransport(endpoint)
        self.over_10 = Amqp10Transport(endpoint)

    async def publish(self, properties: Sequence[Properties]) -> None:
        """Over 0-9-1, with these very properties; bodies are their numbers."""
        source = Source(self.queue, "c", "x-retry-count", lambda: 0)
        copies = [
            Copy(
                Message(source, 1, False, b"%d" % number, ("", self.queue), encode(each)),
                "",
                self.queue,
                {},
            )
            for number, each in enumerate(properties)
        ]
        async with self.over_091.publisher() as publisher:
            assert {Outcome.CONFIRMED} == set(await publisher.publish(copies))

    async def publish_over_10(self, payloads: Sequence[bytes]) -> None:
        """Publish messages with these very sections."""
        connection = await open_amqp10(self.over_10._endpoint)
        heard: asyncio.Queue[Any] = asyncio.Queue()
        connection.listen(heard.put_nowait)

        async def next_of(kind: type) -> Any:
            async with asyncio.timeout(10):
                while True:
                    event = await heard.get()
                    assert isinstance(event, ReceivedRecord), event
                    if isinstance(event.record, kind):
                        return event.record

        target = TargetTerminus(f"/queues/{self.queue}")
        attach = Attach(
            "sender",
            UInt(0),
            role=False,
            source=SourceTerminus("test"),
            target=target,
            initial_delivery_count=UInt(0),
        )
        connection.write(
            [pack(Begin(None, UInt(0), UInt(1000), UInt(1000), UInt(0))), pack(attach)]
        )
        while (await next_of(Flow)).handle is None:
            pass
        connection.write([transfers(each, number) for number, each in enumerate(payloads)])
        settled = 0
        while settled < len(payloads):
            disposition = await next_of(DispositionFrame)
            assert disposition.state.descriptor == spec.ACCEPTED
            settled += 1 + (disposition.last or disposition.first) - disposition.first
        await connection.close()

    async def read(self, transport: AioPikaTransport, number: int) -> dict[bytes, dict[str, Any]]:
        """Each message, by its body, and what can be read of it; they stay in the queue."""
        messages: list[Message] = []
        subscription = Subscription(queue=self.queue, prefetch=1000, consumer_tag="c")
        async with transport.session(subscription) as session, asyncio.timeout(10):
            async for chunk in session:
                messages.extend(chunk)
                if len(messages) >= number:
                    break
            tags = tuple(message.delivery_tag for message in messages)
            await session.settle([Settlement(Disposition.RETURN, tags)])
        return {message.body: view(message) for message in messages}

    async def differences(self, number: int) -> dict[bytes, dict[str, tuple[Any, Any]]]:
        """Return the properties that differ between 0-9-1 and 1.0, with both values."""
        old = await self.read(self.over_091, number)
        new = await self.read(self.over_10, number)
        assert old.keys() == new.keys()
        assert number == len(old)
        found = {}
        for body, mine in old.items():
            unlike = {
                name: (mine.get(name, ...), new[body].get(name, ...))
                for name in mine.keys() | new[body].keys()
                if not same(mine.get(name, ...), new[body].get(name, ...))
            }
            if unlike:
                found[body] = unlike
        return found


def view(message: Message) -> dict[str, Any]:
    """All of a message but how often it was delivered."""
    properties = message.properties
    seen = {each.name: getattr(properties, each.name) for each in fields(Properties)}
    headers: Mapping[str, Any] = seen.pop("headers") or {}
    seen |= {f"header {key}": value for key, value in headers.items() if key not in COUNTS}
    return seen | {"route": (message.exchange, message.routing_key)}


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


@pytest.fixture(params=["classic", "quorum"])
async def both(request: Any, amqp_url: str, name: str, channel: Any) -> AsyncIterator[Both]:
    """A queue of either type that drops nothing."""
    both = Both(amqp_url, name)
    arguments = {"x-queue-type": request.param}
    if request.param == "quorum":
        arguments["x-delivery-limit"] = -1
    await both.over_091.declare(Topology(queues=(Queue(name, arguments=arguments),)))
    yield both
    await channel.queue_delete(name)


PROPERTIES = [
    Properties(),
    Properties(
        content_type="application/json",
        content_encoding="gzip",
        headers={"a": 1},
        delivery_mode=2,
        priority=3,
        correlation_id="c",
        reply_to="answers",
        expiration="600000",
        message_id="m",
        timestamp=WHEN,
        type="t",
        user_id="guest",
        app_id="app",
    ),
    Properties(delivery_mode=2),
    Properties(priority=0),
    Properties(priority=255),
    Properties(message_id=ID, correlation_id=ID),
    Properties(message_id=ID.removeprefix("urn:uuid:")),
    Properties(reply_to="my queue/ü%41"),
    Properties(reply_to=""),
    Properties(
        content_type="", content_encoding="", correlation_id="", message_id="", type="", app_id=""
    ),
    Properties(
        content_type="ü",
        content_encoding="ü",
        correlation_id="ü",
        message_id="ü",
        type="ü",
        app_id="ü",
    ),
    Properties(
        message_id="x" * 255,
        correlation_id="y" * 255,
        type="z" * 255,
        app_id="a" * 255,
        content_type="c" * 255,
    ),
    Properties(
        headers={
            "text": "ü",
            "ü": "",
            "number": 5,
            "negative": -5,
            "big": 2**62,
            "float": 1.5,
            "yes": True,
            "nothing": None,
            "bytes": b"\xff\x00",
            "when": WHEN,
            "long": "x" * 300,
            "nul": "a\0b",
            "milliseconds": datetime(5138, 1, 1, tzinfo=UTC),
        }
    ),
    Properties(
        headers={
            "x-text": "ü",
            "x-number": 5,
            "x-float": 1.5,
            "x-yes": True,
            "x-nothing": None,
            "x-bytes": b"\xff\x00",
            "x-when": WHEN,
            "x-list": [1, "a", None, {"k": ["v"]}],
            "x-table": {"k": 1, "list": [1, b"\xff"]},
            "x-long": "ü" * 300,
            "x-retry-count": 3,
            "x-original-exchange": "e",
        }
    ),
    Properties(headers={"CC": ["another"]}),
    Properties(headers={"x-death": [{"count": 1, "queue": "q"}], "x-first-death-queue": "q"}),
    Properties(headers={}),
]


async def test_what_was_published_over_091_is_the_same(both: Both) -> None:
    """All properties, headers with their types, and the route."""
    await both.publish(PROPERTIES)

    assert {} == await both.differences(len(PROPERTIES))


async def test_what_a_translation_leaves_out_is_known(both: Both) -> None:
    """These are the differences, and all of them."""
    await both.publish(
        [
            Properties(cluster_id="c"),
            Properties(delivery_mode=1),
            Properties(headers={"list": [1], "table": {"a": 1}, "rest": 1}),
            Properties(headers={"bytes": b"text"}),
            Properties(message_id=ID.upper().replace("URN:UUID", "urn:uuid")),
        ]
    )

    expected = {
        b"0": {"cluster_id": ("c", None)},
        b"1": {"delivery_mode": (1, None)},
        b"2": {"header list": ([1], ...), "header table": ({"a": 1}, ...)},
        b"3": {"header bytes": (b"text", "text")},
        b"4": {"message_id": (ID.upper().replace("URN:UUID", "urn:uuid"), ID)},
    }
    assert expected == await both.differences(5)


async def test_bytes_that_are_not_utf8_make_one_property_undecodable(both: Both) -> None:
    """Or a header's value bytes; the others can be read, and so can other messages."""
    raw = encode(Properties(message_id="AB", type="CD", headers={"x-key": "EF", "y": "GH"}))
    for text, other in ((b"AB", b"A\xff"), (b"CD", b"C\xfe"), (b"EF", b"E\xfd"), (b"GH", b"G\xfc")):
        raw = raw.replace(text, other)
    source = Source(both.queue, "c", "x-retry-count", lambda: 0)
    message = Message(source, 1, False, b"0", ("", both.queue), raw)
    async with both.over_091.publisher() as publisher:
        await publisher.publish([Copy(message, "", both.queue, {})])

    [seen] = (await both.read(both.over_10, 1)).values()

    assert {"message_id", "type"} == set(seen["undecodable"])
    assert (b"E\xfd", b"G\xfc") == (seen["header x-key"], seen["header y"])


def message(body: bytes | None = None, *, number: count[int], **sections: Any) -> bytes:
    """A message of these sections, in the order of the specification."""
    codes = {
        "header": spec.HEADER,
        "annotations": spec.MESSAGE_ANNOTATIONS,
        "properties": spec.PROPERTIES,
        "application": spec.APPLICATION_PROPERTIES,
    }
    data = section(spec.DATA, b"%d" % next(number)) if body is None else body
    return b"".join(section(codes[key], value) for key, value in sections.items()) + data


async def test_what_was_published_over_10_is_the_same(both: Both) -> None:
    """As the broker would translate it for a consumer over 0-9-1."""
    number = count()
    long = "x" * 300
    payloads = [
        message(number=number),
        message(number=number, header=[True]),
        message(number=number, header=[True, UByte(7), UInt(600_000)]),
        message(
            number=number,
            header=[True],
            annotations={
                Symbol("x-a"): "text",
                Symbol("x-n"): 5,
                Symbol("x-l"): [1, Symbol("a"), {Symbol("k"): "v"}],
                Symbol("x-m"): {Symbol("k"): 1},
                Symbol("x-t"): Timestamp(1_700_000_000_123),
                Symbol("x-opt-own"): True,
            },
            application={"a": "text", "n": UInt(5), "s": Symbol("symbol"), "d": 1.5, "z": None},
        ),
        message(
            number=number,
            properties=[
                "m",
                b"guest",
                "to",
                "subject",
                f"/queues/{both.queue}",
                "c",
                Symbol("text/plain"),
                Symbol("gzip"),
                None,
                Timestamp(1_700_000_000_123),
                "group",
            ],
        ),
        message(number=number, properties=[ULong(5), None, None, None, None, ULong(2**63)]),
        message(number=number, properties=[UUID(ID), None, None, None, None, UUID(ID)]),
        message(number=number, properties=[b"\x01", None, None, None, None, b"text"]),
        message(number=number, properties=[long, None, None, None, None, long]),
        message(section(spec.DATA, b"two ") + section(spec.DATA, b"parts"), number=number),
        message(section(spec.DATA, b"foot") + section(spec.FOOTER, {}), number=number),
        message(section(spec.AMQP_VALUE, "a value"), number=number),
        message(section(spec.AMQP_VALUE, {"a": [1, None]}), number=number, application={"a": 1}),
        message(section(spec.AMQP_SEQUENCE, [1, 2]), number=number),
    ]
    await both.publish_over_10(payloads)

    found = await both.differences(len(payloads))

    assert {} == found


async def test_a_dead_letter_is_the_same(both: Both, channel: Any) -> None:
    """With its history, which the protocols write differently, and without its time to live."""
    dead = f"{both.queue}-dead"
    target = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    kind = {"x-queue-type": "quorum"}
    source = f"{both.queue}-source"
    await channel.declare_queue(dead, durable=True, arguments=kind)
    await channel.declare_queue(source, durable=True, arguments=kind | target)
    letters = Both(str(both.over_091._endpoint.url), dead)
    sources = Both(str(both.over_091._endpoint.url), source)
    await sources.publish([Properties(expiration="600000", headers={"a": 1}, delivery_mode=2)])
    subscription = Subscription(queue=source, prefetch=1, consumer_tag="c")
    async with sources.over_10.session(subscription) as session:
        [rejected] = await anext(aiter(session))
        await session.settle([Settlement(Disposition.REJECT, (rejected.delivery_tag,))])
        await session.settled()

    assert 1 == await until(lambda: ready(letters.over_091._endpoint.url, dead))
    assert {} == await letters.differences(1)
    [seen] = (await letters.read(letters.over_10, 1)).values()
    assert seen["header x-death"][0]["reason"] == "rejected"
    assert seen["header x-death"][0]["original-expiration"] == "600000"
    assert seen["expiration"] is None
    for queue in (dead, source):
        await channel.queue_delete(queue)
