"""Where dead letters are published, and that they reach their queue."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.topology import (
    Exchange,
    Queue,
    Topology,
    TopologyOptions,
    build_topology,
    dead_letter_target,
    effective_queue_type,
    exchange_to_look_up,
    to_definitions,
)
from aio_pika_batch.core.topology_options import (
    DeadLetterTarget,
    new_dead_letter_exchange_type,
    topic_matches,
    topic_words,
)
from aio_pika_batch.errors import TopologyError
from tests.unit.core.strategies import any_options, options


def reached(bindings, kind, exchange, *keys):
    """The queues that receive a message without headers from an exchange of this type."""
    matches = {
        "direct": lambda bound: bound in keys,
        "fanout": lambda _: True,
        "headers": lambda _: True,
        "topic": lambda bound: any(
            topic_matches(topic_words(bound), topic_words(each)) for each in keys
        ),
    }[kind]
    return {
        binding.queue
        for binding in bindings
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


def published(settings, data):
    """The exchange and the routing keys of some dead letter."""
    target = dead_letter_target(settings)
    assert target is not None
    bound_by = settings.binding_keys if settings.exchange_name else ()
    came_by = st.sampled_from([*bound_by, settings.queue_name])
    if settings.exchange_name and settings.exchange_type != "direct":
        came_by |= st.sampled_from(["", "any", "any.key"])
    key = data.draw(came_by)
    keys = [key if target.routing_key is None else target.routing_key]
    return target.exchange, *keys, *([] if target.also is None else [target.also])


existing_types = st.none() | st.sampled_from(["direct", "fanout", "topic", "headers"])


@given(
    any_options.filter(lambda settings: settings.declare and settings.dead_letter_queue),
    existing_types,
    st.data(),
)
def test_a_dead_letter_reaches_its_queue_or_the_start_is_refused(settings, existing, data):
    """Whatever the types of the exchanges are, with each routing key that a message can have.

    A topic exchange is only bound to literal keys here: with others, any key may come.
    """
    try:
        topology = build_topology(settings, dead_letter_exchange_type=existing)
    except TopologyError:
        return
    exchange, *keys = published(settings, data)
    kind = existing or new_dead_letter_exchange_type(settings, exchange)
    is_from_elsewhere = settings.exchange_type == "topic" and keys[0].startswith("any")
    if not exchange or kind.startswith("x-") or is_from_elsewhere:
        return
    assert reached(topology.bindings, kind, exchange, *keys) >= {"jobs.dlq"}


@given(
    any_options,
    existing_types,
    st.none() | st.sampled_from(["", "dead"]),
    existing_types,
    st.data(),
)
def test_a_shared_exchange_does_not_mix_dead_letters(settings, kind, key, existing, data):
    """Even if both have messages with the same routing keys."""
    shared = {
        "dead_letter_exchange": "graveyard",
        "dead_letter_exchange_type": kind,
        "dead_letter_routing_key": key,
        "queue_arguments": {},
        "declare": True,
    }
    settings = replace(settings, **shared)
    mine = replace(settings, queue_name="jobs", dead_letter_queue="jobs.dlq")
    theirs = replace(settings, queue_name="others", dead_letter_queue="others.dlq")
    try:
        bindings = [
            binding
            for each in (mine, theirs)
            for binding in build_topology(each, dead_letter_exchange_type=existing).bindings
        ]
    except TopologyError:
        return
    exchange, *keys = published(mine, data)
    kind = existing or new_dead_letter_exchange_type(settings, exchange)
    if not kind.startswith("x-"):
        dead = reached(bindings, kind, exchange, *keys) & {"jobs.dlq", "others.dlq"}
        assert {"jobs.dlq"} == dead


@pytest.mark.parametrize(
    ("stated", "existing", "words"),
    [
        ({"dead_letter_exchange_type": "fanout"}, "direct", "exists as a direct exchange, not"),
        ({"dead_letter_exchange": "dlx"}, "fanout", "whose name begins with 'jobs.'"),
        (
            {"dead_letter_exchange": "dlx", "dead_letter_exchange_type": "fanout"},
            None,
            "'dlx' is a fanout exchange",
        ),
        ({"dead_letter_exchange": "dlx"}, "headers", "also to those of other services"),
        ({"dead_letter_exchange": "dlx"}, "x-random", "'dlx' is a x-random exchange"),
        ({"routing_keys": ("#",)}, "direct", "set dead_letter_routing_key"),
        ({"exchange_type": "fanout"}, "direct", "would not reach queue 'dlq'"),
        ({"exchange_type": "x-recent-history"}, "direct", "would not reach queue 'dlq'"),
        (
            {
                "exchange_type": "x-delayed-message",
                "exchange_arguments": {"x-delayed-type": "fanout"},
            },
            "direct",
            "would not reach queue 'dlq'",
        ),
    ],
)
def test_a_dead_letter_exchange_that_cannot_work_is_refused(stated, existing, words):
    """At the start, and the error says which setting to change."""
    settings = TopologyOptions(
        **{
            "queue_name": "jobs",
            "exchange_name": "events",
            "exchange_type": "topic",
            "dead_letter_queue": "dlq",
        }
        | stated
    )
    with pytest.raises(TopologyError, match=re.escape(words)):
        build_topology(settings, dead_letter_exchange_type=existing)


def test_a_delaying_exchange_routes_by_its_delayed_type():
    """`x-delayed-type` says which routing keys messages have."""
    settings = TopologyOptions(
        queue_name="jobs",
        exchange_name="later",
        exchange_type="x-delayed-message",
        exchange_arguments={"x-delayed-type": "direct"},
        routing_keys=("a",),
        dead_letter_queue="dlq",
    )
    topology = build_topology(settings, dead_letter_exchange_type="direct")
    assert ["a", "jobs"] == [each.routing_key for each in topology.bindings if each.queue == "dlq"]


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
    """It has no dead-letter queue of its own. Only quorum queues have the limit, and a queue
    without a type may be one.
    """
    for queue in build_topology(settings).queues:
        is_dead = queue.name == "jobs.dlq" and settings.dead_letter_queue is not None
        may_be_quorum = queue.arguments.get("x-queue-type") != "classic"
        assert (is_dead and may_be_quorum) is queue.no_delivery_limit


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
    # Whether a queue without a type accepts it depends on the virtual host.
    of_no_type = Queue("q", no_delivery_limit=True)
    assert limit == of_no_type.arguments_on(version)
    assert ({} if limit else None) == of_no_type.arguments_after(
        of_no_type.arguments_on(version), "invalid arg 'x-delivery-limit' for queue 'q'"
    )
    [definition] = to_definitions(Topology(queues=(of_no_type,)), "/", version)["queues"]
    assert {} == definition["arguments"]


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
            DeadLetterTarget("dlx", also="jobs.dead-letter"),
        ),
        (
            {"queue_arguments": {"x-dead-letter-exchange": "jobs.dlx"}, "dead_letter_queue": "dlq"},
            DeadLetterTarget("jobs.dlx"),
        ),
        (
            {"dead_letter_exchange": "dlx", "dead_letter_queue": "dlq"},
            DeadLetterTarget("dlx", also="jobs.dead-letter"),
        ),
        (
            {
                "dead_letter_exchange": "dlx",
                "dead_letter_routing_key": "dead",
                "dead_letter_queue": "dlq",
            },
            DeadLetterTarget("dlx", "dead", "jobs.dead-letter"),
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
        (
            {"exchange_name": "x", "dead_letter_exchange": "x", "dead_letter_queue": "dlq"},
            DeadLetterTarget("x", "jobs.dead-letter"),
        ),
        (
            {
                "exchange_name": "x",
                "exchange_type": "fanout",
                "dead_letter_exchange_type": "direct",
                "dead_letter_queue": "dlq",
            },
            DeadLetterTarget("jobs.dlx", also="jobs.dead-letter"),
        ),
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
        (None, ("a", "b"), None, [""]),
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
def test_how_a_dead_letter_queue_is_bound_to_an_exchange_of_its_own(
    kind, routing_keys, stated, bound
):
    """By the routing keys that a dead letter can have, and no others. A new exchange is fanout."""
    settings = TopologyOptions(
        queue_name="jobs",
        queue_type="quorum",
        exchange_name="events",
        routing_keys=routing_keys,
        dead_letter_exchange_type=kind,
        dead_letter_routing_key=stated,
        dead_letter_queue="dlq",
    )

    topology = build_topology(settings)

    new = kind or "fanout"
    assert (Exchange("jobs.dlx", new, existing_first=True), Exchange("events")) == (
        topology.exchanges
    )
    assert (
        Queue(
            "dlq", arguments={"x-queue-type": "quorum"}, no_delivery_limit=True, existing_first=True
        ),
        Queue("jobs", arguments={"x-queue-type": "quorum"}),
    ) == tuple(replace(each, wishes={}) for each in topology.queues)
    assert bound == [each.routing_key for each in topology.bindings if each.queue == "dlq"]
    assert {"jobs.dlx"} == {each.exchange for each in topology.bindings if each.queue == "dlq"}


@pytest.mark.parametrize(
    ("stated", "existing", "kind", "bound"),
    [
        (None, None, "direct", ["jobs.dead-letter"]),
        (None, "direct", "direct", ["jobs.dead-letter"]),
        (None, "topic", "direct", ["jobs.dead-letter"]),
        ("topic", None, "topic", ["jobs.dead-letter"]),
    ],
)
def test_how_a_dead_letter_queue_is_bound_to_an_exchange_that_may_be_shared(
    stated, existing, kind, bound
):
    """By a key that only its dead letters have."""
    settings = TopologyOptions(
        queue_name="jobs",
        exchange_name="events",
        routing_keys=("a", "b"),
        dead_letter_exchange="dlx",
        dead_letter_exchange_type=stated,
        dead_letter_queue="dlq",
    )

    topology = build_topology(settings, dead_letter_exchange_type=existing)

    assert Exchange("dlx", kind, existing_first=True) == topology.exchanges[0]
    assert exchange_to_look_up(settings) == topology.exchanges[0]
    assert bound == [each.routing_key for each in topology.bindings if each.queue == "dlq"]


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"dead_letter_exchange": "dlx"},
        {"dead_letter_queue": "dlq", "declare": False},
        {"dead_letter_queue": "dlq", "queue_arguments": {"x-dead-letter-exchange": ""}},
        {"dead_letter_queue": "dlq", "exchange_name": "x", "dead_letter_exchange": "x"},
    ],
)
def test_no_exchange_is_looked_up_if_no_queue_is_bound(stated):
    """Or if the settings say what it is."""
    assert exchange_to_look_up(TopologyOptions(queue_name="jobs", **stated)) is None


def test_without_declaring_a_dead_letter_queue_is_not_bound():
    """The program that declares it binds it, too."""
    options = TopologyOptions(queue_name="jobs", dead_letter_queue="dead", declare=False)

    topology = build_topology(options)

    assert () == topology.bindings
    assert ["dead", "jobs"] == sorted(queue.name for queue in topology.queues)
    assert all(queue.check_only for queue in topology.queues)


def test_a_queue_without_an_exchange_has_one_key_for_its_dead_letters():
    """Its name, with which the default exchange routes to it; a direct exchange can be bound."""
    options = TopologyOptions(
        queue_name="jobs",
        dead_letter_queue="dead",
        dead_letter_exchange="jobs.dlx",
        dead_letter_exchange_type="direct",
    )
    assert "jobs.dlx" == dead_letter_target(options).exchange


def test_the_second_key_of_dead_letters_is_no_longer_than_a_key_may_be():
    """The name of the queue itself, then."""
    name = "q" * 250
    target = dead_letter_target(
        TopologyOptions(queue_name=name, dead_letter_exchange="dlx", dead_letter_queue="dead")
    )
    assert name in str(target)
    assert f"{name}.dead-letter" not in str(target)
