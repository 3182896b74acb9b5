"""Delayed retries: when messages come back, and what happens without a wait queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aio_pika_batch import Message, Outcome, Requeue
from aio_pika_batch.adapters.memory import EventKind, MemoryTransport
from aio_pika_batch.core.message import Properties
from aio_pika_batch.errors import BrokerUnavailable
from aio_pika_batch.testing.virtual_time import run
from tests.unit.shell.helpers import (
    ACK,
    QUEUE,
    REQUEUE,
    QueueBroker,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, never, raising

pytestmark = pytest.mark.usefixtures("jitter")


def requeueing(**how: Any) -> Callable[..., Any]:
    """Return a handler that always requeues with the same delay."""

    async def answer(messages: Sequence[Message]) -> Any:
        for _ in messages:
            yield Requeue(**how)

    return answer


def waiting(rabbit: QueueBroker, level: int, queue: str = QUEUE) -> list[bytes]:
    """Return what waits in a wait queue."""
    return rabbit.waiting(f"{queue}.retry.{level}")


def wait_queues(rabbit: QueueBroker) -> list[str]:
    """Return the names of the wait queues."""
    return [each for each in rabbit.broker.queues if ".retry." in each]


def warnings_about_queues(caplog: Any) -> list[str]:
    """Return the log lines about delay queues that can't be used."""
    return [
        each.message
        for each in caplog.records
        if "delay queues can't be used" in each.message and each.levelno == logging.WARNING
    ]


# --- in time --------------------------------------------------------------------------


async def test_delays_double_until_the_message_is_dead_lettered(rabbit):
    """One second, two, four, and then the dead letter."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        requeueing(),
        transport=rabbit.transport,
        requeue_delay=1,
        batch_size=1,
        dead_letter_queue="dead",
    ) as consumer:
        assert [f"{QUEUE}.retry.{level}" for level in (1000, 2000, 4000)] == wait_queues(rabbit)
        await asyncio.sleep(20)
    assert [0, 1, 3, 7] == [round(at - consumer.times[0], 3) for at in consumer.times]
    assert [0, 1, 2, 3] == [each.retry_count for each in consumer.messages]
    assert [b"0"] == rabbit.waiting("dead")


async def test_failures_are_delayed_too(rabbit):
    """An exception, a missing result or a timeout, like a REQUEUE."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(error=ValueError("x")), answering(), ack),
        transport=rabbit.transport,
        requeue_delay=5,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(60)
    assert [0, 5, 15] == [round(at - consumer.times[0], 3) for at in consumer.times]


async def test_a_handler_can_set_a_delay(rabbit):
    """It is rounded up to the next level, or down to the maximum; zero means no delay."""
    rabbit.put(b"0")
    answers = [Requeue(delay=each) for each in (3, 1000, 0)]
    async with RecordingConsumer(
        first_then(*map(answering, answers), ack),
        transport=rabbit.transport,
        requeue_delay=1,
        requeue_delay_max=60,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(100)
    assert [0, 4, 64, 64] == [round(at - consumer.times[0], 3) for at in consumer.times]


async def test_levels_of_handlers_are_declared_on_first_use(rabbit):
    """Without `requeue_delay` a consumer declares no queue that it does not need."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(
        first_then(answering(REQUEUE, Requeue(delay=2), Requeue(delay=5)), ack),
        transport=rabbit.transport,
        batch_size=3,
        batch_timeout=0.5,
    )
    async with consumer:
        assert [] == wait_queues(rabbit)
        await asyncio.sleep(1)
        assert {f"{QUEUE}.retry.2000", f"{QUEUE}.retry.8000"} == set(wait_queues(rabbit))
        assert ([b"1"], [b"2"]) == (waiting(rabbit, 2000), waiting(rabbit, 8000))
        await asyncio.sleep(60)
    assert [numbered(3), [b"0"], [b"1"], [b"2"]] == consumer.batches
    # The time that a batch waits for more comes on top.
    assert [0, 0.5, 2.5, 8.5] == [round(at - consumer.times[0], 3) for at in consumer.times]


@given(st.lists(st.sampled_from([0.5, 1, 2, 3, 4, 7, 20]), min_size=1, max_size=12))
@hypothesis_settings(deadline=None)
def test_a_delay_does_not_hold_up_another(delays):
    """Each message comes back after its own delay, whatever else waits."""

    async def story() -> None:
        rabbit = QueueBroker()
        rabbit.declare()
        rabbit.put(*numbered(len(delays)))
        done: dict[int, float] = {}
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def answer(messages):
            for message in messages:
                if message.retry_count:
                    done[int(message.body)] = loop.time() - began
                    yield ACK
                else:
                    yield Requeue(delay=delays[int(message.body)])

        async with RecordingConsumer(answer, transport=rabbit.transport, batch_size=1):
            await asyncio.sleep(60)
        levels = [next(each for each in (1, 2, 4, 8, 32) if each >= delay) for delay in delays]
        assert dict(enumerate(levels)) == {key: round(at, 2) for key, at in done.items()}

    run(story())


async def test_a_message_waits_after_its_consumer_has_stopped(rabbit):
    """The next consumer gets what has come back meanwhile."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        requeueing(), transport=rabbit.transport, requeue_delay=10, batch_size=1
    ) as first:
        await asyncio.sleep(1)
    assert ([b"0"], [b"0"], []) == (first.handled, waiting(rabbit, 10_000), rabbit.unsettled())
    await asyncio.sleep(60)
    async with RecordingConsumer(
        transport=rabbit.transport, requeue_delay=10, batch_size=1
    ) as second:
        await asyncio.sleep(1)
    assert [1] == [each.retry_count for each in second.messages]


# --- what it is like when it comes back ---------------------------------------------------


async def test_a_delayed_message_comes_back_unchanged(rabbit):
    """With its properties, its origin and its count; a header has its expiration."""
    was = Properties(
        headers={"kept": 1, "x-death": [{"queue": QUEUE, "reason": "expired", "count": 1}]},
        expiration="600000",
        message_id="m",
        priority=7,
    )
    rabbit.put(b"0", properties=was, exchange="events", routing_key="order.created")
    async with RecordingConsumer(
        first_then(requeueing(), ack), transport=rabbit.transport, requeue_delay=1, batch_size=1
    ) as consumer:
        await asyncio.sleep(5)
    back = consumer.messages[1]
    assert ("m", 7, None) == (back.message_id, back.priority, back.expiration)
    assert ("events", "order.created") == (back.original_exchange, back.original_routing_key)
    assert ("", QUEUE) == (back.exchange, back.routing_key)
    assert 1 == back.headers["kept"] == back.retry_count
    assert "600000" == back.headers["x-original-expiration"]
    assert [f"{QUEUE}.retry.1000"] == [each["queue"] for each in back.headers["x-death"]]


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
async def test_a_message_that_was_dead_lettered_here_before_comes_back(version):
    """Before 4.0 the broker would detect a cycle in the `x-death` of a copy, and drop it."""
    rabbit = QueueBroker(version)
    rabbit.transport = MemoryTransport(rabbit.broker, version=version)
    rabbit.declare()
    death = {"queue": QUEUE, "reason": "expired", "count": 1}
    rabbit.put(b"0", properties=Properties(headers={"x-death": [death]}))
    async with RecordingConsumer(
        first_then(requeueing(delay=1), requeueing(delay=1), ack),
        transport=rabbit.transport,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(10)
    assert [0, 1, 2] == [each.retry_count for each in consumer.messages]


async def test_the_expiration_returns_with_the_next_undelayed_copy(rabbit):
    """A delayed copy has none; an undelayed one has it again."""
    rabbit.put(b"0", properties=Properties(expiration="600000"))
    answers = [Requeue(delay=1), Requeue(delay=2), Requeue(delay=0)]
    async with RecordingConsumer(
        first_then(*map(answering, answers), ack), transport=rabbit.transport, batch_size=1
    ) as consumer:
        await asyncio.sleep(10)
    assert [600, None, None, 600] == [each.expiration for each in consumer.messages]
    told = [each.headers.get("x-original-expiration") for each in consumer.messages]
    assert [None, "600000", "600000", None] == told


async def test_a_short_expiration_does_not_shorten_a_delay(rabbit):
    """Nor does it hold up the messages behind it."""
    rabbit.put(b"0", properties=Properties(expiration="100"))
    async with RecordingConsumer(
        first_then(requeueing(delay=1), ack), transport=rabbit.transport, batch_size=1
    ) as consumer:
        await asyncio.sleep(5)
    assert [0, 1] == [round(at - consumer.times[0], 3) for at in consumer.times]


# --- what must not be lost --------------------------------------------------------------


async def test_a_message_keeps_waiting_while_its_queue_is_full(rabbit):
    """The wait queue keeps it until there is room."""
    full = {
        "queue_name": "full",
        "queue_arguments": {"x-max-length": 1, "x-overflow": "reject-publish"},
        "batch_size": 1,
    }
    async with RecordingConsumer(requeueing(delay=1), transport=rabbit.transport, **full) as first:
        await first.publish(b"0", routing_key="full")
        await asyncio.sleep(0.5)
    rabbit.put(b"in the way", queue="full")
    await asyncio.sleep(60)
    assert [b"in the way"] == rabbit.waiting("full")
    async with RecordingConsumer(transport=rabbit.transport, **full) as second:
        await asyncio.sleep(1)
    assert [b"in the way", b"0"] == second.handled
    assert [] == rabbit.broker.journal.of(EventKind.DROPPED)


@pytest.mark.parametrize("kind", ["queue_exclusive", "queue_auto_delete"])
async def test_messages_wait_for_a_deleted_queue_to_be_declared_again(rabbit, kind):
    """Wait queues outlive a queue that is deleted with its consumer."""
    more = {"queue_name": "brief", kind: True, "batch_size": 1, "requeue_delay": 1}
    async with RecordingConsumer(requeueing(), transport=rabbit.transport, **more) as first:
        await first.publish(b"0", routing_key="brief")
        await asyncio.sleep(0.5)
    assert "brief" not in rabbit.broker.queues
    await asyncio.sleep(60)
    async with RecordingConsumer(transport=rabbit.transport, **more) as second:
        await asyncio.sleep(1)
    assert [b"0"] == second.handled


@pytest.mark.parametrize("more", [{"requeue_delay": 1}, {}])
async def test_a_deleted_wait_queue_is_declared_again(rabbit, more):
    """A returned copy reveals it; the original is held meanwhile."""

    async def deleting(messages):
        rabbit.broker.delete_queue(f"{QUEUE}.retry.1000")
        for _ in messages:
            yield Requeue(delay=1)

    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(requeueing(delay=1), deleting, ack),
        transport=rabbit.transport,
        batch_size=1,
        **more,
    ) as consumer:
        await asyncio.sleep(10)
    assert [0, 1, 2] == [each.retry_count for each in consumer.messages]
    assert f"{QUEUE}.retry.1000" in wait_queues(rabbit)


async def test_with_a_different_wait_queue_the_consumer_holds_the_retries(rabbit, caplog):
    """They are as late and as many as they should be, and one line says so."""
    rabbit.declare(f"{QUEUE}.retry.1000", **{"x-message-ttl": 5})
    rabbit.put(*numbered(2))
    async with RecordingConsumer(
        first_then(requeueing(delay=1), requeueing(delay=1), ack),
        transport=rabbit.transport,
        batch_size=2,
        batch_timeout=0.1,
        prefetch_count=10,
    ) as consumer:
        await asyncio.sleep(0.5)
        assert numbered(2) == sorted(rabbit.unsettled())
        assert 2 == consumer.status().workers[0].held
        await asyncio.sleep(60)
    assert [0, 0, 1, 1, 2, 2] == [each.retry_count for each in consumer.messages]
    assert [0, 1, 2] == [round(at - consumer.times[0], 3) for at in consumer.times]
    [line] = warnings_about_queues(caplog)
    assert "inequivalent arg" in line
    assert "let the queue run empty and delete it" in line


async def test_a_different_wait_queue_does_not_affect_other_levels(rabbit):
    """Messages of other levels, or without a delay, are not held up."""
    rabbit.declare(f"{QUEUE}.retry.1000")
    rabbit.put(*numbered(3))
    answers = answering(Requeue(delay=1), Requeue(delay=2), REQUEUE)
    async with RecordingConsumer(
        first_then(answers, ack),
        transport=rabbit.transport,
        batch_size=3,
        batch_timeout=0.1,
        prefetch_count=10,
    ) as consumer:
        await asyncio.sleep(5)
    assert [numbered(3), [b"2"], [b"0"], [b"1"]] == consumer.batches


# --- whose queues they are ---------------------------------------------------------------


async def test_without_declaring_the_wait_queues_are_used_if_they_exist(rabbit, caplog):
    """Otherwise the consumer holds the retries, and says so at its start."""
    given = {"transport": rabbit.transport, "requeue_delay": 1, "declare": False, "batch_size": 1}
    rabbit.put(b"0")
    async with RecordingConsumer(first_then(requeueing(), ack), **given) as holding:
        await asyncio.sleep(0.5)
        assert [b"0"] == rabbit.unsettled()
        await asyncio.sleep(5)
    assert [0, 1] == [round(at - holding.times[0], 3) for at in holding.times]
    [line] = warnings_about_queues(caplog)
    assert "no queue 'jobs.retry.1000'" in line
    for level in (1000, 2000, 4000):
        how = {"x-message-ttl": level, "x-dead-letter-exchange": ""}
        rabbit.declare(f"{QUEUE}.retry.{level}", **how, **{"x-dead-letter-routing-key": QUEUE})
    rabbit.put(b"1")
    async with RecordingConsumer(first_then(requeueing(), ack), **given) as waiting_outside:
        await asyncio.sleep(0.5)
        assert [] == rabbit.unsettled()
        assert [b"1"] == waiting(rabbit, 1000)
        await asyncio.sleep(5)
    assert [0, 1] == [each.retry_count for each in waiting_outside.messages]


async def test_a_queue_whose_name_is_too_long_for_delays(rabbit, caplog):
    """A handler's delay is possible all the same."""
    name = "q" * 250
    rabbit.declare(name)
    rabbit.put(b"0", queue=name)
    async with RecordingConsumer(
        first_then(requeueing(delay=1), ack),
        transport=rabbit.transport,
        queue_name=name,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(5)
    assert [0, 1] == [round(at - consumer.times[0], 3) for at in consumer.times]
    [line] = warnings_about_queues(caplog)
    assert "more than 255 bytes" in line


# --- brokers that are too old --------------------------------------------------------------


@pytest.fixture
async def old_rabbit() -> QueueBroker:
    """RabbitMQ 3.8, with a queue."""
    made = QueueBroker("3.8")
    made.transport = MemoryTransport(made.broker, version="3.8")
    made.declare()
    return made


@pytest.mark.parametrize("given", [{"requeue_delay": 1}, {}])
async def test_on_an_old_broker_the_consumer_holds_the_retries(old_rabbit, caplog, given):
    """The broker would accept the queue, and lose messages that expire into a full one."""
    old_rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(requeueing(**({} if given else {"delay": 1})), ack),
        transport=old_rabbit.transport,
        batch_size=1,
        **given,
    ) as consumer:
        await asyncio.sleep(5)
    assert [0, 1] == [round(at - consumer.times[0], 3) for at in consumer.times]
    assert [0, 1] == [each.retry_count for each in consumer.messages]
    assert [] == wait_queues(old_rabbit)
    [line] = warnings_about_queues(caplog)
    assert "RabbitMQ 3.8 may lose" in line


# --- declaring -----------------------------------------------------------------------------


@pytest.fixture
async def script() -> ScriptedTransport:
    """A scripted transport."""
    return ScriptedTransport()


def declared(script: ScriptedTransport) -> list[str]:
    """Return the declared wait queues, in order."""
    names = [queue.name for topology in script.details("declare") for queue in topology.queues]
    return [name for name in names if ".retry." in name]


async def test_a_level_is_declared_once_for_all_batches(script):
    """Also for batches that need it while it is being declared."""

    async def slow():
        await asyncio.sleep(1)

    async with RecordingConsumer(
        requeueing(delay=1),
        transport=script,
        batch_size=1,
        concurrency=3,
        prefetch_count=10,
    ):
        script.on_declare = slow
        script.last.feed(*numbered(5))
        await asyncio.sleep(5)
        script.last.feed(*numbered(5))
        await asyncio.sleep(5)
        assert [f"{QUEUE}.retry.1000"] == declared(script)
        assert 10 == sum(map(len, script.details("publish")))
        assert min(script.times("publish")) >= script.times("declare")[-1] + 1


async def test_wait_queues_are_declared_with_the_rest_at_start(script):
    """Right after it; later retries declare nothing."""
    async with RecordingConsumer(requeueing(), transport=script, requeue_delay=1, batch_size=1):
        script.last.feed(b"0")
        await asyncio.sleep(5)
        assert 2 == len(script.details("declare"))
        assert [f"{QUEUE}.retry.{level}" for level in (1000, 2000, 4000)] == declared(script)


async def test_a_declaration_is_repeated_if_the_broker_is_unreachable(script, caplog):
    """With each attempt to publish the copy, and with one log line."""
    async with RecordingConsumer(
        requeueing(delay=1), transport=script, batch_size=1, prefetch_count=10
    ):
        script.on_declare = raising(BrokerUnavailable("connection refused"))
        script.last.feed(b"0")
        await asyncio.sleep(10)
        tries = len(declared(script))
        assert 3 <= tries <= 6
        assert [] == script.details("publish")
        lines = [each for each in caplog.messages if "can't be declared for now" in each]
        assert 1 == len(lines)
        script.on_declare = ScriptedTransport().on_declare
        await asyncio.sleep(10)
        assert tries + 1 == len(declared(script))
        assert [("ack", (1,))] == [each for details in script.details("settle") for each in details]


async def test_a_stop_does_not_wait_for_a_declaration(script):
    """A declaration that never ends is abandoned with the drain; the original goes back."""
    async with RecordingConsumer(
        requeueing(delay=1), transport=script, batch_size=1, shutdown_timeout=5
    ) as consumer:
        script.on_declare = never
        script.last.feed(b"0")
        await asyncio.sleep(1)
    assert not consumer.is_running
    assert [] == script.details("publish")
    assert [] == script.details("settle")


async def test_an_unexpected_error_of_a_transport_ends_the_session(script):
    """A redelivery is better than messages that stay unsettled forever."""
    async with RecordingConsumer(requeueing(delay=1), transport=script, batch_size=1):
        script.on_declare = raising(RuntimeError("a bug"))
        script.last.feed(b"0")
        await asyncio.sleep(0.1)
        script.on_declare = ScriptedTransport().on_declare
        await asyncio.sleep(5)
        assert 2 == len(script.sessions)


async def test_a_returned_copy_is_published_again(script):
    """After the wait queue has been declared again."""
    script.outcomes = [Outcome.CONFIRMED, Outcome.RETURNED]
    async with RecordingConsumer(
        requeueing(delay=1), transport=script, batch_size=1, prefetch_count=10
    ):
        script.last.feed(b"0")
        await asyncio.sleep(1)
        script.last.feed(b"1")
        await asyncio.sleep(5)
        assert 2 == len(declared(script))
        assert [[b"0"], [b"1"], [b"1"]] == script.details("publish")
