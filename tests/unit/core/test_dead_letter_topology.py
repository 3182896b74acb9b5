"""Where dead letters are published, and that they reach their queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.settlement_plan import DeadLetterTarget
from aio_pika_batch.core.topology import (
    Exchange,
    Queue,
    TopologyOptions,
    build_topology,
    dead_letter_target,
    effective_queue_type,
)
from tests.unit.core.strategies import options


def reached(topology, exchange, routing_key):
    """The queues that receive a message without headers, by the rules of each exchange type."""
    if not exchange:
        return {queue.name for queue in topology.queues if queue.name == routing_key}
    (kind,) = {each.type for each in topology.exchanges if each.name == exchange}
    matches = {
        "direct": lambda bound: bound == routing_key,
        "fanout": lambda _: True,
        "headers": lambda _: True,
        "topic": lambda bound: bound in {"#", routing_key},
    }[kind]
    return {
        binding.queue
        for binding in topology.bindings
        if binding.exchange == exchange and matches(binding.routing_key)
    }


@given(options)
def test_a_dead_letter_exchange_without_a_queue_is_never_created(settings):
    """It would discard all dead letters."""
    target = dead_letter_target(settings)
    if settings.dead_letter_queue is None and target is not None and target.exchange:
        (exchange,) = [
            each for each in build_topology(settings).exchanges if each.name == target.exchange
        ]
        assert exchange.check_only


@given(options.filter(lambda settings: settings.declare and settings.dead_letter_queue), st.data())
def test_a_dead_letter_reaches_its_queue_with_any_routing_key(settings, data):
    """All routing keys that a message can have are bound, for each known exchange type."""
    topology = build_topology(settings)
    target = dead_letter_target(settings)
    assert target is not None
    came_by = data.draw(st.sampled_from([*settings.routing_keys, settings.queue_name]))
    key = came_by if target.routing_key is None else target.routing_key

    if settings.dead_letter_exchange_type != "x-consistent-hash" or not target.exchange:
        expected = {"jobs.dlq"}
        if target.exchange == "" and target.routing_key != "jobs.dlq":
            # Configured on purpose: the default exchange, and a key that isn't the name of a queue.
            expected = {name for name in ("jobs",) if name == target.routing_key}
        assert expected == reached(topology, target.exchange, key)


@given(options)
def test_a_dead_letter_queue_has_a_target(settings):
    """Only strings name an exchange."""
    target = dead_letter_target(settings)

    if settings.dead_letter_queue is not None or settings.dead_letter_exchange is not None:
        assert target is not None
    if target is not None:
        assert str is type(target.exchange)
        assert type(target.routing_key) in {str, type(None)}


@given(options)
def test_a_dead_letter_queue_has_the_type_of_the_queue(settings):
    """A replicated queue has replicated dead letters. Without a type, none is set."""
    kind = effective_queue_type(settings)
    dead = [each for each in build_topology(settings).queues if each.name == "jobs.dlq"]

    assert bool(settings.dead_letter_queue) is bool(dead)
    for queue in dead:
        assert ({} if kind is None else {"x-queue-type": kind}) == queue.arguments
        assert queue.durable
        assert not queue.exclusive
        assert not queue.auto_delete


@given(options)
def test_a_dead_letter_queue_has_no_delivery_limit(settings):
    """It has no dead-letter queue of its own. Only quorum queues have the limit."""
    for queue in build_topology(settings).queues:
        is_dead = queue.name == "jobs.dlq" and settings.dead_letter_queue is not None
        is_quorum = queue.arguments.get("x-queue-type") == "quorum"
        assert (is_dead and is_quorum) is queue.no_delivery_limit


@pytest.mark.parametrize(
    ("version", "limit"),
    [(None, {}), ((3, 10, 8), {}), ((3, 13, 7), {}), ((4, 0), {"x-delivery-limit": -1})],
)
def test_how_the_delivery_limit_is_lifted(version, limit):
    """Since 4.0 there is a default limit. Before that, -1 would be the strictest limit."""
    quorum = {"x-queue-type": "quorum"}

    assert {**quorum, **limit} == Queue("q", arguments=quorum, no_delivery_limit=True).arguments_on(
        version
    )
    assert quorum == Queue("q", arguments=quorum).arguments_on(version)


@pytest.mark.parametrize(
    ("stated", "target"),
    [
        ({}, None),
        ({"dead_letter_exchange": "dlx"}, DeadLetterTarget("dlx")),
        (
            {"dead_letter_exchange": "dlx", "dead_letter_routing_key": "dead"},
            DeadLetterTarget("dlx", "dead"),
        ),
        ({"dead_letter_queue": "dlq"}, DeadLetterTarget("jobs.dlx")),
        (
            {"dead_letter_queue": "dlq", "dead_letter_routing_key": "dead"},
            DeadLetterTarget("jobs.dlx", "dead"),
        ),
        ({"dead_letter_routing_key": "dead"}, None),
        (
            {"queue_arguments": {"x-dead-letter-exchange": "dlx"}, "dead_letter_queue": "dlq"},
            DeadLetterTarget("dlx"),
        ),
        (
            {"queue_arguments": {"x-dead-letter-exchange": "x", "x-dead-letter-routing-key": "k"}},
            DeadLetterTarget("x", "k"),
        ),
        (
            {
                "queue_arguments": {
                    "x-dead-letter-exchange": "x",
                    "x-dead-letter-routing-key": "k",
                },
                "dead_letter_routing_key": "",
            },
            DeadLetterTarget("x", ""),
        ),
        (
            {
                "queue_arguments": {
                    "x-dead-letter-exchange": "x",
                    "x-dead-letter-routing-key": "k",
                },
                "dead_letter_exchange": "dlx",
            },
            DeadLetterTarget("dlx"),
        ),
        ({"queue_arguments": {"x-dead-letter-routing-key": "k"}}, None),
        ({"queue_arguments": {"x-dead-letter-exchange": 5}}, None),
        (
            {"queue_arguments": {"x-dead-letter-exchange": "x", "x-dead-letter-routing-key": 5}},
            DeadLetterTarget("x"),
        ),
        (
            {"dead_letter_exchange": "", "dead_letter_queue": "dlq"},
            DeadLetterTarget("", "dlq"),
        ),
        (
            {
                "queue_arguments": {"x-dead-letter-exchange": ""},
                "dead_letter_queue": "dlq",
            },
            DeadLetterTarget("", "dlq"),
        ),
        (
            {
                "dead_letter_exchange": "",
                "dead_letter_queue": "dlq",
                "dead_letter_routing_key": "elsewhere",
            },
            DeadLetterTarget("", "elsewhere"),
        ),
        ({"dead_letter_exchange": ""}, DeadLetterTarget("")),
    ],
)
def test_where_dead_letters_go(stated, target):
    """The settings come first, then the arguments of the queue, then an exchange for the dead-
    letter queue.
    """
    assert target == dead_letter_target(TopologyOptions(queue_name="jobs", **stated))


@pytest.mark.parametrize(
    ("kind", "routing_keys", "stated", "bound"),
    [
        ("fanout", ("a", "b"), None, [""]),
        ("headers", ("a", "b"), None, [""]),
        ("topic", ("a", "b"), None, ["#"]),
        ("direct", ("a", "b"), None, ["a", "b", "jobs"]),
        ("direct", (), None, ["jobs"]),
        ("direct", ("jobs", "a"), None, ["jobs", "a"]),
        ("x-random", ("a",), None, ["a", "jobs"]),
        ("direct", ("a", "b"), "dead", ["dead"]),
        ("topic", ("a", "b"), "", [""]),
    ],
)
def test_how_a_dead_letter_queue_is_bound(kind, routing_keys, stated, bound):
    """By the routing keys that a dead letter can have, and no others."""
    settings = TopologyOptions(
        queue_name="jobs",
        queue_type="quorum",
        exchange_name="events",
        routing_keys=routing_keys,
        dead_letter_exchange="dlx",
        dead_letter_exchange_type=kind,
        dead_letter_routing_key=stated,
        dead_letter_queue="dlq",
    )

    topology = build_topology(settings)

    assert (Exchange("dlx", kind, existing_first=True), Exchange("events")) == topology.exchanges
    assert (
        Queue(
            "dlq", arguments={"x-queue-type": "quorum"}, no_delivery_limit=True, existing_first=True
        ),
        Queue("jobs", arguments={"x-queue-type": "quorum"}),
    ) == topology.queues
    assert bound == [each.routing_key for each in topology.bindings if each.queue == "dlq"]
    assert {"dlx"} == {each.exchange for each in topology.bindings if each.queue == "dlq"}


def test_without_declaring_a_dead_letter_queue_is_not_bound():
    """Whoever declares it binds it, too."""
    options = TopologyOptions(queue_name="jobs", dead_letter_queue="dead", declare=False)

    topology = build_topology(options)

    assert () == topology.bindings
    assert ["dead", "jobs"] == sorted(queue.name for queue in topology.queues)
    assert all(queue.check_only for queue in topology.queues)
