"""A quorum queue that doesn't answer behind a cancel: its channel keeps commands, and drops them.

The numbers are those that were seen on each version while the queue's leader was suspended.
"""

from __future__ import annotations

import pytest

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.rabbitmq import Refusal
from tests.unit.adapters.memory.client import Client, bodies

VERSIONS = ("3.10", "4.0", "4.3")
SENT = {"3.10": 32, "4.0": 33, "4.3": 33}


def holding(version: str, kind: str = "quorum", count: int = 100) -> Client:
    """A client with *count* unsettled messages, on a queue with a dead-letter queue."""
    client = Client(Broker(version))
    client.queue("dead")
    client.queue("q", queue_type=kind, dead_letter_exchange="", dead_letter_routing_key="dead")
    for number in range(count):
        client.publish(b"%d" % number, "q")
    client.consume("q")
    return client


def back(client: Client) -> int:
    """Close the channel; return how many messages are in the queue again."""
    client.channel.close()
    return len(bodies(client.broker, "q"))


@pytest.mark.parametrize("version", VERSIONS)
def test_commands_behind_a_cancel_are_dropped_by_the_close(version):
    """All but the first ones, whatever kinds they are."""
    client = holding(version)
    client.channel.cancel("consumer")
    for tag in range(1, 101, 2):
        client.channel.ack(tag)
        client.channel.reject(tag + 1, requeue=False)

    assert () == client.channel.unsettled
    assert 100 - SENT[version] == back(client)
    assert SENT[version] // 2 == len(bodies(client.broker, "dead"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_frame_is_one_command_however_many_messages_it_settles(version):
    """So few frames with `multiple` are safe."""
    client = holding(version)
    client.channel.cancel("consumer")
    client.channel.ack(60, multiple=True)
    client.channel.nack(100, multiple=True, requeue=False)

    assert 0 == back(client)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_settled_before_a_cancel_is_safe(version):
    """The queue answers it after everything before."""
    client = holding(version)
    for tag in range(1, 101):
        client.channel.ack(tag)
    client.channel.cancel("consumer")

    assert 0 == back(client)


@pytest.mark.parametrize("answer", ["cancel", "consume"])
def test_another_answer_of_the_queue_proves_what_was_settled_before_it(answer):
    """What was kept back is sent first."""
    client = holding("4.3")
    client.channel.cancel("consumer")
    for tag in range(1, 101):
        client.channel.ack(tag)
    client.consume("q", "second")
    if answer == "cancel":
        client.channel.cancel("second")

    assert 0 == back(client)


def test_another_cancel_of_the_same_consumer_proves_nothing():
    """The channel answers it alone."""
    client = holding("4.3")
    client.channel.cancel("consumer")
    for tag in range(1, 101):
        client.channel.ack(tag)
    client.channel.cancel("consumer")

    assert 100 - 33 == back(client)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_classic_queue_keeps_nothing_back(version):
    """Its channel does not wait for it."""
    client = holding(version, "classic")
    client.channel.cancel("consumer")
    for tag in range(1, 101):
        client.channel.ack(tag)

    assert 0 == back(client)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_transaction_needs_a_command_for_each_run_of_one_kind(version):
    """So the client has to sort."""
    client = holding(version)
    client.channel.cancel("consumer")
    client.channel.tx_select()
    for tag in range(1, 81):
        client.channel.ack(tag)
    for tag in range(81, 101):
        client.channel.reject(tag, requeue=False)
    assert [] == bodies(client.broker, "dead")
    client.channel.tx_commit()
    assert 20 == len(bodies(client.broker, "dead"))
    assert 0 == back(client)

    client = holding(version)
    client.channel.cancel("consumer")
    client.channel.tx_select()
    for tag in range(1, 101, 2):
        client.channel.ack(tag)
        client.channel.reject(tag + 1, requeue=False)
    client.channel.tx_commit()
    assert 100 - SENT[version] == back(client)


def test_what_was_not_committed_returns_in_its_order():
    """Together with what was not settled, and what was kept back."""
    client = holding("4.3", count=40)
    client.channel.cancel("consumer")
    for tag in range(2, 37):
        client.channel.ack(tag)
    client.channel.tx_select()
    client.channel.tx_select()
    client.channel.ack(38)
    client.channel.close()

    assert [b"0", b"34", b"35", b"36", b"37", b"38", b"39"] == bodies(client.broker, "q")


def test_a_commit_without_transactions_is_refused():
    """It closes the channel."""
    client = holding("4.3")
    with pytest.raises(Refusal, match="406 PRECONDITION_FAILED - channel is not transactional"):
        client.channel.tx_commit()
    assert client.channel.close_reason is not None
