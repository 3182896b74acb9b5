"""What a consumer declares and checks at its start, and that dead letters arrive."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import ConfigurationError, Requeue
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import PublishCheck
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.transport import Subscription
from tests.unit.shell.helpers import (
    NACK,
    REQUEUE,
    QueueBroker,
    RecordingConsumer,
    ack,
    answering,
    numbered,
    taking,
)


@pytest.fixture
async def empty():
    """A broker without queues."""
    return QueueBroker()


def rejecting(rabbit, **given):
    """A consumer that rejects each message."""
    return RecordingConsumer(
        answering(NACK), transport=rabbit.transport, **{"batch_size": 1, "batch_timeout": 1} | given
    )


def lines(caplog, words):
    """The lines of the log that contain these words."""
    return [each.getMessage() for each in caplog.records if words in each.getMessage()]


# --- where dead letters go -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["direct", "topic"])
@pytest.mark.parametrize("source", ["direct", "topic", "fanout"])
async def test_an_existing_dead_letter_exchange_is_bound_by_its_type(empty, kind, source):
    """Every dead letter arrives, by whatever key its message came."""
    empty.declare("theirs")
    empty.bind("theirs", "shared", "unrelated", kind=kind)
    consumer = rejecting(
        empty,
        exchange_name="events",
        exchange_type=source,
        routing_key="order.created",
        dead_letter_exchange="shared",
        dead_letter_queue="dead",
    )
    async with consumer:
        empty.publish(b"0", exchange="events", routing_key="order.created")
        empty.publish(b"1", routing_key="jobs")
        await asyncio.sleep(5)
    letters = empty.broker.ready("dead")
    assert numbered(2) == [each.body for each in letters]
    assert ["order.created", "jobs"] == [each.routing_key for each in letters]
    assert all("BCC" not in each.headers for each in letters)


@pytest.mark.parametrize("kind", ["topic", "direct", "fanout", "headers"])
async def test_an_exchange_of_its_own_keeps_routing_keys(empty, kind):
    """`<queue_name>.dlx` may exist with any type."""
    empty.declare("other")
    empty.bind("other", "jobs.dlx", "unrelated", kind=kind)
    async with rejecting(
        empty, exchange_name="events", routing_key="order.created", dead_letter_queue="dead"
    ):
        empty.publish(b"0", exchange="events", routing_key="order.created")
        await asyncio.sleep(5)
    [letter] = empty.broker.ready("dead")
    assert ("jobs.dlx", "order.created") == (letter.exchange, letter.routing_key)


@pytest.mark.parametrize("kind", ["fanout", "headers"])
async def test_an_exchange_that_copies_dead_letters_to_all_queues_is_refused(empty, kind):
    """Unless its name says that it is the consumer's own. Nothing is declared before the error."""
    empty.declare("theirs")
    empty.bind("theirs", "shared", kind=kind)
    given = {"dead_letter_exchange": "shared", "dead_letter_queue": "dead"}
    for stated in (None, kind):
        with pytest.raises(TopologyError, match=r"whose name begins with 'jobs\.'"):
            await rejecting(empty, dead_letter_exchange_type=stated, **given).start()
    assert ["theirs"] == empty.broker.queues

    empty.bind("theirs", "jobs.failed", kind=kind)
    async with rejecting(empty, **given | {"dead_letter_exchange": "jobs.failed"}):
        empty.publish(b"0", routing_key="jobs")
        await asyncio.sleep(5)
    assert [b"0"] == empty.waiting("dead")


async def test_services_that_share_an_exchange_get_their_own_dead_letters(empty):
    """Even if they have messages with the same routing keys, or with another's queue as the key."""
    hotel, flight = (
        rejecting(
            empty,
            queue_name=name,
            exchange_name="trips",
            routing_key="booked",
            dead_letter_exchange="graveyard",
            dead_letter_queue=f"{name}.dead",
        )
        for name in ("hotel", "flight")
    )
    async with hotel, flight:
        empty.publish(b"both", exchange="trips", routing_key="booked")
        for name in ("hotel", "flight"):
            empty.publish(name.encode(), routing_key=name)
        empty.bind("hotel", "trips", "flight")
        empty.publish(b"moved", exchange="trips", routing_key="flight")
        await asyncio.sleep(5)
    assert [b"both", b"hotel", b"moved"] == sorted(empty.waiting("hotel.dead"))
    assert [b"both", b"flight"] == sorted(empty.waiting("flight.dead"))


@pytest.mark.parametrize(
    "given",
    [
        {"dead_letter_queue": "jobs"},
        {"queue_arguments": {"x-dead-letter-exchange": ""}},
        {
            "exchange_name": "x",
            "exchange_type": "topic",
            "routing_key": "#",
            "dead_letter_exchange": "x",
            "dead_letter_queue": "dead",
        },
    ],
)
async def test_a_loop_is_refused_at_the_start(empty, given):
    """Nothing is declared, and nothing goes round."""
    with pytest.raises(ConfigurationError, match="a loop"):
        await rejecting(empty, **given).start()
    assert [] == empty.broker.queues


async def test_a_loop_that_settings_do_not_show_is_slow_and_logged(rabbit, caplog):
    """The consumer's own queue was bound to the dead-letter exchange by hand."""
    rabbit.bind("jobs", "dlx", kind="fanout")
    rabbit.put(b"0")
    async with rejecting(rabbit, dead_letter_exchange="dlx") as consumer:
        await asyncio.sleep(120)
    assert 4 < len(consumer.handled) < 15
    assert 2 <= len(lines(caplog, "messages are dead-lettered again and again")) <= 3
    assert [b"0"] == rabbit.waiting()


# --- what is missing, or comes back --------------------------------------------------------------


async def test_a_deleted_dead_letter_queue_is_declared_again(empty, jitter, caplog):
    """As soon as a dead letter comes back; its message is held meanwhile."""
    async with rejecting(empty, dead_letter_queue="dead") as consumer:
        empty.broker.delete_queue("dead")
        empty.publish(*numbered(3), routing_key="jobs")
        await asyncio.sleep(10)
        assert numbered(3) == sorted(empty.waiting("dead"))
        assert 1 == consumer.status().workers[0].epoch
    [line] = lines(caplog, "a dead letter did not arrive")
    assert "reason=no queue is bound for its routing key exchange=jobs.dlx" in line


async def test_a_deleted_dead_letter_exchange_is_declared_again(empty, jitter, caplog):
    """With its binding."""
    async with rejecting(empty, dead_letter_queue="dead"):
        empty.broker.delete_exchange("jobs.dlx")
        empty.publish(b"0", routing_key="jobs")
        await asyncio.sleep(10)
        assert [b"0"] == empty.waiting("dead")
    [line] = lines(caplog, "a dead letter did not arrive")
    assert "its exchange is missing" in line


async def test_an_exchange_created_again_with_another_type_is_bound_by_that(empty, jitter):
    """Its type is looked up again when a dead letter comes back."""
    async with rejecting(empty, exchange_name="events", dead_letter_queue="dead"):
        empty.broker.delete_exchange("jobs.dlx")
        empty.declare("other")
        empty.bind("other", "jobs.dlx", "unrelated", kind="topic")
        empty.publish(b"0", exchange="events", routing_key="jobs")
        await asyncio.sleep(10)
        assert [b"0"] == empty.waiting("dead")


async def test_unroutable_dead_letters_are_explained_once_a_minute(rabbit, jitter, caplog):
    """The exchange belongs to others. It is looked for again, but not all the time."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "elsewhere")
    rabbit.put(*numbered(5))
    looked = []
    declare = rabbit.transport.declare

    async def counting(topology):
        looked.append(topology)
        return await declare(topology)

    rabbit.transport.declare = counting
    async with rejecting(rabbit, dead_letter_exchange="dlx", prefetch_count=5):
        await asyncio.sleep(59)
        assert len(looked) <= 14
        assert 1 == len(lines(caplog, "a dead letter did not arrive"))
    assert numbered(5) == sorted(rabbit.waiting())


async def test_a_declaration_that_fails_again_is_logged(empty, jitter, caplog):
    """The exchange was created again, and can't be used any more."""
    async with rejecting(empty, dead_letter_exchange="dlx", dead_letter_queue="dead"):
        empty.broker.delete_exchange("dlx")
        empty.declare("other")
        empty.bind("other", "dlx", kind="fanout")
        empty.broker.delete_queue("dead")
        empty.publish(b"0", routing_key="jobs")
        await asyncio.sleep(1)
        # Every queue that is bound to a fanout exchange gets it, so it has arrived somewhere.
        assert [b"0"] == empty.waiting("other")
        empty.broker.delete_queue("other")
        empty.publish(b"1", routing_key="jobs")
        await asyncio.sleep(10)
    [line, *_] = lines(caplog, "the topology can't be declared again")
    assert "exchange 'dlx' is a fanout exchange" in line
    assert [b"1"] == empty.waiting()


# --- what the broker gives up --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "count"), [({"x-message-ttl": 500}, 6), ({"x-max-length": 2}, 6), ({}, 6)]
)
async def test_messages_that_the_broker_gives_up_are_in_the_dead_letter_queue(
    empty, arguments, count
):
    """They expire, or the queue is full, while the handler is busy."""
    async with RecordingConsumer(
        taking(60, ack),
        transport=empty.transport,
        batch_size=1,
        prefetch_count=1,
        queue_arguments=arguments,
        dead_letter_queue="dead",
    ):
        expiration = {} if arguments else {"expiration": 0.5}
        empty.publish(*numbered(count), routing_key="jobs", **expiration)
        await asyncio.sleep(5)
        everywhere = [*empty.unsettled(), *empty.waiting(), *empty.waiting("dead")]
    assert numbered(count) == sorted(everywhere)
    assert empty.waiting("dead")


async def test_messages_beyond_the_delivery_limit_are_in_the_dead_letter_queue(empty):
    """A quorum queue of RabbitMQ 4 gives a message up after some deliveries."""
    arguments = {"x-delivery-limit": 2}
    given = {"queue_type": "quorum", "queue_arguments": arguments, "dead_letter_queue": "dead"}
    async with RecordingConsumer(ack, transport=empty.transport, **given):
        pass
    empty.publish(b"0", routing_key="jobs")
    # By another client: a consumer of this library lets no message come so far.
    subscription = Subscription(queue="jobs", prefetch=1, consumer_tag="another")
    async with empty.transport.session(subscription) as session:
        deliveries = aiter(session)
        for _ in range(3):
            [message] = await anext(deliveries)
            await session.settle([Settlement(Disposition.REQUEUE, (message.delivery_tag,))])
    assert [b"0"] == empty.waiting("dead")
    assert "at-least-once" == empty.broker.arguments("jobs")["x-dead-letter-strategy"]


async def test_an_existing_queue_without_the_arguments_is_used_as_it_is(rabbit, caplog):
    """A warning, once, has the policy that dead-letters what the broker gives up."""
    async with rejecting(rabbit, dead_letter_queue="dead", reconnect_delay=0.1):
        rabbit.put(b"0")
        await asyncio.sleep(5)
        rabbit.cut()
        await asyncio.sleep(5)
    assert [b"0"] == rabbit.waiting("dead")
    assert {} == rabbit.broker.arguments("jobs")
    [line] = lines(caplog, "queue lacks dead-letter arguments")
    assert "policy=rabbitmqctl set_policy --apply-to queues jobs-dead-letters '^jobs$'" in line
    assert '{"dead-letter-exchange": "jobs.dlx"}' in line


async def test_an_existing_queue_that_dead_letters_elsewhere_is_used_too(empty, caplog):
    """A policy can't replace its arguments, so the warning only says what they are."""
    empty.declare("jobs", **{"x-dead-letter-exchange": "old"})
    async with rejecting(empty, dead_letter_queue="dead"):
        empty.publish(b"0", routing_key="jobs")
        await asyncio.sleep(5)
    assert [b"0"] == empty.waiting("dead")
    [line] = lines(caplog, "queue has other dead-letter arguments")
    assert "arguments={'x-dead-letter-exchange': 'old'}" in line


async def test_consumers_with_and_without_a_dead_letter_queue_share_a_queue(empty, caplog):
    """During a deployment, for example. Who opts out wants the arguments of its settings."""
    quorum = {"queue_type": "quorum"}
    async with rejecting(empty, dead_letter_queue="dead", **quorum), rejecting(empty, **quorum):
        assert "at-least-once" == empty.broker.arguments("jobs")["x-dead-letter-strategy"]
    assert 1 == len(lines(caplog, "queue has other dead-letter arguments"))
    with pytest.raises(TopologyError, match="inequivalent arg"):
        await rejecting(empty, broker_dead_letters=False, **quorum).start()


async def test_the_brokers_dead_letters_can_be_left_alone(empty, caplog):
    """With `broker_dead_letters=False` the queue is declared as the settings say."""
    async with rejecting(empty, dead_letter_queue="dead", broker_dead_letters=False):
        assert {} == empty.broker.arguments("jobs")
    async with rejecting(empty, dead_letter_queue="dead", broker_dead_letters=False):
        pass
    assert [] == lines(caplog, "queue lacks dead-letter arguments")


async def test_an_existing_queue_must_have_the_arguments_of_the_settings(rabbit):
    """Only what this library adds may be missing."""
    consumer = rejecting(rabbit, dead_letter_queue="dead", queue_arguments={"x-max-length": 5})
    with pytest.raises(TopologyError, match="inequivalent arg 'x-max-length'"):
        await consumer.start()


async def test_an_exclusive_queue_gets_the_arguments_too(empty):
    """It is declared by the session."""
    async with rejecting(empty, queue_exclusive=True, dead_letter_queue="dead"):
        assert {"x-dead-letter-exchange": "jobs.dlx"} == empty.broker.arguments("jobs")


# --- permissions ---------------------------------------------------------------------------------


async def test_an_exchange_that_may_not_be_published_to_is_found_at_the_start(empty):
    """Here it is internal. On a real broker the user may lack the permission."""
    with empty.broker.operation() as vhost:
        vhost.declare_exchange(
            "dlx", "direct", durable=True, auto_delete=False, internal=True, arguments={}
        )
    with pytest.raises(TopologyError, match="publishing to exchange 'dlx'"):
        await rejecting(empty, dead_letter_exchange="dlx").start()


async def test_permissions_are_checked_once_and_publish_nothing(empty, monkeypatch):
    """Not at each reconnect: it takes a publish, and brokers stop publishers in an alarm."""
    seen = []
    declare = empty.transport.declare

    async def recording(topology):
        seen.append(topology.publishes)
        return await declare(topology)

    monkeypatch.setattr(empty.transport, "declare", recording)
    async with rejecting(empty, dead_letter_queue="dead", reconnect_delay=0.1):
        empty.cut()
        await asyncio.sleep(5)
    assert [(PublishCheck("", "jobs"), PublishCheck("jobs.dlx", "jobs")), ()] == seen
    assert [] == empty.times(EventKind.PUBLISHED)


# --- the consumer's exchange ---------------------------------------------------------------------


async def test_an_exchange_with_arguments_of_its_own_is_declared(empty):
    """What it can't route goes to its alternate exchange."""
    empty.declare("unrouted")
    empty.bind("unrouted", "others", kind="fanout")
    async with rejecting(
        empty,
        exchange_name="events",
        routing_key="a",
        exchange_auto_delete=True,
        exchange_arguments={"alternate-exchange": "others"},
    ):
        empty.publish(b"0", exchange="events", routing_key="b")
        assert [b"0"] == empty.waiting("unrouted")
        assert empty.broker.vhost.exchanges["events"].auto_delete


async def test_an_internal_exchange_can_be_consumed_from(empty):
    """A client can't publish to it."""
    given = {"exchange_name": "events", "exchange_internal": True}
    for _ in range(2):
        async with rejecting(empty, **given):
            assert empty.broker.vhost.exchanges["events"].internal
    with pytest.raises(TopologyError, match="inequivalent arg 'internal'"):
        await rejecting(empty, exchange_name="events").start()


# --- consumers of dead letters -------------------------------------------------------------------


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("answer", [answering(REQUEUE), answering(Requeue(delay=1))])
async def test_a_consumer_of_dead_letters_has_its_own_attempts(empty, answer, queue_type):
    """However often a message was retried before it died. It uses the queue as it was declared."""
    workers = {
        "batch_size": 1,
        "batch_timeout": 1,
        "max_requeue_attempts": 2,
        "queue_type": queue_type,
    }
    async with RecordingConsumer(
        answering(REQUEUE), transport=empty.transport, dead_letter_queue="dead", **workers
    ) as first:
        empty.publish(b"0", routing_key="jobs")
        await asyncio.sleep(10)
    async with RecordingConsumer(
        answer, transport=empty.transport, queue_name="dead", dead_letter_queue="lost", **workers
    ) as second:
        await asyncio.sleep(20)
    assert ([b"0"] * 3, [b"0"] * 3) == (first.handled, second.handled)
    [letter] = empty.broker.ready("lost")
    assert "exhausted" == letter.headers["x-dead-letter-reason"]
