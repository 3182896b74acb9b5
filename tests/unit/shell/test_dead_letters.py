"""Dead letters: where exhausted and NACKed messages go, and which headers they get."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from aio_pika_batch import DeadLetterReason, Nack, Requeue
from aio_pika_batch.adapters.memory import EventKind, PublishFault
from aio_pika_batch.core.message import Properties
from aio_pika_batch.observer import DeadLettered, Discarded
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    EventRecorder,
    QueueBroker,
    RecordingConsumer,
    ack,
    answering,
    bodies,
    first_then,
    numbered,
    taking,
)


async def buried(rabbit, answer, count=1, *, kind="fanout", **given):
    """Give messages to a handler, and return what is in the dead-letter queue."""
    recorder = EventRecorder()
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "order.created", kind=kind)
    for body in numbered(count):
        rabbit.put(body, exchange="events", routing_key="order.created")
    async with RecordingConsumer(
        answer,
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=count,
        batch_timeout=1,
        **{"dead_letter_exchange": "dlx"} | given,
    ):
        await asyncio.sleep(5)
        assert [] == rabbit.unsettled()
    return rabbit.broker.ready("dead"), recorder


def reasons(letters):
    """Return the reasons of dead letters."""
    return [letter.headers["x-dead-letter-reason"] for letter in letters]


async def test_a_nack_makes_a_dead_letter_that_says_why(rabbit):
    """With its original routing key, its origin, the time and the number of retries."""
    [letter], recorder = await buried(rabbit, answering(Nack("no such order")))
    assert ("dlx", "order.created") == (letter.exchange, letter.routing_key)
    said = dict(letter.headers)
    for when in ("x-first-failed-at", "x-dead-lettered-at"):
        assert abs((datetime.now(UTC) - said.pop(when)).total_seconds()) < 3600
    assert {
        "x-dead-letter-reason": "rejected",
        "x-dead-letter-detail": "no such order",
        "x-original-queue": "jobs",
        "x-original-exchange": "events",
        "x-original-routing-key": "order.created",
        "x-retry-count": 0,
    } == said
    assert [DeadLetterReason.REJECTED] == [each.reason for each in recorder.of(DeadLettered)]


async def test_a_requeued_message_is_dead_lettered_with_its_original_key(rabbit):
    """A reject would use the queue's name, and miss the binding."""
    letters, recorder = await buried(
        rabbit, answering(Requeue("not now")), kind="direct", max_requeue_attempts=2
    )
    [letter] = letters
    assert ["exhausted"] == reasons(letters)
    assert "order.created" == letter.routing_key
    assert 2 == letter.headers["x-retry-count"]
    assert "not now" == letter.headers["x-dead-letter-detail"]
    assert [DeadLetterReason.EXHAUSTED] == [each.reason for each in recorder.of(DeadLettered)]


async def test_a_dead_letter_names_the_handlers_exception(rabbit):
    """By the class of the exception and its text."""
    letters, _ = await buried(
        rabbit, answering(error=LookupError("no such thing")), unhandled_exception_action=NACK
    )
    assert ["handler-error"] == reasons(letters)
    assert "builtins.LookupError" == letters[0].headers["x-exception-type"]
    assert "no such thing" == letters[0].headers["x-exception-message"]


async def test_the_text_of_an_exception_can_be_left_out(rabbit):
    """It may be confidential: `dead_letter_exception_message=False`."""
    [letter], _ = await buried(
        rabbit,
        answering(error=LookupError("secret")),
        unhandled_exception_action=NACK,
        dead_letter_exception_message=False,
    )
    assert "x-exception-message" not in letter.headers
    assert "builtins.LookupError" == letter.headers["x-exception-type"]


async def test_a_long_exception_text_is_truncated(rabbit):
    """At 1 KiB, since all headers share one frame."""
    [letter], _ = await buried(
        rabbit, answering(error=LookupError("x" * 5000)), unhandled_exception_action=NACK
    )
    assert len(letter.headers["x-exception-message"].encode()) <= 1024


async def test_an_undecodable_message_has_its_own_reason(rabbit):
    """`undecodable`."""

    async def answer(messages):
        for message in messages:
            message.json()
            yield ACK

    rabbit.put(b"{", exchange="events", routing_key="order.created")
    letters, _ = await buried(rabbit, answer, count=2)
    assert ["undecodable"] == reasons(letters)
    assert [b"{"] == [letter.body for letter in letters]


async def test_a_dead_letter_does_not_expire(rabbit):
    """Its expiration becomes a header; otherwise it would expire in the dead-letter queue."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    rabbit.put(b"0", properties=Properties(expiration="60000", message_id="m"))
    async with RecordingConsumer(
        answering(NACK), transport=rabbit.transport, batch_size=1, dead_letter_exchange="dlx"
    ):
        await asyncio.sleep(3600)
    [letter] = rabbit.broker.ready("dead")
    assert letter.properties.expiration is None
    assert "60000" == letter.headers["x-original-expiration"]
    assert "m" == letter.properties.message_id


async def test_the_exchange_and_key_can_be_queue_arguments(rabbit):
    """`x-dead-letter-exchange` and `x-dead-letter-routing-key`, as RabbitMQ has them."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "bin")
    arguments = {"x-dead-letter-exchange": "dlx", "x-dead-letter-routing-key": "bin"}
    rabbit.broker.delete_queue("jobs")
    consumer = RecordingConsumer(
        answering(NACK), transport=rabbit.transport, batch_size=1, queue_arguments=arguments
    )
    async with consumer:
        rabbit.put(b"0")
        await asyncio.sleep(1)
    assert ["rejected"] == reasons(rabbit.broker.ready("dead"))
    assert [] == rabbit.broker.journal.of(EventKind.DEAD_LETTERED)


async def test_a_routing_key_for_dead_letters_replaces_the_original_one(rabbit):
    """`dead_letter_routing_key`; a header has the original key."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "bin")
    rabbit.put(b"0", exchange="events", routing_key="order.created")
    async with RecordingConsumer(
        answering(NACK),
        transport=rabbit.transport,
        batch_size=1,
        dead_letter_exchange="dlx",
        dead_letter_routing_key="bin",
    ):
        await asyncio.sleep(1)
    [letter] = rabbit.broker.ready("dead")
    assert "order.created" == letter.headers["x-original-routing-key"]


async def test_dead_letter_queue_alone_declares_everything(rabbit):
    """Exchange, queue and binding; a second start finds them."""
    for _ in range(2):
        rabbit.put(b"0")
        async with RecordingConsumer(
            answering(NACK), transport=rabbit.transport, batch_size=1, dead_letter_queue="dead"
        ):
            await asyncio.sleep(1)
    assert [b"0", b"0"] == rabbit.waiting("dead")
    assert ("jobs.dlx", "", {}) in rabbit.broker.bindings("dead")


@pytest.mark.parametrize("version", ["3.8", "3.10", "4.0", "4.3"])
async def test_a_declared_dead_letter_queue_has_no_delivery_limit(version):
    """Whatever the broker's default limit is, and however it is lifted."""
    rabbit = QueueBroker(version)
    given = {"queue_type": "quorum", "dead_letter_queue": "dead"}
    async with RecordingConsumer(
        answering(NACK), transport=rabbit.transport, batch_size=1, **given
    ):
        rabbit.put(b"0")
        await asyncio.sleep(1)
    assert [b"0"] == rabbit.waiting("dead")
    looking = RecordingConsumer(
        taking(1, answering(REQUEUE_IMMEDIATE)),
        transport=rabbit.transport,
        queue_name="dead",
        declare=False,
        batch_size=1,
    )
    async with looking:
        await asyncio.sleep(40)
    assert len(looking.batches) > 30
    assert [b"0"] == rabbit.waiting("dead")


async def test_without_an_exchange_messages_are_rejected(rabbit, caplog):
    """A policy may dead-letter them, otherwise they are gone. A WARNING at start says so."""
    rabbit.put(*numbered(2))
    async with RecordingConsumer(
        taking(0, answering(NACK)),
        transport=rabbit.transport,
        batch_size=1,
        observers=[recorder := EventRecorder()],
    ):
        await asyncio.sleep(1)
    rejected = rabbit.broker.journal.of(EventKind.DROPPED)
    assert numbered(2) == [event.body for event in rejected]
    assert [] == rabbit.times(EventKind.PUBLISHED)
    assert [] == recorder.of(DeadLettered)
    warnings = [each.message for each in caplog.records if "dead-letter" in each.message]
    assert all("discards" in each for each in warnings)
    at_start, first, further = warnings
    assert "set dead_letter_queue" in at_start
    assert ["messages=1", "messages=1"] == [each.split()[-1][:-1] for each in (first, further)]
    assert [[b"0"], [b"1"]] == [bodies(each.messages) for each in recorder.of(Discarded)]


@pytest.mark.parametrize(("fault", "within"), [(PublishFault.REFUSE, 1), (PublishFault.LOSE, 100)])
async def test_an_unconfirmed_dead_letter_is_retried_like_a_requeue(rabbit, fault, within, jitter):
    """Its original is held, and acked when the copy is confirmed."""
    rabbit.broker.faults.on_publish(fault, times=1, exchange="dlx")
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    rabbit.put(b"0")
    recorder = EventRecorder()
    async with RecordingConsumer(
        answering(NACK),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=1,
        dead_letter_exchange="dlx",
    ):
        await asyncio.sleep(0.4)
        assert [b"0"] == rabbit.unsettled()
        await asyncio.sleep(within)
        assert [] == rabbit.unsettled()
    assert [b"0"] == rabbit.waiting("dead")
    assert 1 == len(recorder.of(DeadLettered))


@pytest.mark.untraced
async def test_an_exchange_that_routes_nowhere_loses_nothing(rabbit, jitter):
    """If the dead letter is returned, its original stays with the broker."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "elsewhere")
    rabbit.put(b"0")
    async with RecordingConsumer(
        answering(NACK),
        transport=rabbit.transport,
        batch_size=1,
        dead_letter_exchange="dlx",
        requeue_hold=5,
    ) as consumer:
        await asyncio.sleep(3600)
        assert len(consumer.batches) < 3600
    assert [b"0"] == rabbit.waiting()
    assert [] == rabbit.times(EventKind.ACKED)


async def test_a_deleted_exchange_costs_no_message_and_no_session(rabbit, jitter):
    """A missing exchange closes the publisher's channel; the next attempt opens a new one."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    async with RecordingConsumer(
        first_then(answering(NACK), ack),
        transport=rabbit.transport,
        batch_size=1,
        dead_letter_exchange="dlx",
    ) as consumer:
        rabbit.broker.delete_exchange("dlx")
        rabbit.put(*numbered(2))
        await asyncio.sleep(3)
        assert [b"0"] == rabbit.unsettled()
        rabbit.bind("dead", "dlx", "", kind="fanout")
        await asyncio.sleep(60)
        assert 1 == consumer.status().workers[0].epoch
    assert [b"0"] == rabbit.waiting("dead")


async def test_an_invalid_original_routing_key_header_does_no_harm(rabbit, jitter):
    """Any client can write `x-original-routing-key`, even longer than a key may be."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    rabbit.put(b"0", properties=Properties(headers={"x-original-routing-key": "k" * 300}))
    async with RecordingConsumer(
        answering(NACK), transport=rabbit.transport, batch_size=1, dead_letter_exchange="dlx"
    ) as consumer:
        await asyncio.sleep(60)
        assert 1 == consumer.status().workers[0].epoch
    assert [b"0"] == rabbit.waiting("dead")


async def test_an_exhausted_message_is_not_reported_as_requeued(rabbit):
    """Observers can distinguish the two."""
    letters, recorder = await buried(rabbit, answering(REQUEUE), max_requeue_attempts=0)
    assert ["exhausted"] == reasons(letters)
    assert 1 == len(recorder.of(DeadLettered))
