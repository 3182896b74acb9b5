"""Tests of the OpenTelemetry observer with the real SDK, which exports to memory."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import attach
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import aio_pika_batch
from aio_pika_batch import SessionLost
from aio_pika_batch.adapters.aio_pika.properties import encode
from aio_pika_batch.adapters.memory import ConnectFault, PublishFault
from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.core.message import Properties
from aio_pika_batch.masking import mask_traceback
from aio_pika_batch.observer import BatchCut, BatchHandled, Origin
from aio_pika_batch.observers.otel import OpenTelemetryObserver, _Links, trace_headers
from aio_pika_batch.testing import make_message
from aio_pika_batch.transport import server_of
from tests.unit.adapters.aio_pika import broker_frames
from tests.unit.adapters.aio_pika.test_tables import tables
from tests.unit.observers.stories import everything
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, raising

TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0x00F067AA0BA902B7
TRACEPARENT = f"00-{TRACE:032x}-{SPAN:016x}-01"

WHO = {"messaging.system": "rabbitmq", "messaging.destination.name": "jobs"}


def origin_of(message):
    """Return the span context that a link to a message has; None if there is no link."""
    links = _Links([message], 1, beyond=print)
    return links[0].context if len(links) else None


class Telemetry:
    """The SDK with exporters to memory."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        self.traces = TracerProvider()
        self.traces.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    def observer(self, **more):
        """Return an observer that reports here."""
        return OpenTelemetryObserver(
            tracer_provider=self.traces, meter_provider=self.meters, **more
        )

    def spans(self, kind=None):
        """Return the ended spans, in the order of their ends."""
        return [each for each in self.exporter.get_finished_spans() if kind in (None, each.kind)]

    def scopes(self):
        """Return the instrumentation scopes of all spans and metrics."""
        data = self.reader.get_metrics_data()
        return {
            *(each.instrumentation_scope for each in self.spans()),
            *(
                scope.scope
                for resource in data.resource_metrics
                for scope in resource.scope_metrics
            ),
        }

    def points(self, name):
        """Return the data points of a metric."""
        data = self.reader.get_metrics_data()
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
def telemetry():
    """An SDK for one test; nothing global is changed."""
    return Telemetry()


async def test_a_batch_is_one_span_with_a_link_for_each_message(rabbit, telemetry):
    """A batch has many origins, so none of them is its parent."""
    others = [f"00-{TRACE + number:032x}-{SPAN + number:016x}-01" for number in range(3)]
    for number, each in enumerate(others):
        rabbit.put(b"%d" % number, properties=Properties(headers={"traceparent": each}))
    rabbit.put(b"no trace")
    async with RecordingConsumer(
        taking(2), transport=rabbit.transport, observers=[telemetry.observer()], batch_size=4
    ):
        await asyncio.sleep(3)
    [span] = telemetry.spans(SpanKind.CONSUMER)
    assert "process jobs" == span.name
    assert span.parent is None
    assert [(TRACE + number, SPAN + number) for number in range(3)] == [
        (link.context.trace_id, link.context.span_id) for link in span.links
    ]
    assert all(link.context.is_remote for link in span.links)
    assert WHO | {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.batch.message_count": 4,
        "aio_pika_batch.trigger": "size",
    } == dict(span.attributes)
    assert StatusCode.UNSET is span.status.status_code


async def test_a_settlement_is_a_child_span_of_its_batch(rabbit, telemetry):
    """With the number of messages per result."""
    rabbit.put(*numbered(3))
    async with RecordingConsumer(
        answering(ACK, NACK, ACK),
        transport=rabbit.transport,
        observers=[telemetry.observer()],
        batch_size=3,
    ):
        await asyncio.sleep(1)
    [batch] = telemetry.spans(SpanKind.CONSUMER)
    [settle] = telemetry.spans(SpanKind.CLIENT)
    assert "settle jobs" == settle.name
    assert batch.context.span_id == settle.parent.span_id
    assert WHO | {
        "messaging.operation.name": "settle",
        "messaging.operation.type": "settle",
        "messaging.batch.message_count": 3,
        "aio_pika_batch.ack": 2,
        "aio_pika_batch.nack": 1,
    } == dict(settle.attributes)


async def test_the_span_of_the_batch_is_current_inside_the_handler(rabbit, telemetry):
    """Also after an await, in its tasks, and with concurrent batches; not afterwards."""
    seen = {}

    async def handler(messages):
        async def inner():
            await asyncio.sleep(1)
            return trace.get_current_span().get_span_context().span_id

        first = trace.get_current_span().get_span_context().span_id
        seen[messages[0].body] = {first, await inner(), await asyncio.create_task(inner())}
        for _ in messages:
            yield ACK
            seen[messages[0].body].add(trace.get_current_span().get_span_context().span_id)

    rabbit.put(*numbered(5))
    observer = telemetry.observer()
    async with RecordingConsumer(
        handler, transport=rabbit.transport, observers=[observer], batch_size=1, concurrency=2
    ):
        await asyncio.sleep(60)
    assert not trace.get_current_span().get_span_context().is_valid
    spans = telemetry.spans(SpanKind.CONSUMER)
    assert 5 == len(spans)
    assert all(1 == len(ids) for ids in seen.values())
    assert {each.context.span_id for each in spans} == {
        each for ids in seen.values() for each in ids
    }
    assert all(each.parent is None for each in spans)


async def test_spans_of_the_handler_are_its_children(rabbit, telemetry):
    """As those of an instrumented database driver."""
    tracer = telemetry.traces.get_tracer("driver")

    async def handler(messages):
        with tracer.start_as_current_span("INSERT"):
            await asyncio.sleep(0.1)
        for _ in messages:
            yield ACK

    rabbit.put(*numbered(1))
    with tracer.start_as_current_span("the program"):
        consumer = RecordingConsumer(
            handler, transport=rabbit.transport, observers=[telemetry.observer()]
        )
        async with consumer:
            await asyncio.sleep(10)
    [insert] = [each for each in telemetry.spans() if each.name == "INSERT"]
    [batch] = telemetry.spans(SpanKind.CONSUMER)
    assert batch.context.span_id == insert.parent.span_id
    assert batch.parent is None


async def test_a_failed_handler_sets_the_error_type(rabbit, telemetry):
    """On the span and on the duration."""
    rabbit.put(*numbered(1))
    async with RecordingConsumer(
        answering(error=KeyError("x")),
        transport=rabbit.transport,
        observers=[telemetry.observer()],
        unhandled_exception_action="NACK",
    ):
        await asyncio.sleep(10)
    [span] = telemetry.spans(SpanKind.CONSUMER)
    assert "KeyError" == span.attributes["error.type"]
    assert (StatusCode.ERROR, "'x'") == (span.status.status_code, span.status.description)
    assert ["exception"] == [event.name for event in span.events]
    [point] = telemetry.points("messaging.process.duration")
    assert "KeyError" == point.attributes["error.type"]


async def test_the_scope_has_a_version_and_the_schema_of_the_conventions(rabbit, telemetry):
    """A backend translates names of another version by them."""
    rabbit.put(*numbered(1))
    async with RecordingConsumer(
        answering(ACK), transport=rabbit.transport, observers=[telemetry.observer()]
    ):
        await asyncio.sleep(10)
    assert {
        ("aio_pika_batch", aio_pika_batch.__version__, "https://opentelemetry.io/schemas/1.44.0")
    } == {(each.name, each.version, each.schema_url) for each in telemetry.scopes()}


@pytest.mark.parametrize("chained", [False, True])
async def test_texts_of_exceptions_are_cut_and_masked_as_in_the_log(rabbit, telemetry, chained):
    """They may contain a whole body, a password, or what no exporter can encode."""
    body = "body " * 100_000
    inner = ValueError(f"amqp://user:s3cret@host/ {body}")
    inner.add_note(f"amqp://user:s3cret@host/ {body}")
    hostile = RuntimeError(f"amqp://user:s3cret@host/ \ud800\x1b[31m\n{body}")
    if chained:
        hostile.__cause__ = ExceptionGroup("many", [inner] * 1000)

    rabbit.put(*numbered(1))
    async with RecordingConsumer(
        answering(error=hostile),
        transport=rabbit.transport,
        observers=[telemetry.observer()],
        unhandled_exception_action="NACK",
    ):
        await asyncio.sleep(10)
    [span] = telemetry.spans(SpanKind.CONSUMER)
    [event] = span.events
    texts = [span.status.description, *event.attributes.values()]
    assert {"exception.type", "exception.message", "exception.stacktrace"} == set(event.attributes)
    assert "Traceback (most recent call last)" in event.attributes["exception.stacktrace"]
    assert "RuntimeError: amqp://user:***@host/" in event.attributes["exception.stacktrace"]
    for text in texts:
        text.encode()
        assert "s3cret" not in text
        assert "\x1b" not in text
        assert len(text) < 500_000
    assert all(len(text) < 5000 for text in (span.status.description, texts[2]))
    assert f"({len(str(hostile))} characters)" in span.status.description


async def test_a_traceback_keeps_both_ends(telemetry):
    """The first frames and the text of the exception, whatever is between them."""

    def descend(depth):
        if depth:
            ascend(depth - 1)
        raise ValueError("the bottom")

    def ascend(depth):
        descend(depth)

    with pytest.raises(ValueError, match="bottom") as caught:
        descend(200)
    text = mask_traceback(caught.value)
    assert text.startswith("Traceback")
    assert text.endswith("ValueError: the bottom\n")
    assert "parts left out" in text
    assert "in test_a_traceback_keeps_both_ends" in text


async def test_the_span_ends_even_if_the_exception_has_no_text(rabbit, telemetry):
    """str() of the exception raises."""

    class Odd(Exception):
        def __str__(self):
            raise AttributeError

    rabbit.put(*numbered(1))
    async with RecordingConsumer(
        answering(error=Odd()),
        transport=rabbit.transport,
        observers=[telemetry.observer()],
        unhandled_exception_action="NACK",
    ):
        await asyncio.sleep(10)
    [span] = telemetry.spans(SpanKind.CONSUMER)
    assert span.attributes["error.type"].endswith("Odd")


async def test_metrics_count_and_measure(rabbit, jitter, telemetry):
    """The metrics of the conventions, in a run with every kind of event."""
    await everything(rabbit, telemetry.observer())
    [consumed] = telemetry.points("messaging.client.consumed.messages")
    assert 6 == consumed.value
    assert WHO | {
        "messaging.operation.name": "receive",
        "messaging.operation.type": "receive",
    } == dict(consumed.attributes)
    durations = telemetry.points("messaging.process.duration")
    assert [(1, 0), (3, 20)] == sorted((point.count, point.sum) for point in durations)
    settles = telemetry.points("messaging.client.operation.duration")
    assert [("settle", 3)] == [
        (point.attributes["messaging.operation.name"], point.count) for point in settles
    ]


async def test_held_and_discarded_messages_are_counted(rabbit, telemetry):
    """What is held is a level, which ends at 0."""
    rabbit.put(*numbered(3))

    def level():
        [point] = telemetry.points("aio_pika_batch.messages_held")
        return point.value

    async with RecordingConsumer(
        first_then(answering(REQUEUE, REQUEUE, NACK), ack),
        transport=rabbit.transport,
        observers=[telemetry.observer()],
        batch_size=3,
        requeue_delay=None,
    ):
        assert 0 == level()
        await asyncio.sleep(0.5)
        assert 2 == level()
        [discarded] = telemetry.points("aio_pika_batch.messages_discarded")
        assert 1 == discarded.value
        await asyncio.sleep(10)
        assert 0 == level()


@pytest.mark.parametrize("ends_by", ["cut", "stop"])
async def test_held_messages_are_gone_with_their_session(rabbit, telemetry, ends_by):
    """The broker has them again."""
    rabbit.put(*numbered(1))
    consumer = RecordingConsumer(
        answering(REQUEUE),
        transport=rabbit.transport,
        observers=[telemetry.observer()],
        requeue_delay=None,
        batch_timeout=0.1,
        reconnect_delay=1000,
        reconnect_delay_max=1000,
    )
    async with consumer:
        await asyncio.sleep(0.5)
        if ends_by == "cut":
            rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
            rabbit.broker.cut()
            await asyncio.sleep(0.1)
        else:
            await consumer.stop()
        [point] = telemetry.points("aio_pika_batch.messages_held")
        assert 0 == point.value


async def test_a_failed_settlement_is_a_span_with_an_error(telemetry):
    """With its type."""
    script = ScriptedTransport()
    script.on_settle = raising(SessionLost("just now"))
    async with RecordingConsumer(
        ack, transport=script, observers=[telemetry.observer()], batch_size=3
    ):
        script.last.feed(*numbered(3))
        await asyncio.sleep(0.001)
    [settle] = telemetry.spans(SpanKind.CLIENT)
    assert ("settle jobs", StatusCode.ERROR) == (settle.name, settle.status.status_code)
    assert "aio_pika_batch.errors.SessionLost" == settle.attributes["error.type"]
    assert 3 == settle.attributes["messaging.batch.message_count"]


async def test_an_unconfirmed_copy_is_a_span_with_an_error(rabbit, telemetry):
    """With the operation send."""
    rabbit.put(*numbered(1))
    rabbit.broker.faults.on_publish(PublishFault.REFUSE, times=1)
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack),
        transport=rabbit.transport,
        observers=[telemetry.observer()],
        batch_size=1,
    ):
        await asyncio.sleep(10)
    first, *_ = telemetry.spans(SpanKind.CLIENT)
    assert ("send jobs", "unconfirmed") == (first.name, first.attributes["error.type"])
    assert "send" == first.attributes["messaging.operation.type"]


async def test_a_span_that_the_handler_leaves_behind_is_not_the_parent_of_the_settlement(
    rabbit, telemetry
):
    """The settlement belongs to the batch, and the next batch to nothing."""
    tracer = telemetry.traces.get_tracer("careless")

    async def handler(messages):
        attach(trace.set_span_in_context(tracer.start_span("left")))
        for _ in messages:
            yield ACK

    rabbit.put(*numbered(2))
    async with RecordingConsumer(
        handler, transport=rabbit.transport, observers=[telemetry.observer()], batch_size=1
    ):
        await asyncio.sleep(1)
    first, second = telemetry.spans(SpanKind.CONSUMER)
    assert (None, None) == (first.parent, second.parent)
    parents = {each.parent.span_id for each in telemetry.spans(SpanKind.CLIENT)}
    assert parents <= {first.context.span_id, second.context.span_id}


@pytest.mark.parametrize("state", [None, "a=b"])
async def test_each_link_has_the_origin_of_its_own_message(telemetry, state):
    """Neighbours may have the same one, none, or one that must be decoded."""
    one, two = TRACEPARENT, f"00-{TRACE + 1:032x}-{SPAN:016x}-00"
    given = [one, one, None, one, two, two, one, "nonsense", one]
    messages = [
        broker_frames.message(
            encode(
                Properties(
                    headers={
                        name: value
                        for name, value in (("traceparent", each), ("tracestate", state))
                        if value is not None
                    }
                )
            )
        )
        for each in given
    ]
    origin = Origin("C", "jobs", 0)
    observer = telemetry.observer()
    observer.batch_cut(origin, BatchCut(messages, Trigger.SIZE, 0.0))
    observer.batch_handled(origin, BatchHandled(messages, 0.0, None, Trigger.SIZE))
    [span] = telemetry.spans(SpanKind.CONSUMER)
    expected = [origin_of(message) for message in messages]
    assert [each for each in expected if each is not None] == [each.context for each in span.links]
    assert [one, one, one, two, two, one, one] == [
        f"00-{each.context.trace_id:032x}-{each.context.span_id:016x}"
        f"-{each.context.trace_flags:02x}"
        for each in span.links
    ]
    assert {state} == {each.context.trace_state.get("a") and "a=b" for each in span.links}


async def test_the_attributes_of_a_batch_are_its_own(telemetry):
    """Although those of the batch before are used again if they are the same."""
    origin, other = Origin("C", "jobs", 0), Origin("C", "others", 0)
    observer = telemetry.observer()
    runs = [
        (origin, 1, Trigger.SIZE),
        (origin, 1, Trigger.SIZE),
        (origin, 2, Trigger.SIZE),
        (other, 2, Trigger.SIZE),
        (origin, 2, Trigger.TIMEOUT),
    ]
    for who, count, trigger in runs:
        messages = [make_message(b"")] * count
        observer.batch_cut(who, BatchCut(messages, trigger, 0.0))
        observer.batch_handled(who, BatchHandled(messages, 0.0, None, trigger))
    assert [(who.queue, count, trigger.value) for who, count, trigger in runs] == [
        (
            each.attributes["messaging.destination.name"],
            each.attributes["messaging.batch.message_count"],
            each.attributes["aio_pika_batch.trigger"],
        )
        for each in telemetry.spans(SpanKind.CONSUMER)
    ]


@pytest.mark.parametrize(("limit", "links"), [(None, 128), (200, 128), (10, 10)])
async def test_the_limit_of_links_is_logged_once(rabbit, telemetry, caplog, limit, links):
    """The SDK would drop more links silently, so they aren't created."""
    rabbit.put(*numbered(300), properties=Properties(headers={"traceparent": TRACEPARENT}))
    observer = telemetry.observer(max_links=limit)
    async with RecordingConsumer(
        ack, transport=rabbit.transport, observers=[observer], batch_size=150, batch_timeout=1
    ):
        await asyncio.sleep(10)
    assert [links] * 2 == [len(each.links) for each in telemetry.spans(SpanKind.CONSUMER)]
    logged = [each for each in caplog.records if "OTEL_SPAN_LINK_COUNT_LIMIT" in each.getMessage()]
    assert (0 if limit == 200 else 1) == len(logged)


def test_the_limit_of_links_comes_from_the_environment(monkeypatch, telemetry):
    """From the variable of the SDK."""
    monkeypatch.setenv("OTEL_SPAN_LINK_COUNT_LIMIT", "7")
    assert 7 == telemetry.observer()._max_links


@pytest.mark.parametrize("how", ["requeue", "dead letter"])
async def test_a_trace_survives_a_copy(rabbit, telemetry, how):
    """`traceparent` and `tracestate` are unchanged."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    headers = {"traceparent": TRACEPARENT, "tracestate": "a=b"}
    rabbit.put(b"0", properties=Properties(headers=headers))
    consumer = RecordingConsumer(
        first_then(answering(REQUEUE if how == "requeue" else NACK), ack),
        transport=rabbit.transport,
        observers=[telemetry.observer()],
        batch_size=1,
        dead_letter_exchange="dlx",
    )
    async with consumer:
        await asyncio.sleep(10)
    if how == "requeue":
        kept = consumer.messages[1].headers
        assert 1 == consumer.messages[1].retry_count
        assert [TRACE] * 2 == [
            each.links[0].context.trace_id for each in telemetry.spans(SpanKind.CONSUMER)
        ]
    else:
        [dead] = rabbit.broker.ready("dead")
        kept = dead.properties.headers
    assert headers == {name: kept[name] for name in headers}


async def test_trace_headers_link_a_published_message_to_its_batch(rabbit, telemetry):
    """With the other headers kept."""

    class Relay(RecordingConsumer):
        async def process_messages(self, messages):
            for _ in messages:
                await self.publish(b"on", routing_key="next", headers=trace_headers({"a": 1}))
                yield ACK

    rabbit.declare("next")
    rabbit.put(*numbered(1))
    async with Relay(transport=rabbit.transport, observers=[telemetry.observer()]):
        await asyncio.sleep(10)
    [batch] = telemetry.spans(SpanKind.CONSUMER)
    [message] = rabbit.broker.ready("next")
    assert 1 == message.properties.headers["a"]
    traceparent = message.properties.headers["traceparent"]
    assert f"{batch.context.trace_id:032x}-{batch.context.span_id:016x}" in traceparent


def test_server_of_a_url():
    """None if the URL names several, or may contain part of a password."""
    assert ("broker", 5673) == server_of("amqp://me:p%40ss@broker:5673/vhost")
    assert ("broker", 5672) == server_of("amqp://me:pass@broker")
    assert ("::1", 5671) == server_of("amqps://[::1]/?x=1")
    assert ("localhost", 5672) == server_of("amqp://")
    assert server_of("amqp://me:p@ss:w@broker:5673/") is None  # nothing of a password gets out
    for url in ("amqp://a,b", "amqp://a:1,b:2/v", "amqp://a, amqp://b", "memory://x", "nonsense"):
        assert server_of(url) is None


async def test_the_brokers_address_is_on_spans(telemetry):
    """As the conventions require."""
    script = ScriptedTransport()
    async with RecordingConsumer(
        ack,
        transport=script,
        observers=[telemetry.observer()],
        batch_size=1,
        url="amqp://u:p@rabbit:5673/",
    ):
        script.last.feed(*numbered(1))
        await asyncio.sleep(1)
    for span in telemetry.spans():
        assert "rabbit" == span.attributes["server.address"]
        assert 5673 == span.attributes["server.port"]


def test_without_an_sdk_nothing_is_logged(caplog):
    """The API alone does nothing."""
    caplog.set_level(logging.DEBUG)
    assert OpenTelemetryObserver()
    assert [] == caplog.records


hexes = st.text("0123456789abcdef", min_size=1, max_size=34)
parts = st.one_of(
    st.just("00"),
    st.just("01"),
    st.just("ff"),
    st.just("0" * 32),
    st.just("0" * 16),
    st.text("0123456789abcdefA", min_size=32, max_size=32),
    st.text("0123456789abcdef", min_size=16, max_size=16),
    st.text("0123456789abcdef-", min_size=2, max_size=2),
)
likely = st.tuples(
    st.sampled_from(["00", "01", "ff", "0"]),
    st.one_of(st.text("0123456789abcdef", min_size=32, max_size=32), parts),
    st.one_of(st.text("0123456789abcdef", min_size=16, max_size=16), parts),
    st.one_of(st.text("0123456789abcdef", min_size=2, max_size=2), parts),
).map("-".join)
states = st.one_of(st.none(), st.just("a=b"), st.just("a=b,c=d"), st.just("=,"), st.just(""))


@given(st.one_of(likely, likely.map(lambda it: it + "-more"), st.text(max_size=60)), states)
def test_a_traceparent_is_parsed_like_by_the_propagator_of_the_api(traceparent, tracestate):
    """Only faster."""
    headers = {"traceparent": traceparent} | (
        {} if tracestate is None else {"tracestate": tracestate}
    )
    theirs = trace.get_current_span(
        TraceContextTextMapPropagator().extract(headers)
    ).get_span_context()
    ours = origin_of(make_message(b"", headers=headers))
    assert (theirs if theirs.is_valid else None) == ours


@given(tables, st.none() | st.sampled_from([TRACEPARENT, TRACEPARENT[:-1], "nonsense", 1]), states)
def test_a_trace_is_found_in_undecoded_headers(headers, traceparent, tracestate):
    """The result is the same as from decoded headers."""
    stated = {"traceparent": traceparent, "tracestate": tracestate}
    headers = headers | {name: value for name, value in stated.items() if value is not None}
    undecoded = broker_frames.message(
        encode(Properties(headers=headers, content_type="text/plain"))
    )
    assert origin_of(make_message(b"", headers=headers)) == origin_of(undecoded)


def test_undecodable_headers_have_no_trace():
    """No error is raised."""
    encoded = broker_frames.raw_properties(
        headers={"x": True, "tracestate": "a=b", "traceparent": "?"}
    )
    broken = encoded.replace(b"\x01xt", b"\x01x?")
    assert broken != encoded
    assert origin_of(broker_frames.message(broken)) is None


async def test_a_span_that_is_not_recorded_creates_no_links(rabbit, monkeypatch):
    """The headers of its messages aren't read."""
    looked = []
    monkeypatch.setattr("aio_pika_batch.observers.otel._encoded_parts", looked.append)
    rabbit.put(*numbered(3))
    observer = OpenTelemetryObserver(tracer_provider=TracerProvider(ALWAYS_OFF))
    async with RecordingConsumer(
        ack, transport=rabbit.transport, observers=[observer], batch_size=3
    ):
        await asyncio.sleep(1)
    assert [] == rabbit.waiting()
    assert [] == looked


def test_headers_without_a_valid_traceparent_have_no_trace():
    """Whatever value is in its place."""
    for value in (None, 1, b"00", ["x"], {"a": 1}):
        assert origin_of(make_message(b"", headers={"traceparent": value})) is None
    assert origin_of(make_message(b"")) is None
