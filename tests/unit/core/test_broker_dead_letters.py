"""Where messages go that the broker itself gives up, and settings by which dead letters return."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import given

from aio_pika_batch.core.topology import Queue, TopologyOptions, build_topology
from aio_pika_batch.core.topology_options import (
    broker_dead_letter_arguments,
    policy_command,
    refuse_loops,
)
from aio_pika_batch.errors import ConfigurationError
from tests.unit.core.strategies import options

LOSSLESS = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}


def dead_lettering(exchange, key=None):
    """The arguments of a queue that dead-letters to an exchange."""
    to = {} if key is None else {"x-dead-letter-routing-key": key}
    return {"x-dead-letter-exchange": exchange, **to}


def wishes(**stated):
    """What is added to the arguments of a queue."""
    return broker_dead_letter_arguments(TopologyOptions(queue_name="jobs", **stated))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, ()),
        ({"broker_dead_letters": False, "dead_letter_queue": "dlq"}, ()),
        ({"dead_letter_queue": "dlq"}, ({"x-dead-letter-exchange": "jobs.dlx"},)),
        (
            {"dead_letter_exchange": "dlx", "dead_letter_routing_key": "k"},
            ({"x-dead-letter-exchange": "dlx", "x-dead-letter-routing-key": "k"},),
        ),
        (
            {"dead_letter_exchange": "dlx", "dead_letter_queue": "dlq"},
            ({"x-dead-letter-exchange": "dlx", "x-dead-letter-routing-key": "jobs"},),
        ),
        (
            {"queue_arguments": {"x-dead-letter-exchange": ""}, "dead_letter_queue": "dlq"},
            ({"x-dead-letter-routing-key": "dlq"},),
        ),
        (
            {
                "queue_arguments": {"x-dead-letter-exchange": "theirs"},
                "dead_letter_exchange": "dlx",
                "dead_letter_routing_key": "k",
            },
            (),
        ),
        (
            {
                "queue_arguments": {
                    "x-dead-letter-exchange": "x",
                    "x-dead-letter-routing-key": "k",
                },
                "dead_letter_queue": "dlq",
            },
            (),
        ),
        (
            {"queue_type": "quorum", "dead_letter_queue": "dlq"},
            (
                {"x-dead-letter-exchange": "jobs.dlx", **LOSSLESS},
                {"x-dead-letter-exchange": "jobs.dlx"},
            ),
        ),
        (
            {"queue_type": "quorum", "queue_arguments": {"x-dead-letter-exchange": "x"}},
            (LOSSLESS,),
        ),
        *(
            (
                {
                    "queue_type": "quorum",
                    "queue_arguments": {name: value},
                    "dead_letter_queue": "dlq",
                },
                ({"x-dead-letter-exchange": "jobs.dlx"},),
            )
            for name, value in [
                ("x-max-length", 5),
                ("x-max-length-bytes", 5),
                ("x-overflow", "drop-head"),
                ("x-dead-letter-strategy", "at-most-once"),
            ]
        ),
    ],
)
def test_the_arguments_by_which_the_broker_dead_letters(stated, expected):
    """To the same destination; at least once if it can. What the settings state stays."""
    assert expected == wishes(**stated)


@given(options)
def test_nothing_is_added_to_a_queue_that_is_not_declared(settings):
    """And nothing replaces an argument of the settings."""
    for queue in build_topology(settings).queues:
        if queue.check_only or queue.name != "jobs":
            assert () == queue.wishes
        for wish in queue.wishes:
            assert not wish.keys() & queue.arguments.keys()


@pytest.mark.parametrize(
    ("version", "at_least_once"),
    [(None, False), ((3, 8, 9), False), ((3, 10), True), ((4, 3, 6), True)],
)
def test_the_variants_of_a_declaration(version, at_least_once):
    """An old broker would ignore the strategy and keep only the overflow behaviour."""
    better, good = {"a": 1, **LOSSLESS}, {"a": 1}
    queue = Queue("jobs", arguments={"own": 1}, wishes=(better, good))

    expected = [{**better, "own": 1}, {**good, "own": 1}, {"own": 1}][0 if at_least_once else 1 :]

    assert tuple(expected) == queue.variants_on(version)
    assert expected[0] == queue.arguments_on(version)


def test_what_an_existing_queue_lacks():
    """Compared with the best declaration that the broker supports."""
    queue = Queue("jobs", arguments={"own": 1}, wishes=({"a": 1, **LOSSLESS}, {"a": 1}))
    assert {} == queue.lacking({"own": 1, "a": 1, **LOSSLESS}, (3, 10))
    assert LOSSLESS == queue.lacking({"own": 1, "a": 1}, (3, 10))
    assert {"a": 1, **LOSSLESS} == queue.lacking({"own": 1}, (3, 10))
    assert {"a": 1} == queue.lacking({"own": 1}, (3, 8))
    assert {} == Queue("dlq", no_delivery_limit=True).lacking({}, (4, 0))


@pytest.mark.parametrize(("vhost", "where"), [("/", []), ("my shop", ["-p", "my shop"])])
def test_the_policy_for_an_existing_queue(vhost, where):
    """A command that a shell reads as it is meant, for exactly this queue."""
    words = shlex.split(policy_command("a.b", {"x-dead-letter-exchange": "x", **LOSSLESS}, vhost))

    assert [
        *["rabbitmqctl", "set_policy", *where, "--apply-to", "queues", "a.b-dead-letters"],
        r"^a\.b$",
    ] == words[:-1]
    assert {
        "dead-letter-exchange": "x",
        "dead-letter-strategy": "at-least-once",
        "overflow": "reject-publish",
    } == json.loads(words[-1])


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ({"dead_letter_queue": "jobs"}, "dead_letter_queue is the queue itself"),
        ({"queue_arguments": {"x-dead-letter-exchange": ""}}, "by the name of the queue"),
        (
            {
                "queue_arguments": {
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": "jobs",
                }
            },
            "by the name of the queue",
        ),
        (
            {
                "queue_arguments": {"x-dead-letter-exchange": ""},
                "dead_letter_exchange": "dlx",
            },
            "by the name of the queue",
        ),
        ({"exchange_name": "x", "dead_letter_exchange": "x"}, "the one that the queue is bound to"),
        (
            {"exchange_name": "x", "dead_letter_exchange": "x", "dead_letter_routing_key": "a"},
            None,
        ),
        (
            {
                "exchange_name": "x",
                "routing_keys": ("a", "b"),
                "dead_letter_exchange": "x",
                "dead_letter_routing_key": "b",
            },
            "the one that the queue is bound to",
        ),
        (
            {"exchange_name": "x", "dead_letter_exchange": "x", "dead_letter_queue": "dlq"},
            "the one that the queue is bound to",
        ),
        (
            {
                "exchange_name": "x",
                "exchange_type": "topic",
                "routing_keys": ("order.*", "#.paid"),
                "dead_letter_exchange": "x",
                "dead_letter_routing_key": "bill.paid",
            },
            "the one that the queue is bound to",
        ),
        (
            {
                "exchange_name": "x",
                "exchange_type": "topic",
                "routing_keys": ("order.*",),
                "dead_letter_exchange": "x",
                "dead_letter_queue": "dlq",
            },
            None,
        ),
        (
            {
                "exchange_name": "x",
                "exchange_type": "fanout",
                "dead_letter_exchange": "x",
                "dead_letter_routing_key": "dead",
            },
            "the one that the queue is bound to",
        ),
        ({}, None),
        ({"dead_letter_queue": "dlq"}, None),
        ({"queue_arguments": {"x-dead-letter-exchange": 5}}, None),
        ({"queue_arguments": {"x-dead-letter-exchange": ""}, "dead_letter_queue": "dlq"}, None),
        (
            {"queue_arguments": dead_lettering("", "dlq")},
            None,
        ),
    ],
)
def test_dead_letters_that_would_come_back_are_refused(stated, why):
    """Those of this library, and those of the broker."""
    settings = TopologyOptions(queue_name="jobs", **stated)
    if why is None:
        refuse_loops(settings)
        return
    with pytest.raises(ConfigurationError, match=r"would come back to itself, a loop") as caught:
        refuse_loops(settings)
    assert why in str(caught.value)
