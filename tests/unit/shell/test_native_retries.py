"""Retries and dead letters without copies, over AMQP 1.0 on the broker in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from aio_pika_batch import Cause, DeadLetterReason, Nack, Requeue
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.dead_letters import look, replay
from aio_pika_batch.observer import DeadLettered, Requeued, Settled
from aio_pika_batch.transport import ModifyingSession, Subscription
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    QUEUE,
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

HELD: dict[str, Any] = {"requeue_delay": None, "without_dead_letter": "retry"}
"""The defaults of the library."""

QUORUM: dict[str, Any] = {"queue_type": "quorum", "queue_arguments": {"x-delivery-limit": -1}}


@pytest.fixture(params=["4.0", "4.3"])
async def rabbit(request):
    """A broker whose sessions use AMQP 1.0; the consumers declare their queue."""
    return QueueBroker(request.param, wire="amqp10")


def a_consumer(rabbit, answer, **given: Any) -> RecordingConsumer:
    """A consumer of a quorum queue."""
    options = {"batch_size": 1, **QUORUM, "dead_letter_queue": "dead", **given}
    return RecordingConsumer(answer, transport=rabbit.transport, **options)


def gaps(consumer):
    """Return the seconds between one batch and the next."""
    return [round(later - earlier, 2) for earlier, later in pairwise(consumer.times)]


def copies(rabbit):
    """Return what the consumer has published."""
    return rabbit.times(EventKind.PUBLISHED)


async def test_a_retry_needs_no_copy(rabbit):
    """It is counted, and comes after 1, 2, 4, … seconds, as by default with copies."""
    async with a_consumer(rabbit, answering(REQUEUE), **HELD) as consumer:
        rabbit.put(b"0", routing_key="key", exchange="events")
        await asyncio.sleep(20)
    assert [1, 2, 4] == gaps(consumer)
    assert [0, 1, 2, 3] == [each.retry_count for each in consumer.messages]
    assert {("events", "key")} == {(each.exchange, each.routing_key) for each in consumer.messages}
    assert [b"0"] == rabbit.waiting("dead")
    assert [] == copies(rabbit)


@pytest.mark.parametrize(
    ("given", "result", "expected"),
    [
        ({"requeue_delay": 5}, REQUEUE, [5, 10]),
        ({"requeue_delay": 0}, REQUEUE, [1, 1]),
        ({}, Requeue(delay=0), [1, 1]),
        ({}, Requeue(delay=0.3), [0.3, 0.3]),
        ({}, Requeue(delay=77), [77, 77]),
    ],
)
async def test_the_delays_are_those_of_the_settings_and_the_handler(
    rabbit, given, result, expected
):
    """No queue has to be declared for those that a handler asks for."""
    async with a_consumer(rabbit, answering(result), max_requeue_attempts=2, **given) as consumer:
        rabbit.put(b"0")
        await asyncio.sleep(500)
    assert expected == gaps(consumer)
    assert [] == copies(rabbit)


async def test_own_retries_don_t_use_up_the_delivery_limit_or_look_like_crashes():
    """The broker doesn't count them since 4.3; before, the consumer knows how many it made."""
    for version, arguments in (("4.3", {"x-delivery-limit": 3}), ("4.0", {"x-delivery-limit": -1})):
        rabbit = QueueBroker(version, wire="amqp10")
        consumer = a_consumer(
            rabbit, answering(REQUEUE), max_requeue_attempts=15, queue_arguments=arguments
        )
        async with consumer:
            rabbit.put(b"0")
            await asyncio.sleep(100)
        assert list(range(16)) == [each.retry_count for each in consumer.messages]
        assert [b"0"] == rabbit.waiting("dead")
        assert [] == copies(rabbit)


async def test_a_queue_whose_limit_would_count_retries_uses_copies():
    """Before 4.3, each retry without a copy is a delivery."""
    rabbit = QueueBroker("4.0", wire="amqp10")
    async with a_consumer(
        rabbit, first_then(answering(REQUEUE), ack), queue_arguments={"x-delivery-limit": 5}
    ) as consumer:
        rabbit.put(b"0")
        await asyncio.sleep(5)
    assert 2 == len(consumer.messages)
    assert 1 == len(copies(rabbit))


async def test_a_dead_letter_has_its_reason_and_can_be_replayed(rabbit):
    """The tools read it as they read a copy."""
    answer = answering(Nack("no such customer"), error=None)
    async with a_consumer(rabbit, answer, exchange_name="events", routing_key="key"):
        rabbit.put(b"0", exchange="events", routing_key="key")
        await asyncio.sleep(1)
    assert [] == copies(rabbit)
    [letter] = (await look(rabbit.transport, "dead")).letters
    info = letter.death
    assert ("rejected", "no such customer", QUEUE) == (info.reason, info.detail, info.queue)
    assert info.died_at is not None
    assert info.origin is not None
    assert ("events", "key") == (info.origin.exchange, info.origin.routing_key)
    assert 1 == (await replay(rabbit.transport, "dead")).done
    [again] = rabbit.broker.ready(QUEUE)
    assert ("events", "key") == (again.exchange, again.routing_key)


async def test_messages_that_will_be_copied_are_read_over_amqp_0_9_1(rabbit):
    """AMQP 1.0 doesn't show everything that they contain."""
    rabbit.declare("dead", x_queue_type="quorum", x_delivery_limit=-1)
    for for_copies in (True, False):
        subscription = Subscription(
            queue="dead", prefetch=1, consumer_tag="c", for_copies=for_copies
        )
        async with rabbit.transport.session(subscription) as session:
            assert isinstance(session, ModifyingSession) is not for_copies


async def test_events_are_those_of_copies(rabbit):
    """A requeue with its count, a dead letter with its reason, and both as settled."""
    recorder = EventRecorder()
    answer = first_then(answering(REQUEUE, NACK, ACK), ack)
    async with a_consumer(rabbit, answer, batch_size=3, batch_timeout=0.1, observers=[recorder]):
        rabbit.put(*numbered(3))
        await asyncio.sleep(5)
    [requeued] = recorder.of(Requeued)
    assert (b"0", 1) == (requeued.message.body, requeued.retry_count)
    [died] = recorder.of(DeadLettered)
    assert (b"1", DeadLetterReason.REJECTED) == (died.message.body, died.reason)
    settled = sum(map(Counter, (each.counts for each in recorder.of(Settled))), Counter())
    handler = Cause.HANDLER
    assert {(ACK, handler): 2, (NACK, handler): 1, (REQUEUE, handler): 1} == settled


async def test_messages_that_wait_are_held_only_where_the_broker_can_t_delay_them(rabbit):
    """On 4.3 they use no prefetch."""
    async with a_consumer(rabbit, answering(Requeue(delay=60)), prefetch_count=5) as consumer:
        rabbit.put(*numbered(10))
        await asyncio.sleep(5)
        [status] = consumer.status().workers
        handled = len(consumer.messages)
    # One more than the prefetch count: a session begins with a single message.
    expected = (6, 6) if rabbit.broker.version == "4.0" else (0, 10)
    assert expected == (status.held, handled)


async def test_a_stop_returns_what_is_held_and_leaves_what_is_delayed(rabbit):
    """Nothing is lost or duplicated, and the next consumer goes on."""
    async with a_consumer(rabbit, answering(Requeue(delay=60))):
        rabbit.put(*numbered(4))
        await asyncio.sleep(1)
    left = rabbit.waiting() + bodies(rabbit.broker.delayed(QUEUE))
    assert sorted(numbered(4)) == sorted(left)
    async with a_consumer(rabbit, ack) as consumer:
        await asyncio.sleep(100)
    assert sorted(numbered(4)) == sorted(consumer.handled)
    assert [] == copies(rabbit)


async def test_a_message_that_is_held_at_the_stop_keeps_its_count(rabbit):
    """Otherwise a consumer that restarts often would never exhaust its attempts."""
    for count in range(4):
        async with a_consumer(rabbit, answering(Requeue(delay=60))) as consumer:
            if not count:
                rabbit.put(b"0")
            await asyncio.sleep(1)
        await asyncio.sleep(60)
        assert [count] == [each.retry_count for each in consumer.messages]


async def test_what_is_settled_last_is_carried_out_before_the_session_ends(rabbit):
    """Even if the connection is cut at that moment."""
    async with a_consumer(rabbit, taking(2), concurrency=100, prefetch_count=200) as consumer:
        rabbit.put(*numbered(100))
        await asyncio.sleep(1)
    assert 100 == len(consumer.handled)
    assert [] == rabbit.waiting()
    assert not rabbit.counts(EventKind.REQUEUED, queue=QUEUE)


@pytest.mark.untraced
async def test_a_lost_connection_duplicates_no_retry(rabbit):
    """The broker has one message for each, whenever the connection is lost."""
    async with a_consumer(
        rabbit,
        answering(Requeue(delay=0.2)),
        max_requeue_attempts=1000,
        concurrency=3,
        reconnect_delay=0.1,
    ):
        rabbit.put(*numbered(20))
        for _ in range(30):
            await asyncio.sleep(0.33)
            rabbit.cut()
    await asyncio.sleep(1)  # what the last session held is on its way back
    left = rabbit.waiting() + bodies(rabbit.broker.delayed(QUEUE)) + rabbit.waiting("dead")
    assert sorted(numbered(20)) == sorted(left)


async def test_after_lost_connections_retries_keep_their_delay(rabbit):
    """Messages that came back often are handled alone, and then they are like any other."""
    async with a_consumer(
        rabbit,
        answering(Requeue(delay=10)),
        max_requeue_attempts=1000,
        concurrency=3,
        reconnect_delay=0.1,
    ) as consumer:
        rabbit.put(*numbered(5))
        for _ in range(5):
            await asyncio.sleep(1)
            rabbit.cut()
        await asyncio.sleep(120)
    assert 5 * 12 <= len(consumer.times) <= 5 * (5 + 12)
    assert [] == rabbit.waiting("dead")


@pytest.mark.parametrize("settle", ["batch", "yield", "atomic"])
async def test_every_way_to_settle(rabbit, settle):
    """Each result is carried out, whenever that is."""
    answer = first_then(answering(ACK, REQUEUE, NACK, REQUEUE), ack)
    async with a_consumer(
        rabbit, answer, batch_size=4, batch_timeout=0.1, settle=settle
    ) as consumer:
        rabbit.put(*numbered(4))
        await asyncio.sleep(10)
    assert [b"0", b"1", b"2", b"3", b"1", b"3"] == consumer.handled
    assert [b"2"] == rabbit.waiting("dead")
    assert [] == copies(rabbit) + rabbit.waiting()


async def test_without_a_destination_a_failed_message_is_retried(rabbit, caplog):
    """And reported, although nothing is held on 4.3."""
    async with a_consumer(
        rabbit, answering(REQUEUE), dead_letter_queue=None, max_requeue_attempts=1, **HELD
    ) as consumer:
        rabbit.put(b"0")
        await asyncio.sleep(60)
    assert [1, 1, 2, 4, 8, 16] == gaps(consumer)[:6]
    assert [b"0"] == rabbit.waiting() + bodies(rabbit.broker.delayed(QUEUE))
    assert any("no dead-letter destination is known" in each for each in caplog.messages)
    assert [] == copies(rabbit)


async def test_messages_of_a_process_that_is_killed_again_and_again_are_not_copied():
    """Those that came back often are handled alone, and the others go back meanwhile."""
    rabbit = QueueBroker("4.3", wire="amqp10")
    rabbit.declare(QUEUE, x_queue_type="quorum", x_delivery_limit=20)
    rabbit.put(*numbered(30))
    for _ in range(4):
        consumer = a_consumer(
            rabbit,
            taking(60),
            batch_size=10,
            shutdown_timeout=0.1,
            dead_letter_queue=None,
            queue_arguments={"x-delivery-limit": 20},
        )
        await consumer.start()
        await asyncio.sleep(10)
        rabbit.cut()
        await consumer.stop()
    async with a_consumer(
        rabbit,
        ack,
        batch_size=10,
        num_workers=2,
        dead_letter_queue=None,
        queue_arguments={"x-delivery-limit": 20},
    ) as consumer:
        await asyncio.sleep(60)
    assert sorted(numbered(30)) == sorted(consumer.handled)
    assert [] == copies(rabbit) + rabbit.waiting()


async def test_a_delay_queue_is_declared_only_if_amqp_0_9_1_has_to_be_used():
    """With the setting, none is declared at the start."""
    for wire, queues in (("amqp10", 0), ("auto", 1)):
        rabbit = QueueBroker("4.3", wire=wire)
        answer = first_then(answering(REQUEUE), ack)
        async with a_consumer(rabbit, answer, wire="amqp10", requeue_delay=5) as consumer:
            assert not [each for each in rabbit.broker.queues if ".retry." in each]
            rabbit.put(b"0")
            await asyncio.sleep(20)
        assert [5] == gaps(consumer)
        assert queues == len([each for each in rabbit.broker.queues if ".retry." in each])


async def test_messages_that_were_requeued_at_once_are_not_suspected_after_a_retry(rabbit, caplog):
    """The broker's count goes on, although the retry changes the message."""
    at_once, later = answering(REQUEUE_IMMEDIATE), answering(Requeue(delay=1))
    answer = first_then(*[at_once] * 4, later, at_once, later, ack)
    async with a_consumer(rabbit, answer) as consumer:
        rabbit.put(b"0")
        await asyncio.sleep(30)
    assert [0, 0, 0, 0, 0, 1, 1, 2] == [each.retry_count for each in consumer.messages]
    assert consumer.messages[-1].delivery_count
    assert "came back repeatedly" not in caplog.text
