"""What the queues are like in which messages wait, and which brokers can be trusted with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.topology import (
    Queue,
    Topology,
    TopologyOptions,
    build_topology,
    refuse_lossy_wait_queue,
    split_exclusive,
    wait_queue,
)
from aio_pika_batch.errors import TopologyError
from tests.unit.core.strategies import wanted

levels = st.lists(st.integers(1, 2**32 - 1), max_size=4, unique=True).map(tuple)


@given(wanted, levels, st.booleans())
def test_wait_queues_are_all_that_delays_add(settings, some, unsafe):
    """Durable whatever the other queue is, and left to check where nothing may be declared."""
    waiting = replace(settings, wait_levels=some, unsafe_delay=unsafe)
    plain, topology = build_topology(replace(settings, wait_levels=())), build_topology(waiting)

    added = [each for each in topology.queues if each not in plain.queues]

    assert [f"jobs.retry.{level}" for level in some] == [each.name for each in added]
    assert replace(topology, queues=plain.queues) == plain
    for queue in added:
        assert (True, False, False) == (queue.durable, queue.exclusive, queue.auto_delete)
        assert queue.check_only is not settings.declare
    # An exclusive queue goes with its connection; what waits for it must not.
    assert set(map(id, added)) <= set(map(id, split_exclusive(topology)[0].queues))


def test_a_wait_queue_loses_nothing():
    """It keeps what expires until it is taken, refuses what it cannot keep, and never expires."""
    assert {
        "x-queue-type": "quorum",
        "x-message-ttl": 4000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "jobs",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    } == wait_queue(TopologyOptions(queue_name="jobs"), 4000).arguments


def test_an_unsafe_wait_queue_is_one_that_every_broker_knows():
    """A classic queue, on new brokers too, so that an upgrade finds the same queue."""
    assert {
        "x-queue-type": "classic",
        "x-message-ttl": 4000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "jobs",
    } == wait_queue(TopologyOptions(queue_name="jobs", unsafe_delay=True), 4000).arguments


def test_a_name_that_is_too_long_is_said_to_be():
    """Before any broker is asked."""
    longest = "q" * 244
    assert f"{longest}.retry.1000" == wait_queue(TopologyOptions(queue_name=longest), 1000).name

    with pytest.raises(TopologyError, match="more than 255 bytes; use a shorter queue_name"):
        wait_queue(TopologyOptions(queue_name=longest), 10_000)


@pytest.mark.parametrize(
    ("product", "version", "trusted"),
    [
        ("RabbitMQ", "3.8.9", False),
        ("RabbitMQ", "3.9.29", False),
        ("RabbitMQ", "3.10.0", True),
        ("RabbitMQ", "3.13.7+1", True),
        ("RabbitMQ", "4.0", True),
        ("RabbitMQ", "10.1.0-beta.1", True),
        ("RabbitMQ", "unknown", False),
        ("LavinMQ", "4.1.0", False),
    ],
)
def test_only_a_broker_that_is_known_to_keep_dead_letters_is_trusted(product, version, trusted):
    """Others take the argument, and ignore it."""
    queue = wait_queue(TopologyOptions(queue_name="jobs"), 1000)

    if trusted:
        refuse_lossy_wait_queue(queue, product, version)
    else:
        with pytest.raises(TopologyError, match=f"{product} {version} may lose") as caught:
            refuse_lossy_wait_queue(queue, product, version)
        assert "unsafe_delay=True" in str(caught.value)


@pytest.mark.parametrize(
    "queue",
    [
        Queue("jobs", arguments={"x-dead-letter-strategy": "at-least-once"}),
        wait_queue(TopologyOptions(queue_name="jobs", unsafe_delay=True), 1000),
    ],
)
def test_whoever_promises_nothing_is_refused_nothing(queue):
    """Queues of users, whatever they say, and wait queues whose risk is taken."""
    refuse_lossy_wait_queue(queue, "RabbitMQ", "3.8.9")


@pytest.mark.parametrize(
    ("queue", "advised"),
    [(Queue("jobs"), False), (wait_queue(TopologyOptions(queue_name="jobs"), 1000), True)],
)
def test_a_wait_queue_is_not_to_be_deleted_with_what_is_in_it(queue, advised):
    """As other queues may be whose arguments are others on the broker."""
    assert advised is ("run empty" in (queue.if_unequal or ""))


def test_without_levels_there_are_no_wait_queues():
    """The default."""
    assert Topology(queues=(Queue("jobs"),)) == build_topology(TopologyOptions(queue_name="jobs"))
