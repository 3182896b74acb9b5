"""What a consumer needs on its broker."""

from __future__ import annotations

import pytest
from hypothesis import given

from aio_pika_batch.core.topology import (
    Binding,
    Exchange,
    Queue,
    Topology,
    TopologyOptions,
    build_topology,
    effective_queue_type,
    split_exclusive,
)
from tests.unit.core.strategies import wanted


@given(wanted)
def test_every_binding_joins_what_is_declared(settings):
    """No adapter has to guess, and no binding names what nobody checks."""
    topology = build_topology(settings)

    assert {each.exchange for each in topology.bindings} <= {
        each.name for each in topology.exchanges
    }
    assert {each.queue for each in topology.bindings} <= {each.name for each in topology.queues}
    assert "" not in {each.name for each in topology.exchanges}


@given(wanted)
def test_the_consumed_queue_is_as_the_settings_say(settings):
    """Its flags and arguments; its type is one more argument."""
    (queue,) = [each for each in build_topology(settings).queues if each.name == "jobs"]
    stated = {} if settings.queue_type is None else {"x-queue-type": settings.queue_type}

    assert (
        Queue(
            "jobs",
            durable=settings.queue_durable,
            exclusive=settings.queue_exclusive,
            auto_delete=settings.queue_auto_delete,
            arguments={**settings.queue_arguments, **stated},
            check_only=not settings.declare,
        )
        == queue
    )
    assert queue.arguments.get("x-queue-type") == effective_queue_type(settings)


@given(wanted)
def test_where_nothing_may_be_declared_all_is_only_checked(settings):
    """`declare=False` names the same things, and binds nothing."""
    topology = build_topology(settings)
    everything: list[Exchange | Queue] = [*topology.exchanges, *topology.queues]

    if not settings.declare:
        assert {True} == {each.check_only for each in everything}
        assert () == topology.bindings
    else:
        (queue,) = [each for each in topology.queues if each.name == "jobs"]
        assert not queue.check_only


@given(wanted)
def test_what_others_may_share_is_taken_as_it_is(settings):
    """A dead-letter exchange or queue that exists is not declared again with other properties.

    A wait queue is: with others it could lose what is in it.
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
def test_the_queue_type_that_will_be_asked_for(queue_type, arguments, effective):
    """The setting wins over the argument; nobody's word leaves it to the virtual host."""
    settings = TopologyOptions(queue_name="jobs", queue_type=queue_type, queue_arguments=arguments)

    assert effective == effective_queue_type(settings)


def test_a_queue_alone():
    """Without an exchange there is nothing to bind: the default one knows every queue."""
    assert Topology(queues=(Queue("jobs"),)) == build_topology(TopologyOptions(queue_name="jobs"))


def test_a_queue_that_is_bound_by_several_keys():
    """One binding each, all with the same arguments."""
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


@given(wanted)
def test_an_exclusive_queue_is_left_to_the_connection_that_it_lives_with(settings):
    """It goes with its bindings; exchanges and all else anybody may declare; nothing is lost."""
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
