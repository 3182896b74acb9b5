"""Dead letters go where their queue says, say what they died of, and do not go in circles."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.faults import EventKind
from tests.unit.adapters.memory.client import Client, bodies

VERSIONS = ["3.10", "4.0", "4.3"]


def dropped(broker: Broker) -> list[str]:
    """What messages were dropped for."""
    return [event.detail for event in broker.journal.of(EventKind.DROPPED)]


@pytest.fixture
def broker() -> Broker:
    """A broker as of 4.0, in the year 2001."""
    broker = Broker("4.0")
    broker.advance(1_000_000_000)
    return broker


@pytest.fixture
def client(broker: Broker) -> Client:
    """Somebody connected to it."""
    return Client(broker)


@pytest.mark.parametrize("how", ["reject", "nack"])
def test_a_rejected_message_dies_with_its_story(broker: Broker, client: Client, how: str):
    """Why, where, when and how it came there; its expiration is taken off."""
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
    (letter,) = broker.ready("dead")
    assert letter.headers == {
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
    assert (letter.exchange, letter.routing_key) == ("dlx", "key")
    assert letter.properties.expiration is None
    assert letter.properties.message_id == "m"


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
    (letter,) = broker.ready("work")
    told = [
        (death["queue"], death["reason"], death["count"], death.get("original-expiration"))
        for death in letter.headers["x-death"]
    ]
    assert told == [("wait", "expired", 3, None), ("work", "rejected", 3, "70000")]
    assert letter.headers["x-death"][1]["time"] == datetime.fromtimestamp(1_000_000_000, UTC)
    assert letter.headers["x-first-death-queue"] == "work"
    assert letter.headers["x-last-death-queue"] == "wait"


@pytest.mark.parametrize(
    ("arguments", "deaths"), [({"message_ttl": 5}, "expired"), ({"max_length": 0}, "maxlen")]
)
def test_other_reasons_are_told_too(broker: Broker, client: Client, arguments, deaths):
    """Time and length."""
    client.queue("dead")
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead", **arguments)
    client.publish(b"1", "q")
    broker.advance(broker.now + 1)
    assert [message.headers["x-first-death-reason"] for message in broker.ready("dead")] == [deaths]


def test_reject_publish_dlx_refuses_and_dead_letters(broker: Broker, client: Client):
    """Classic queues only; a quorum queue drops its head instead."""
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


def test_without_a_dead_letter_exchange_a_message_is_gone(broker: Broker, client: Client):
    """The journal says why."""
    client.queue("q")
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    assert dropped(broker) == ["rejected"]


@pytest.mark.parametrize(
    ("exchange", "why"),
    [("missing", "no dead-letter exchange"), ("amq.direct", "dead letter not routable")],
)
def test_a_dead_letter_that_has_nowhere_to_go_is_gone(
    broker: Broker, client: Client, exchange, why
):
    """Silently, as in RabbitMQ."""
    client.queue("q", dead_letter_exchange=exchange)
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    assert dropped(broker) == [why]


def test_a_dead_letter_is_lost_on_a_full_queue(broker: Broker, client: Client):
    """At most once."""
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


def test_at_least_once_keeps_a_dead_letter_until_it_is_taken(broker: Broker, client: Client):
    """By a queue that has room again."""
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


def test_at_least_once_keeps_a_dead_letter_until_there_is_a_queue(broker: Broker, client: Client):
    """Even if that is declared much later."""
    client.queue("wait", **SAFE)
    client.publish(b"1", "wait")
    broker.advance(broker.now + 100)
    assert [message.body for message in broker.pending_dead_letters("wait")] == [b"1"]
    client.queue("work")
    assert bodies(broker, "work") == [b"1"]


def test_dead_letters_that_stay_make_their_queue_full(broker: Broker, client: Client):
    """They count towards its length."""
    client.queue("wait", **SAFE, max_length=0)
    assert client.publish(b"1", "wait") == "confirmed"
    broker.advance(broker.now + 1)
    assert client.publish(b"2", "wait") == "refused"


def test_at_least_once_needs_reject_publish(broker: Broker, client: Client):
    """Without it RabbitMQ falls back to at most once."""
    client.queue("wait", **{**SAFE, "overflow": "drop-head"})
    client.publish(b"1", "wait")
    broker.advance(broker.now + 1)
    assert broker.pending_dead_letters("wait") == []
    assert dropped(broker) == ["dead letter not routable"]


def test_dead_letters_go_with_a_deleted_queue(broker: Broker, client: Client):
    """Even those that were to be kept."""
    client.queue("wait", **SAFE)
    client.publish(b"1", "wait")
    broker.advance(broker.now + 1)
    broker.delete_queue("wait")
    assert dropped(broker) == ["queue deleted"]


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_circle_without_a_rejection_is_broken(broker: Broker, client: Client, kind: str):
    """A message that would expire its way around for ever is dropped."""
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


def test_a_circle_stays_broken_for_one_queue_only(broker: Broker, client: Client):
    """Other queues of the dead-letter exchange get the message all the same."""
    client.exchange("dlx", "fanout")
    client.queue("q", dead_letter_exchange="dlx", message_ttl=1000)
    client.queue("other")
    client.bind("q", "dlx")
    client.bind("other", "dlx")
    client.publish(b"1", "q")
    broker.advance(broker.now + 1)
    assert (bodies(broker, "q"), bodies(broker, "other")) == ([], [b"1"])


def test_a_rejection_on_the_way_makes_it_no_circle(broker: Broker, client: Client):
    """Retry by way of a waiting queue goes on as long as somebody rejects."""
    client.queue("work", dead_letter_exchange="", dead_letter_routing_key="wait")
    client.queue("wait", dead_letter_exchange="", dead_letter_routing_key="work", message_ttl=1000)
    client.publish(b"1", "work")
    for _ in range(5):
        client.channel.reject(client.get("work").tag, requeue=False)
        broker.advance(broker.now + 1)
    assert bodies(broker, "work") == [b"1"]


def test_dead_letters_go_to_copies_too(broker: Broker, client: Client):
    """Without a dead-letter routing key all of a message's own keys count."""
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
    (letter,) = broker.ready("cc")
    assert letter.headers["x-death"][0]["routing-keys"] == ["q", "cc"]


@pytest.mark.parametrize(("version", "kept"), [("3.10", False), ("4.0", True), ("4.3", True)])
def test_a_dead_letter_routing_key_replaces_all_others(version: str, kept: bool):
    """3.10 takes the CC header off then; later versions leave it."""
    client = Client(Broker(version))
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    client.publish(b"1", "q", headers={"CC": ["nowhere"]})
    client.channel.reject(client.get("q").tag, requeue=False)
    (letter,) = client.broker.ready("dead")
    assert letter.routing_keys == ("dead",)
    assert ("CC" in letter.headers) is kept


CLAIMED = [
    {"queue": "q", "reason": "rejected", "count": 5, "exchange": "e", "routing-keys": ["k", 1]},
    {"queue": "q", "reason": "rejected", "count": 2},
    {"nonsense": 1},
    "nonsense",
]


def test_3_10_believes_a_clients_deaths():
    """The count goes on, and no first death is added."""
    client = Client(Broker("3.10"))
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    client.publish(b"1", "q", headers={"x-death": CLAIMED})
    client.channel.reject(client.get("q").tag, requeue=False)
    (letter,) = client.broker.ready("dead")
    (death,) = letter.headers["x-death"]
    assert (death["count"], death["exchange"], death["routing-keys"]) == (8, "e", ["k"])
    assert "x-first-death-reason" not in letter.headers


@pytest.mark.parametrize("claimed", ["nonsense", CLAIMED[2:]])
def test_3_10_takes_nonsense_for_nothing(claimed):
    """It is a first death then."""
    client = Client(Broker("3.10"))
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    client.publish(b"1", "q", headers={"x-death": claimed})
    client.channel.reject(client.get("q").tag, requeue=False)
    (letter,) = client.broker.ready("dead")
    assert [death["count"] for death in letter.headers["x-death"]] == [1]
    assert letter.headers["x-first-death-reason"] == "rejected"


@pytest.mark.parametrize("version", ["4.0", "4.3"])
def test_4_believes_its_own_deaths_only(version: str):
    """What a client claims is delivered as it is, and replaced at the first true death."""
    client = Client(Broker(version))
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead")
    claimed = CLAIMED[:1]
    client.publish(b"1", "q", headers={"x-death": claimed})
    delivery = client.get("q")
    assert delivery.properties.headers == {"x-death": claimed}
    client.channel.reject(delivery.tag, requeue=False)
    (letter,) = client.broker.ready("dead")
    assert [death["count"] for death in letter.headers["x-death"]] == [1]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_claimed_circle_is_believed_by_3_10_only(version: str):
    """A copy published with its x-death is dropped there as soon as it expires."""
    client = Client(Broker(version))
    client.queue("work")
    client.queue("wait", dead_letter_exchange="", dead_letter_routing_key="work", message_ttl=1000)
    client.publish(b"1", "wait", headers={"x-death": [{"queue": "work", "reason": "expired"}]})
    client.broker.advance(1)
    assert bodies(client.broker, "work") == ([] if version == "3.10" else [b"1"])
