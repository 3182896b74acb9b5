"""Wait queues, and the brokers that support them."""

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
from tests.unit.core.strategies import options

levels = st.lists(st.integers(1, 2**32 - 1), max_size=4, unique=True).map(tuple)


@given(options, levels)
def test_delays_add_only_wait_queues(settings, some):
    """Durable, whatever the other queue is, and only checked if nothing is declared."""
    waiting = replace(settings, wait_levels=some)
    plain, topology = build_topology(replace(settings, wait_levels=())), build_topology(waiting)

    added = [each for each in topology.queues if each not in plain.queues]

    assert [f"jobs.retry.{level}" for level in some] == [each.name for each in added]
    assert replace(topology, queues=plain.queues) == plain
    for queue in added:
        assert (True, False, False) == (queue.durable, queue.exclusive, queue.auto_delete)
        assert queue.check_only is not settings.declare
    # An exclusive queue is deleted with its connection. Messages that wait for it must not be.
    assert set(map(id, added)) <= set(map(id, split_exclusive(topology)[0].queues))


def test_a_wait_queue_loses_no_messages():
    """It keeps expired messages until the next queue has them, refuses more than it can keep, and
    never expires.
    """
    assert {
        "x-queue-type": "quorum",
        "x-message-ttl": 4000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "jobs",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    } == wait_queue(TopologyOptions(queue_name="jobs"), 4000).arguments


def test_a_name_that_is_too_long_is_refused():
    """Before a broker is asked."""
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
def test_only_brokers_that_support_at_least_once_are_accepted(product, version, trusted):
    """Others accept the argument, and ignore it."""
    queue = wait_queue(TopologyOptions(queue_name="jobs"), 1000)

    if trusted:
        refuse_lossy_wait_queue(queue, product, version)
    else:
        with pytest.raises(TopologyError, match=f"{product} {version} may lose"):
            refuse_lossy_wait_queue(queue, product, version)


def test_other_queues_are_never_refused():
    """Users may know what they do."""
    queue = Queue("jobs", arguments={"x-dead-letter-strategy": "at-least-once"})
    refuse_lossy_wait_queue(queue, "RabbitMQ", "3.8.9")


@pytest.mark.parametrize(
    ("queue", "advised"),
    [(Queue("jobs"), False), (wait_queue(TopologyOptions(queue_name="jobs"), 1000), True)],
)
def test_the_advice_for_an_unequal_wait_queue_keeps_its_messages(queue, advised):
    """Other queues with different arguments can be deleted."""
    assert advised is ("run empty" in (queue.if_unequal or ""))


def test_without_delays_there_are_no_wait_queues():
    """The default."""
    assert Topology(queues=(Queue("jobs"),)) == build_topology(TopologyOptions(queue_name="jobs"))
