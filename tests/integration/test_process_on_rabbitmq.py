"""A worker on RabbitMQ does what `process` says."""

from __future__ import annotations

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult, Nack
from aio_pika_batch.testing import make_message, process
from tests.integration.helpers import Recorder, publish, take_all, until

BODIES = [b'{"id": 1}', b'{"id": 2}', b"no JSON", b'{"id": 3}', b"{}", b'{"id": 4}']

FIXED = ("x-dead-letter-reason", "x-dead-letter-detail", "x-exception-type", "x-retry-count")
"""Headers of a dead letter that depend on nothing but the message and its handler."""


class Judge(BatchConsumer):
    """Rejects one order, retries one, and fails to decode some."""

    exception_results = {KeyError: MessageResult.NACK}  # noqa: RUF012  -- as users write it

    async def process_messages(self, messages):
        for message in messages:
            match message.json()["id"]:
                case 2:
                    yield Nack(reason="even")
                case 3 if not message.retry_count:
                    yield MessageResult.REQUEUE
                case _:
                    yield MessageResult.ACK


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_dead_letters_and_retries_are_those_of_process(amqp_url, name, channel, queue_type):
    """The same messages, reasons, headers and keys."""
    recorder = Recorder()
    settings = BatchConsumerSettings(
        url=amqp_url,
        queue_name=name,
        queue_type=queue_type,
        exchange_name=f"{name}.events",
        routing_key="order.created",
        dead_letter_queue=f"{name}.dead",
        batch_timeout=0.2,
        isolate_failures=True,
    )
    consumer = Judge(settings, observers=[recorder])
    given = [
        make_message(body, exchange=f"{name}.events", routing_key="order.created")
        for body in BODIES
    ]
    outcome = await process(consumer, given)

    async with consumer:
        await publish(channel, BODIES, exchange=f"{name}.events", routing_key="order.created")
        await until(lambda: recorder.results["ACK"] == len(BODIES) - len(outcome.dead_lettered))
        dead = await take_all(channel, f"{name}.dead", len(outcome.dead_lettered))

    assert [b'{"id": 1}', b'{"id": 4}'] == [each.body for each in outcome.acked]
    assert [b'{"id": 3}'] == [each.body for each in outcome.requeued]
    assert [each.retry_count for each in outcome.requeued] == recorder.copies
    assert [b'{"id": 2}', b"no JSON", b"{}"] == [each.body for each in outcome.dead_lettered]
    foretold = {
        each.body: (each.exchange, each.routing_key, fixed(each.headers))
        for each in outcome.dead_lettered
    }
    assert foretold == {
        each.body: (each.exchange, each.routing_key, fixed(each.headers)) for each in dead
    }


def fixed(headers):
    """Return the parts that must be equal."""
    return {name: headers[name] for name in FIXED if name in headers}
