"""When does a message come back that shall wait, and what if it cannot wait where it should?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aio_pika_batch import Message, Outcome, Requeue, TopologyError
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
    """A handler that asks for the same delay each time."""

    async def answer(messages: Sequence[Message]) -> Any:
        for _ in messages:
            yield Requeue(**how)

    return answer


def waiting(rabbit: QueueBroker, level: int, queue: str = QUEUE) -> list[bytes]:
    """What waits in a wait queue."""
    return rabbit.waiting(f"{queue}.retry.{level}")


def wait_queues(rabbit: QueueBroker) -> list[str]:
    """The wait queues that there are."""
    return [each for each in rabbit.broker.queues if ".retry." in each]


def complaints_of_no_queue(caplog: Any, level: int = logging.ERROR) -> list[str]:
    """What the log says about wait queues that cannot be had."""
    return [
        each.message
        for each in caplog.records
        if "no wait queue" in each.message and each.levelno == level
    ]


# --- in time --------------------------------------------------------------------------


async def test_retries_climb_the_ladder(rabbit):
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


async def test_a_failure_waits_too(rabbit):
    """An exception, an early end, a time-out: REQUEUE by whatever way."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(error=ValueError("x")), answering(), ack),
        transport=rabbit.transport,
        requeue_delay=5,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(60)
    assert [0, 5, 15] == [round(at - consumer.times[0], 3) for at in consumer.times]


async def test_a_handler_may_ask_for_a_delay_of_its_own(rabbit):
    """The nearest level at or above; the maximum, if there is none; none at all, if it says so."""
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


async def test_levels_that_only_handlers_ask_for_are_declared_on_first_use(rabbit):
    """Without `requeue_delay` no consumer makes queues that it does not need."""
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
def test_no_wait_holds_up_another(delays):
    """Whatever waits beside it, each message comes back when its own level is over."""

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


async def test_a_message_waits_although_its_consumer_has_gone(rabbit):
    """A consumer that stops holds nothing; the next one gets what has come back meanwhile."""
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


async def test_a_message_comes_back_as_what_it_was(rabbit):
    """With its properties, its origin and its count; its expiration is told by a header."""
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
async def test_a_message_that_has_died_here_before_comes_back(version):
    """Before 4.0 the broker would see a circle in the x-death of a copy, and drop it."""
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


async def test_an_expiration_is_back_with_the_next_copy_that_does_not_wait(rabbit):
    """On the way to a wait queue it must go; straight to the queue it counts again."""
    rabbit.put(b"0", properties=Properties(expiration="600000"))
    answers = [Requeue(delay=1), Requeue(delay=2), Requeue(delay=0)]
    async with RecordingConsumer(
        first_then(*map(answering, answers), ack), transport=rabbit.transport, batch_size=1
    ) as consumer:
        await asyncio.sleep(10)
    assert [600, None, None, 600] == [each.expiration for each in consumer.messages]
    told = [each.headers.get("x-original-expiration") for each in consumer.messages]
    assert [None, "600000", "600000", None] == told


async def test_a_short_expiration_does_not_end_a_wait(rabbit):
    """Nor does it keep others waiting that stand behind it."""
    rabbit.put(b"0", properties=Properties(expiration="100"))
    async with RecordingConsumer(
        first_then(requeueing(delay=1), ack), transport=rabbit.transport, batch_size=1
    ) as consumer:
        await asyncio.sleep(5)
    assert [0, 1] == [round(at - consumer.times[0], 3) for at in consumer.times]


# --- what must not be lost --------------------------------------------------------------


async def test_what_expires_into_a_full_queue_waits_on(rabbit):
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
async def test_what_belongs_to_a_queue_that_is_gone_waits_for_the_next_of_that_name(rabbit, kind):
    """Wait queues outlive a queue that goes with its consumer."""
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
async def test_a_wait_queue_that_was_deleted_is_declared_again(rabbit, more):
    """A returned copy tells; its original is held meanwhile."""

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


async def test_a_wait_queue_that_is_something_else_is_complained_of_once(rabbit, caplog):
    """Originals are held, then given back: never lost, never early, and no hot loop."""
    rabbit.declare(f"{QUEUE}.retry.1000", **{"x-message-ttl": 5})
    rabbit.put(*numbered(2))
    async with RecordingConsumer(
        requeueing(delay=1),
        transport=rabbit.transport,
        batch_size=2,
        prefetch_count=10,
        requeue_hold=10,
    ) as consumer:
        await asyncio.sleep(60)
    assert 2 * 4 <= len(consumer.handled) <= 2 * 8
    assert {0} == {each.retry_count for each in consumer.messages}
    assert sorted(rabbit.waiting()) == numbered(2)
    [line] = complaints_of_no_queue(caplog)
    assert "inequivalent arg" in line
    assert "let the queue run empty and delete it" in line


async def test_others_do_not_suffer_from_a_wait_queue_that_cannot_be_had(rabbit):
    """What waits elsewhere, or not at all, goes its way."""
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
        assert [numbered(3), [b"2"], [b"1"]] == consumer.batches
        assert [b"0"] == rabbit.unsettled()


# --- whose queues they are ---------------------------------------------------------------


async def test_where_nothing_is_declared_the_ladder_must_be_there(rabbit):
    """At the start, like everything else."""
    consumer = RecordingConsumer(transport=rabbit.transport, requeue_delay=1, declare=False)
    with pytest.raises(TopologyError, match=r"queue 'jobs.retry.1000'.*no queue"):
        await consumer.start()
    for level in (1000, 2000, 4000):
        rabbit.declare(f"{QUEUE}.retry.{level}")
    async with consumer:
        assert consumer.is_healthy


async def test_where_nothing_is_declared_a_level_of_its_own_is_asked_for(rabbit, caplog):
    """Missing, it is complained of; and used once somebody has made it."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(requeueing(delay=1), ack),
        transport=rabbit.transport,
        batch_size=1,
        declare=False,
    ) as consumer:
        await asyncio.sleep(5)
        assert [b"0"] == rabbit.unsettled()
        assert [] == wait_queues(rabbit)
        [line] = complaints_of_no_queue(caplog)
        assert "no queue 'jobs.retry.1000'" in line
        how = {"x-message-ttl": 1000, "x-dead-letter-exchange": ""}
        rabbit.declare(f"{QUEUE}.retry.1000", **how, **{"x-dead-letter-routing-key": QUEUE})
        await asyncio.sleep(10)
    assert [0, 1] == [each.retry_count for each in consumer.messages]


async def test_a_queue_whose_name_is_too_long_for_delays(rabbit, caplog):
    """A delay that a handler asks for cannot be had there; nothing is sent, nothing is lost."""
    name = "q" * 250
    rabbit.declare(name)
    rabbit.put(b"0", queue=name)
    async with RecordingConsumer(
        requeueing(delay=1), transport=rabbit.transport, queue_name=name, batch_size=1
    ):
        await asyncio.sleep(5)
        assert [b"0"] == rabbit.unsettled(name)
    assert [b"0"] == rabbit.waiting(name)
    [line] = complaints_of_no_queue(caplog)
    assert "more than 255 bytes" in line


# --- brokers that are too old --------------------------------------------------------------


@pytest.fixture
async def old_rabbit() -> QueueBroker:
    """RabbitMQ 3.8, with a queue."""
    made = QueueBroker("3.8")
    made.transport = MemoryTransport(made.broker, version="3.8")
    made.declare()
    return made


@pytest.mark.parametrize("declare", [True, False])
async def test_an_old_broker_is_refused_at_the_start(old_rabbit, declare):
    """It would take the queue, and lose what expires into a full one."""
    consumer = RecordingConsumer(transport=old_rabbit.transport, requeue_delay=1, declare=declare)
    with pytest.raises(TopologyError, match=r"RabbitMQ 3.8 may lose .* unsafe_delay=True"):
        await consumer.start()
    assert [] == wait_queues(old_rabbit)


async def test_on_an_old_broker_the_risk_can_be_taken(old_rabbit):
    """Classic wait queues, which it has."""
    old_rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(requeueing(), ack),
        transport=old_rabbit.transport,
        requeue_delay=1,
        unsafe_delay=True,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(5)
        arguments = old_rabbit.broker.arguments(f"{QUEUE}.retry.1000")
        assert "classic" == arguments["x-queue-type"]
    assert [0, 1] == [round(at - consumer.times[0], 3) for at in consumer.times]


async def test_an_old_broker_is_refused_when_a_handler_asks(old_rabbit, caplog):
    """At the first delay; until then nothing needs it."""
    old_rabbit.put(b"0")
    async with RecordingConsumer(requeueing(delay=1), transport=old_rabbit.transport, batch_size=1):
        await asyncio.sleep(5)
        assert [b"0"] == old_rabbit.unsettled()
    [line] = complaints_of_no_queue(caplog)
    assert "RabbitMQ 3.8 may lose" in line


# --- declaring -----------------------------------------------------------------------------


@pytest.fixture
async def script() -> ScriptedTransport:
    """A transport that does as it is told."""
    return ScriptedTransport()


def declared(script: ScriptedTransport) -> list[str]:
    """The wait queues that were asked for, in order."""
    names = [queue.name for topology in script.details("declare") for queue in topology.queues]
    return [name for name in names if ".retry." in name]


async def test_a_level_is_declared_once_for_all_batches_that_need_it(script):
    """Also for those that ask while it is being declared."""

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


async def test_at_start_the_ladder_is_declared_with_the_rest(script):
    """In one go, so that a refusal ends the start; later retries need no further one."""
    async with RecordingConsumer(requeueing(), transport=script, requeue_delay=1, batch_size=1):
        script.last.feed(b"0")
        await asyncio.sleep(5)
        assert 1 == len(script.details("declare"))
        assert [f"{QUEUE}.retry.{level}" for level in (1000, 2000, 4000)] == declared(script)


async def test_a_broker_that_cannot_be_reached_is_asked_again(script, caplog):
    """As often as the copy is tried, and with one complaint."""
    async with RecordingConsumer(
        requeueing(delay=1), transport=script, batch_size=1, prefetch_count=10
    ):
        script.on_declare = raising(BrokerUnavailable("nobody listens"))
        script.last.feed(b"0")
        await asyncio.sleep(10)
        tries = len(declared(script))
        assert 3 <= tries <= 6
        assert [] == script.details("publish")
        assert 1 == len(complaints_of_no_queue(caplog))
        script.on_declare = ScriptedTransport().on_declare
        await asyncio.sleep(10)
        assert tries + 1 == len(declared(script))
        assert [("ack", (1,))] == [each for details in script.details("settle") for each in details]


async def test_a_stop_does_not_wait_for_a_queue(script):
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


async def test_a_bug_in_a_transport_ends_the_epoch(script):
    """What is unsettled for ever is worse than what is delivered again."""
    async with RecordingConsumer(requeueing(delay=1), transport=script, batch_size=1):
        script.on_declare = raising(RuntimeError("a bug"))
        script.last.feed(b"0")
        await asyncio.sleep(0.1)
        script.on_declare = ScriptedTransport().on_declare
        await asyncio.sleep(5)
        assert 2 == len(script.sessions)


async def test_a_returned_copy_is_tried_again(script):
    """After the queue has been declared once more."""
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
