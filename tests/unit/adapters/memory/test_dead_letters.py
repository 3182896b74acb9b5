"""Dead letters are routed as their queue says, have x-death, and are dropped in a cycle."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.faults import EventKind
from aio_pika_batch.core.settlement import Disposition, Frame
from tests.unit.adapters.memory.client import Client, bodies

VERSIONS = ["3.10", "4.0", "4.3"]


def dropped(broker: Broker) -> list[str]:
    """Return the reasons for which messages were dropped."""
    return [event.detail for event in broker.journal.of(EventKind.DROPPED)]


@pytest.fixture
def broker() -> Broker:
    """A broker that imitates RabbitMQ 4.0, in the year 2001."""
    broker = Broker("4.0")
    broker.advance(1_000_000_000)
    return broker


@pytest.fixture
def client(broker: Broker) -> Client:
    """A connected client."""
    return Client(broker)


@pytest.mark.parametrize("how", ["reject", "nack"])
def test_a_rejected_message_is_dead_lettered_with_x_death(broker: Broker, client: Client, how: str):
    """With reason, queue, time and routing keys; its expiration is removed."""
    client.exchange("x", "fanout")
    client.queue("q", dead_letter_exchange="dlx")
    client.bind("q", "x")
    client.exchange("dlx", "direct")
    client.queue("dead")
    client.bind("dead", "dlx", "key")
    client.publish(b"1", "key", "x", expiration="60000", headers={"mine": 1}, message_id="m")
    tag = client.get("q").tag
    if how == "reject":
        client.channel.reject(tag, requeue=False)
    else:
        client.channel.nack(tag, requeue=False)
    (dead_letter,) = broker.ready("dead")
    assert dead_letter.headers == {
        "mine": 1,
        "x-first-death-reason": "rejected",
        "x-first-death-queue": "q",
        "x-first-death-exchange": "x",
        "x-last-death-reason": "rejected",
        "x-last-death-queue": "q",
        "x-last-death-exchange": "x",
        "x-death": [
            {
                "count": 1,
                "reason": "rejected",
                "queue": "q",
                "exchange": "x",
                "routing-keys": ["key"],
                "time": datetime.fromtimestamp(1_000_000_000, UTC),
                "original-expiration": "60000",
            }
        ],
    }
    assert (dead_letter.exchange, dead_letter.routing_key) == ("dlx", "key")
    assert dead_letter.properties.expiration is None
    assert dead_letter.properties.message_id == "m"


def test_deaths_are_counted_by_queue_and_reason(broker: Broker, client: Client):
    """The latest comes first; its other fields are those of the first time."""
    client.queue(
        "work", dead_letter_exchange="", dead_letter_routing_key="wait", queue_type="quorum"
    )
    client.queue("wait", dead_letter_exchange="", dead_letter_routing_key="work", message_ttl=1000)
    client.publish(b"1", "work", expiration="70000")
    for _ in range(3):
        client.channel.reject(client.get("work").tag, requeue=False)
        broker.advance(broker.now + 1)
    (dead_letter,) = broker.ready("work")
    stated = [
        (death["queue"], death["reason"], death["count"], death.get("original-expiration"))
        for death in dead_letter.headers["x-death"]
    ]
    assert stated == [("wait", "expired", 3, None), ("work", "rejected", 3, "70000")]
    assert dead_letter.headers["x-death"][1]["time"] == datetime.fromtimestamp(1_000_000_000, UTC)
    assert dead_letter.headers["x-first-death-queue"] == "work"
    assert dead_letter.headers["x-last-death-queue"] == "wait"


@pytest.mark.parametrize(
    ("arguments", "deaths"), [({"message_ttl": 5}, "expired"), ({"max_length": 0}, "maxlen")]
)
def test_expired_and_excess_messages_are_dead_lettered_with_their_reason(
    broker: Broker, client: Client, arguments, deaths
):
    """As the first reason of their death."""
    client.queue("dead")
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead", **arguments)
    client.publish(b"1", "q")
    broker.advance(broker.now + 1)
    assert [message.headers["x-first-death-reason"] for message in broker.ready("dead")] == [deaths]


def test_reject_publish_dlx_refuses_and_dead_letters(broker: Broker, client: Client):
    """In classic queues; a quorum queue drops its head instead."""
    client.queue("dead")
    more = {
        "dead_letter_exchange": "",
        "dead_letter_routing_key": "dead",
        "overflow": "reject-publish-dlx",
        "max_length": 1,
    }
    client.queue("q", **more)
    assert [client.publish(body, "q") for body in (b"1", b"2")] == ["confirmed", "refused"]
    assert (bodies(broker, "q"), bodies(broker, "dead")) == ([b"1"], [b"2"])
    client.queue("quorum", queue_type="quorum", **more)
    assert client.publish(b"3", "quorum") == client.publish(b"4", "quorum") == "confirmed"
    assert (bodies(broker, "quorum"), bodies(broker, "dead")) == ([b"4"], [b"2", b"3"])


def test_without_a_dead_letter_exchange_a_rejected_message_is_dropped(
    broker: Broker, client: Client
):
    """The journal has the reason."""
    client.queue("q")
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    assert dropped(broker) == ["rejected"]


@pytest.mark.parametrize(
    ("exchange", "why"),
    [("missing", "no dead-letter exchange"), ("amq.direct", "dead letter not routable")],
)
def test_a_dead_letter_without_a_target_is_dropped(broker: Broker, client: Client, exchange, why):
    """Silently, as in RabbitMQ."""
    client.queue("q", dead_letter_exchange=exchange)
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    assert dropped(broker) == [why]


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_full_quorum_queue_accepts_unconfirmed_dead_letters(
    broker: Broker, client: Client, kind: str
):
    """It refuses by telling its publishers to stop, and such a dead letter has none."""
    client.queue("dead", queue_type="quorum", max_length=0, overflow="reject-publish")
    client.queue("q", queue_type=kind, dead_letter_exchange="", dead_letter_routing_key="dead")
    client.publish(b"1", "dead")
    assert client.publish(b"2", "dead") == "refused"
    client.publish(b"3", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    assert bodies(broker, "dead") == [b"1", b"3"]


def test_a_dead_letter_that_a_full_queue_refuses_is_dropped(broker: Broker, client: Client):
    """Dead-lettering is at most once by default."""
    client.queue("full", max_length=0, overflow="reject-publish")
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="full", message_ttl=1)
    client.publish(b"1", "q")
    broker.advance(broker.now + 1)
    assert dropped(broker) == ["dead letter refused"]


SAFE = {
    "queue_type": "quorum",
    "dead_letter_exchange": "",
    "dead_letter_routing_key": "work",
    "message_ttl": 1000,
    "dead_letter_strategy": "at-least-once",
    "overflow": "reject-publish",
}


def test_at_least_once_keeps_a_dead_letter_until_its_target_has_room(
    broker: Broker, client: Client
):
    """It is sent as soon as there is room."""
    client.queue("work", max_length=1, overflow="reject-publish")
    client.queue("wait", **SAFE)
    client.publish(b"first", "work")
    client.publish(b"1", "wait")
    broker.advance(broker.now + 1)
    assert [message.body for message in broker.pending_dead_letters("wait")] == [b"1"]
    assert bodies(broker, "wait") == []
    client.channel.ack(client.get("work").tag)
    assert (bodies(broker, "work"), broker.pending_dead_letters("wait")) == ([b"1"], [])
    assert dropped(broker) == []


def test_at_least_once_keeps_a_dead_letter_until_its_target_exists(broker: Broker, client: Client):
    """Even if that is declared much later."""
    client.queue("wait", **SAFE)
    client.publish(b"1", "wait")
    broker.advance(broker.now + 100)
    assert [message.body for message in broker.pending_dead_letters("wait")] == [b"1"]
    client.queue("work")
    assert bodies(broker, "work") == [b"1"]


def test_pending_dead_letters_count_towards_the_length_of_their_queue(
    broker: Broker, client: Client
):
    """A full queue refuses new messages."""
    client.queue("wait", **SAFE, max_length=0)
    assert client.publish(b"1", "wait") == "confirmed"
    broker.advance(broker.now + 1)
    assert client.publish(b"2", "wait") == "refused"


def test_at_least_once_needs_reject_publish(broker: Broker, client: Client):
    """Without it, RabbitMQ falls back to at most once."""
    client.queue("wait", **{**SAFE, "overflow": "drop-head"})
    client.publish(b"1", "wait")
    broker.advance(broker.now + 1)
    assert broker.pending_dead_letters("wait") == []
    assert dropped(broker) == ["dead letter not routable"]


def test_pending_dead_letters_are_dropped_with_their_queue(broker: Broker, client: Client):
    """Although the queue is at-least-once."""
    client.queue("wait", **SAFE)
    client.publish(b"1", "wait")
    broker.advance(broker.now + 1)
    broker.delete_queue("wait")
    assert dropped(broker) == ["queue deleted"]


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_dead_letter_cycle_without_a_rejection_is_dropped(
    broker: Broker, client: Client, kind: str
):
    """It would expire from queue to queue without end."""
    client.queue(
        "a", queue_type=kind, dead_letter_exchange="", dead_letter_routing_key="b", message_ttl=1000
    )
    client.queue(
        "b", queue_type=kind, dead_letter_exchange="", dead_letter_routing_key="a", message_ttl=1000
    )
    client.publish(b"1", "a")
    broker.advance(broker.now + 1)
    assert bodies(broker, "b") == [b"1"]
    broker.advance(broker.now + 1)
    assert (bodies(broker, "a"), bodies(broker, "b")) == ([], [])
    assert dropped(broker) == ["dead-letter cycle"]


def test_a_dead_letter_cycle_does_not_concern_other_queues(broker: Broker, client: Client):
    """They get the message from the same dead-letter exchange."""
    client.exchange("dlx", "fanout")
    client.queue("q", dead_letter_exchange="dlx", message_ttl=1000)
    client.queue("other")
    client.bind("q", "dlx")
    client.bind("other", "dlx")
    client.publish(b"1", "q")
    broker.advance(broker.now + 1)
    assert (bodies(broker, "q"), bodies(broker, "other")) == ([], [b"1"])


def test_a_cycle_with_a_rejection_goes_on(broker: Broker, client: Client):
    """So messages can be retried by way of a wait queue."""
    client.queue("work", dead_letter_exchange="", dead_letter_routing_key="wait")
    client.queue("wait", dead_letter_exchange="", dead_letter_routing_key="work", message_ttl=1000)
    client.publish(b"1", "work")
    for _ in range(5):
        client.channel.reject(client.get("work").tag, requeue=False)
        broker.advance(broker.now + 1)
    assert bodies(broker, "work") == [b"1"]


def test_dead_letters_are_routed_by_cc_and_bcc_too(broker: Broker, client: Client):
    """Unless the queue has a dead-letter routing key."""
    client.exchange("dlx", "direct")
    client.queue("q", dead_letter_exchange="dlx")
    for key in ("cc", "bcc"):
        client.queue(key)
        client.bind(key, "dlx", key)
    client.publish(b"1", "q", headers={"CC": ["cc"], "BCC": ["bcc"]})
    with client.channel.operation() as vhost:
        vhost.queue("cc", None).purge()
    client.channel.reject(client.get("q").tag, requeue=False)
    assert bodies(broker, "cc") == bodies(broker, "bcc")[-1:] == [b"1"]
    (dead_letter,) = broker.ready("cc")
    assert dead_letter.headers["x-death"][0]["routing-keys"] == ["q", "cc"]


@pytest.mark.parametrize(("version", "kept"), [("3.10", False), ("4.0", True), ("4.3", True)])
def test_a_dead_letter_routing_key_replaces_all_others(version: str, kept: bool):
    """3.10 also removes the CC header; later versions keep it."""
    client = Client(Broker(version))
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    client.publish(b"1", "q", headers={"CC": ["nowhere"]})
    client.channel.reject(client.get("q").tag, requeue=False)
    (dead_letter,) = client.broker.ready("dead")
    assert dead_letter.routing_keys == ("dead",)
    assert ("CC" in dead_letter.headers) is kept


CLAIMED = [
    {"queue": "q", "reason": "rejected", "count": 5, "exchange": "e", "routing-keys": ["k", 1]},
    {"queue": "q", "reason": "rejected", "count": 2},
    {"nonsense": 1},
    "nonsense",
]


def test_3_10_believes_the_x_death_of_a_client():
    """Its count goes on, and it has no first death of the broker."""
    client = Client(Broker("3.10"))
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    client.publish(b"1", "q", headers={"x-death": CLAIMED})
    client.channel.reject(client.get("q").tag, requeue=False)
    (dead_letter,) = client.broker.ready("dead")
    (death,) = dead_letter.headers["x-death"]
    assert (death["count"], death["exchange"], death["routing-keys"]) == (8, "e", ["k"])
    assert "x-first-death-reason" not in dead_letter.headers


@pytest.mark.parametrize("claimed", ["nonsense", CLAIMED[2:]])
def test_3_10_ignores_an_invalid_x_death(claimed):
    """So the next death is the first one."""
    client = Client(Broker("3.10"))
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    client.publish(b"1", "q", headers={"x-death": claimed})
    client.channel.reject(client.get("q").tag, requeue=False)
    (dead_letter,) = client.broker.ready("dead")
    assert [death["count"] for death in dead_letter.headers["x-death"]] == [1]
    assert dead_letter.headers["x-first-death-reason"] == "rejected"


@pytest.mark.parametrize("version", ["4.0", "4.3"])
def test_4_ignores_the_x_death_of_a_client(version: str):
    """It is delivered unchanged, and replaced at the first real death."""
    client = Client(Broker(version))
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    claimed = CLAIMED[:1]
    client.publish(b"1", "q", headers={"x-death": claimed})
    delivery = client.get("q")
    assert delivery.properties.headers == {"x-death": claimed}
    client.channel.reject(delivery.tag, requeue=False)
    (dead_letter,) = client.broker.ready("dead")
    assert [death["count"] for death in dead_letter.headers["x-death"]] == [1]


@pytest.mark.parametrize("version", VERSIONS)
def test_only_3_10_sees_a_cycle_in_the_x_death_of_a_client(version: str):
    """A copy that was published with it is dropped when it expires."""
    client = Client(Broker(version))
    client.queue("work")
    client.queue("wait", dead_letter_exchange="", dead_letter_routing_key="work", message_ttl=1000)
    client.publish(b"1", "wait", headers={"x-death": [{"queue": "work", "reason": "expired"}]})
    client.broker.advance(1)
    assert bodies(client.broker, "work") == ([] if version == "3.10" else [b"1"])


def test_a_classic_queue_drops_a_message_beyond_its_length_before_it_expires():
    """Although it expires at once."""
    broker = Broker("4.3")
    client = Client(broker)
    client.queue("q", max_length=0, dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    client.publish(b"1", "q", expiration="0")
    assert ["maxlen"] == [each.headers["x-first-death-reason"] for each in broker.ready("dead")]


def test_a_classic_queue_sends_itself_dead_letters_after_what_was_written_with_the_reject():
    """A message that was returned together with it is delivered first."""
    broker = Broker("4.3")
    client = Client(broker)
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="q")
    for body in (b"1", b"2"):
        client.publish(body, "q")
    client.consume("q", prefetch=0)
    first, second = client.deliveries()
    client.channel.settle_all(
        [Frame(Disposition.REJECT, first.tag), Frame(Disposition.REQUEUE, second.tag)]
    )
    assert [b"2", b"1"] == [each.body for each in client.deliveries()]
