"""The queues, exchanges and bindings that a consumer needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from aio_pika_batch.core.topology import (
    Binding,
    Exchange,
    Queue,
    Topology,
    TopologyOptions,
    build_topology,
    dead_letter_target,
    effective_queue_type,
    split_exclusive,
)
from tests.unit.core.strategies import options


@given(options)
def test_each_binding_has_a_declared_queue_and_exchange(settings):
    """Adapters do not need to guess."""
    topology = build_topology(settings)

    assert {each.exchange for each in topology.bindings} <= {
        each.name for each in topology.exchanges
    }
    assert {each.queue for each in topology.bindings} <= {each.name for each in topology.queues}
    assert "" not in {each.name for each in topology.exchanges}


@given(options)
def test_the_consumed_queue_is_as_configured(settings):
    """Its flags and arguments. Its type is one of the arguments."""
    (queue,) = [each for each in build_topology(settings).queues if each.name == "jobs"]
    stated = {} if settings.queue_type is None else {"x-queue-type": settings.queue_type}

    assert Queue(
        "jobs",
        durable=settings.queue_durable,
        exclusive=settings.queue_exclusive,
        auto_delete=settings.queue_auto_delete,
        arguments={**settings.queue_arguments, **stated},
        check_only=not settings.declare,
    ) == replace(queue, wishes={})
    assert queue.arguments.get("x-queue-type") == effective_queue_type(settings)


@given(options)
def test_without_declare_everything_is_only_checked(settings):
    """`declare=False` has the same entities, and no bindings."""
    topology = build_topology(settings)
    everything: list[Exchange | Queue] = [*topology.exchanges, *topology.queues]

    if not settings.declare:
        assert {True} == {each.check_only for each in everything}
        assert () == topology.bindings
    else:
        (queue,) = [each for each in topology.queues if each.name == "jobs"]
        assert not queue.check_only


@given(options)
def test_shared_entities_are_used_as_they_are(settings):
    """An existing dead-letter exchange or queue is not declared again.

    A wait queue is: with other arguments it could lose messages.
    """
    topology = build_topology(settings)
    own = {"jobs", settings.exchange_name, "jobs.retry.1000", "jobs.retry.2000"}

    everything: list[Exchange | Queue] = [*topology.exchanges, *topology.queues]
    assert all(each.existing_first is (each.name not in own) for each in everything)


@pytest.mark.parametrize(
    ("queue_type", "arguments", "effective"),
    [
        (None, {}, None),
        ("quorum", {}, "quorum"),
        (None, {"x-queue-type": "quorum"}, "quorum"),
        ("classic", {"x-queue-type": "quorum"}, "classic"),
        (None, {"x-queue-type": 5}, None),
    ],
)
def test_the_effective_queue_type(queue_type, arguments, effective):
    """The setting wins over the argument. Without both, the virtual host decides."""
    settings = TopologyOptions(queue_name="jobs", queue_type=queue_type, queue_arguments=arguments)

    assert effective == effective_queue_type(settings)


def test_a_queue_without_an_exchange():
    """It has no bindings: the default exchange knows every queue."""
    assert Topology(queues=(Queue("jobs"),)) == build_topology(TopologyOptions(queue_name="jobs"))


def test_the_exchange_is_as_configured():
    """Its flags and arguments."""
    settings = TopologyOptions(
        queue_name="jobs",
        exchange_name="later",
        exchange_type="x-delayed-message",
        exchange_auto_delete=True,
        exchange_internal=True,
        exchange_arguments={"x-delayed-type": "topic", "alternate-exchange": "unrouted"},
    )

    assert (
        Exchange(
            "later",
            "x-delayed-message",
            auto_delete=True,
            internal=True,
            arguments={"x-delayed-type": "topic", "alternate-exchange": "unrouted"},
        ),
    ) == build_topology(settings).exchanges


@given(options)
def test_what_the_consumer_publishes_to_is_checked(settings):
    """The default exchange if it may retry, and the exchange of its dead letters."""
    topology = build_topology(settings)
    target = dead_letter_target(settings)

    expected = ["jobs"] if settings.republishes else []
    found = [each.routing_key for each in topology.publishes if not each.exchange]
    if target is not None and not target.exchange:
        found.pop()
    assert expected == found
    if target is not None:
        assert target.exchange == topology.publishes[-1].exchange
        if target.routing_key is not None:
            assert target.routing_key == topology.publishes[-1].routing_key


def test_a_queue_with_several_routing_keys():
    """One binding for each, with the same arguments."""
    settings = TopologyOptions(
        queue_name="jobs",
        exchange_name="events",
        exchange_type="topic",
        exchange_durable=False,
        routing_keys=("order.*", "user.#"),
        binding_arguments={"x": 1},
    )

    assert Topology(
        (Exchange("events", "topic", durable=False),),
        (Queue("jobs"),),
        (
            Binding("jobs", "events", "order.*", {"x": 1}),
            Binding("jobs", "events", "user.#", {"x": 1}),
        ),
    ) == build_topology(settings)


@given(options)
def test_exclusive_queues_are_split_off_with_their_bindings(settings):
    """Exchanges and other queues stay in the shared part, and nothing is lost."""
    topology = build_topology(settings)

    shared, own = split_exclusive(topology)

    assert topology.exchanges == shared.exchanges
    assert () == own.exchanges
    assert [queue for queue in topology.queues if queue.exclusive] == list(own.queues)
    assert [queue for queue in topology.queues if not queue.exclusive] == list(shared.queues)
    for part in (shared, own):
        assert {each.queue for each in part.bindings} <= {queue.name for queue in part.queues}
    assert set(map(str, topology.bindings)) == set(map(str, (*shared.bindings, *own.bindings)))
    assert len(topology.bindings) == len(shared.bindings) + len(own.bindings)
