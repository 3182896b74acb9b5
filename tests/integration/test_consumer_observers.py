"""Prometheus and OpenTelemetry observers of a consumer on RabbitMQ."""

from __future__ import annotations

import asyncio

import aio_pika
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.observers.otel import OpenTelemetryObserver, trace_headers
from aio_pika_batch.observers.prometheus import PrometheusObserver
from aio_pika_batch.transport import server_of
from tests.integration.helpers import PATIENCE, until

PRODUCERS = [f"00-{0xABC0 + number:032x}-{0xDEF0 + number:016x}-01" for number in range(3)]


class Once(BatchConsumer):
    """Acks, except at the first delivery: the second is retried, the third dead-lettered."""

    async def process_messages(self, messages):
        """Yield results, and publish with the trace."""
        for message in messages:
            if message.body == b"0":
                await self.publish(b"on", routing_key=self.next, headers=trace_headers())
            if message.body == b"1" and not message.retry_count:
                yield MessageResult.REQUEUE
            elif message.body == b"2":
                yield MessageResult.NACK
            else:
                yield MessageResult.ACK


def value_of(registry, name, **labels):
    """Return the value of one series, as Prometheus reads it."""
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.name == f"aio_pika_batch_{name}" and labels.items() <= sample.labels.items():
                return sample.value
    return 0


async def test_a_trace_goes_through_retry_and_dead_letter(amqp_url, name, channel):
    """From its producer to each of its batches, and into what is published there."""
    spans = InMemorySpanExporter()
    traces = TracerProvider()
    traces.add_span_processor(SimpleSpanProcessor(spans))
    reader = InMemoryMetricReader()
    registry = CollectorRegistry()
    observers = [
        PrometheusObserver(registry),
        OpenTelemetryObserver(tracer_provider=traces, meter_provider=MeterProvider([reader])),
    ]
    following = await channel.declare_queue(f"{name}.next", auto_delete=True)
    settings = BatchConsumerSettings(
        _env_file=None,
        url=amqp_url,
        queue_name=name,
        batch_size=3,
        batch_timeout=0.2,
        dead_letter_queue=f"{name}.dead",
    )
    consumer = Once(settings, observers=observers)
    consumer.next = following.name
    async with consumer:
        for number, traceparent in enumerate(PRODUCERS):
            message = aio_pika.Message(b"%d" % number, headers={"traceparent": traceparent})
            await channel.default_exchange.publish(message, name)
        await until(
            lambda: (
                value_of(registry, "messages_settled_total", result="ack") == 2
                and value_of(registry, "dead_letters_total") == 1
            )
        )
        assert 1 == value_of(registry, "worker_up")
    dead_letters = await channel.declare_queue(f"{name}.dead", passive=True)
    dead = await dead_letters.get(timeout=PATIENCE)
    passed_on = await following.get(timeout=PATIENCE)
    await dead.ack()
    await passed_on.ack()

    batches = [each for each in spans.get_finished_spans() if each.kind is SpanKind.CONSUMER]
    linked = [
        f"00-{link.context.trace_id:032x}-{link.context.span_id:016x}-01"
        for batch in batches
        for link in batch.links
    ]
    assert [*PRODUCERS, PRODUCERS[1]] == linked
    assert PRODUCERS[2] == dead.headers["traceparent"]
    ids = {f"{each.context.trace_id:032x}-{each.context.span_id:016x}" for each in batches}
    assert passed_on.headers["traceparent"][3:-3] in ids
    settles = [each for each in spans.get_finished_spans() if each.kind is SpanKind.CLIENT]
    assert {each.context.span_id for each in batches} == {each.parent.span_id for each in settles}
    server = server_of(amqp_url)
    assert server is not None
    assert {server} == {
        (each.attributes["server.address"], each.attributes["server.port"])
        for each in spans.get_finished_spans()
    }
    assert 4 == value_of(registry, "messages_received_total")
    assert 1 == value_of(registry, "messages_settled_total", result="requeue")
    assert 0 == value_of(registry, "worker_up")
    await asyncio.gather(
        channel.queue_delete(name),
        channel.queue_delete(f"{name}.dead"),
        channel.exchange_delete(f"{name}.dlx"),
    )
