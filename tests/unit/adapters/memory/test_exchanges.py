"""Exchanges route messages to the queues whose bindings match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.exchanges import headers_match, topic_matches, topic_words
from aio_pika_batch.adapters.memory.rabbitmq import Refusal
from aio_pika_batch.core.refusals import ReplyCode
from tests.unit.adapters.memory.client import Client, bodies


@pytest.fixture
def broker() -> Broker:
    """A broker that imitates RabbitMQ 4.0."""
    return Broker("4.0")


@pytest.fixture
def client(broker: Broker) -> Client:
    """A connected client."""
    return Client(broker)


def test_the_default_exchange_routes_by_queue_name(broker: Broker, client: Client):
    """A message goes to the queue of this name only."""
    client.queue("a")
    client.queue("b")
    assert client.publish(b"1", "b") == "confirmed"
    assert (bodies(broker, "a"), bodies(broker, "b")) == ([], [b"1"])


def test_a_direct_exchange_compares_the_routing_key(broker: Broker, client: Client):
    """A queue gets a message once, however many of its bindings match."""
    client.exchange("x", "direct")
    for queue in ("a", "b"):
        client.queue(queue)
    client.bind("a", "x", "k")
    client.bind("a", "x", "k", {"more": 1})
    client.bind("b", "x", "other")
    client.publish(b"1", "k", "x")
    assert (bodies(broker, "a"), bodies(broker, "b")) == ([b"1"], [])


def test_a_fanout_exchange_ignores_the_routing_key(broker: Broker, client: Client):
    """Every bound queue gets the message."""
    client.exchange("x", "fanout")
    for queue in ("a", "b"):
        client.queue(queue)
        client.bind(queue, "x", "ignored")
    client.publish(b"1", "anything", "x")
    assert bodies(broker, "a") == bodies(broker, "b") == [b"1"]


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.b", "a.b.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        ("#", "", True),
        ("#", "a.b.c", True),
        ("a.#", "a", True),
        ("a.#", "a.b.c", True),
        ("a.#.z", "a.z", True),
        ("a.#.z", "a.b.c.z", True),
        ("a.#.z", "a.b.c", False),
        ("#.#", "a", True),
        ("", "", True),
        ("*", "", False),
        ("*.#", "", False),
        ("#.*", "", False),
        ("*.*", "", False),
        ("*.*", ".", True),
        ("a.*.b", "a..b", True),
        ("#.b.#", "a.b.c", True),
        ("#.b.#", "a.c", False),
        ("*", "#", True),
        ("a", "#", False),
    ],
)
def test_a_topic_exchange_compares_word_by_word(pattern: str, key: str, matches: bool):
    """`*` is one word, `#` any number, and neither is special in a key. An empty key has none."""
    assert topic_matches(topic_words(pattern), topic_words(key)) is matches


def plainly_matches(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    """Match by the definition, without regard to speed."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(plainly_matches(pattern[1:], words[at:]) for at in range(len(words) + 1))
    return bool(words) and pattern[0] in {"*", words[0]} and plainly_matches(pattern[1:], words[1:])


@given(
    st.lists(st.sampled_from(["a", "b", "*", "#"]), max_size=6),
    st.lists(st.sampled_from(["a", "b"]), max_size=6),
)
def test_topic_matching_agrees_with_its_definition(pattern: list[str], words: list[str]):
    """The fast algorithm and the simple one give the same result."""
    assert topic_matches(pattern, words) == plainly_matches(tuple(pattern), tuple(words))


def test_a_topic_pattern_with_many_hashes_is_matched_quickly():
    """In a time of pattern times words."""
    assert not topic_matches(["#", "a"] * 40 + ["b"], ["a"] * 200)


@pytest.mark.parametrize(
    ("wanted", "headers", "matches"),
    [
        ({}, {}, True),
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": None}, {"a": "whatever"}, True),
        ({"a": None}, {}, False),
        ({"x-match": "any", "a": 1, "b": 2}, {"b": 2}, True),
        ({"x-match": "any", "a": 1}, {"a": 2}, False),
        ({"x-match": "any"}, {"a": 2}, False),
        ({"x-match": "all", "x-a": 1}, {}, True),
        ({"x-match": "all-with-x", "x-a": 1}, {}, False),
        ({"x-match": "all-with-x", "x-a": 1}, {"x-a": 1}, True),
        ({"x-match": "any", "x-a": 1}, {"x-a": 1}, False),
        ({"x-match": "any-with-x", "x-a": 1}, {"x-a": 1}, True),
    ],
)
def test_headers_are_compared_by_type_and_value(wanted, headers, matches):
    """As `x-match` says; names that begin with x- count only for the `-with-x` modes."""
    assert headers_match(wanted, headers) is matches


def test_a_headers_exchange_routes_by_headers(broker: Broker, client: Client):
    """A message without headers matches no binding that wants some."""
    client.exchange("x", "headers")
    client.queue("a")
    client.bind("a", "x", "", {"kind": "new"})
    client.publish(b"1", "", "x", headers={"kind": "new"})
    client.publish(b"2", "", "x", headers={"kind": "old"})
    client.publish(b"3", "", "x")
    assert bodies(broker, "a") == [b"1"]


def test_an_unknown_x_match_is_refused(client: Client):
    """With RabbitMQ's text."""
    client.exchange("x", "headers")
    client.queue("a")
    with pytest.raises(Refusal, match='Invalid x-match field value <<"some">>'):
        client.bind("a", "x", "", {"x-match": "some"})


def test_binding_and_unbinding_can_be_repeated(broker: Broker, client: Client):
    """The second time, neither changes anything."""
    client.exchange("x", "direct")
    client.queue("a")
    client.bind("a", "x", "k")
    client.bind("a", "x", "k")
    assert broker.bindings("a") == [("x", "k", {})]
    client.unbind("a", "x", "other")
    client.unbind("a", "x", "k")
    assert broker.bindings("a") == []
    assert client.publish(b"1", "k", "x", mandatory=True) == "returned"


def test_messages_are_routed_by_cc_and_bcc_too(broker: Broker, client: Client):
    """Each queue gets a message once, and no consumer sees the BCC header."""
    for queue in ("a", "b", "c"):
        client.queue(queue)
    client.publish(b"1", "a", headers={"CC": ["b", "a"], "BCC": ["c"]})
    for queue in ("a", "b", "c"):
        (message,) = broker.ready(queue)
        assert message.headers == {"CC": ["b", "a"]}
        assert message.routing_key == "a"


def test_cc_must_be_a_list(client: Client):
    """Anything else closes the channel."""
    with pytest.raises(Refusal, match="unacceptable_type_in_header"):
        client.publish(b"1", "a", headers={"CC": "b"})


def test_an_unroutable_message_is_returned_if_it_is_mandatory(client: Client):
    """Otherwise it is confirmed and dropped."""
    assert client.publish(b"1", "nobody", mandatory=True) == "returned"
    assert client.publish(b"1", "nobody") == "confirmed"


def test_an_alternate_exchange_gets_unroutable_messages(broker: Broker, client: Client):
    """Also over several exchanges, and in a cycle of them."""
    client.exchange("x", "direct", alternate_exchange="y")
    client.exchange("y", "direct", alternate_exchange="z")
    client.exchange("z", "fanout", alternate_exchange="x")
    client.queue("a")
    assert client.publish(b"0", "k", "x", mandatory=True) == "returned"
    client.bind("a", "z")
    assert client.publish(b"1", "k", "x", mandatory=True) == "confirmed"
    assert bodies(broker, "a") == [b"1"]


def test_a_missing_exchange_closes_the_channel(client: Client):
    """With 404."""
    with pytest.raises(Refusal, match="no exchange 'x' in vhost '/'") as caught:
        client.publish(b"1", "k", "x")
    assert caught.value.code is ReplyCode.NOT_FOUND
    assert client.channel.close_reason == "404 NOT_FOUND - no exchange 'x' in vhost '/'"


def test_the_bindings_of_a_deleted_queue_are_removed(broker: Broker, client: Client):
    """An auto-delete exchange is deleted with its last binding."""
    client.exchange("x", "direct", auto_delete=True)
    client.queue("a")
    client.bind("a", "x", "k")
    broker.delete_queue("a")
    with pytest.raises(Refusal, match="no exchange 'x'"):
        client.publish(b"1", "k", "x")


def test_predeclared_exchanges_exist(broker: Broker, client: Client):
    """amq.topic and the others need no declaration."""
    client.queue("a")
    client.bind("a", "amq.topic", "*.new")
    client.publish(b"1", "order.new", "amq.topic")
    assert bodies(broker, "a") == [b"1"]
