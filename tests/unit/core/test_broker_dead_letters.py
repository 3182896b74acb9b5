"""Where messages go that the broker itself gives up, and settings by which dead letters return."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
        ({}, {}),
        ({"broker_dead_letters": False, "dead_letter_queue": "dlq"}, {}),
        ({"dead_letter_queue": "dlq"}, {"x-dead-letter-exchange": "jobs.dlx"}),
        (
            {"dead_letter_exchange": "dlx", "dead_letter_routing_key": "k"},
            {"x-dead-letter-exchange": "dlx", "x-dead-letter-routing-key": "k"},
        ),
        (
            {"dead_letter_exchange": "dlx", "dead_letter_queue": "dlq"},
            {"x-dead-letter-exchange": "dlx", "x-dead-letter-routing-key": "jobs.dead-letter"},
        ),
        (
            {"queue_arguments": {"x-dead-letter-exchange": ""}, "dead_letter_queue": "dlq"},
            {"x-dead-letter-routing-key": "dlq"},
        ),
        (
            {
                "queue_arguments": {"x-dead-letter-exchange": "theirs"},
                "dead_letter_exchange": "dlx",
                "dead_letter_routing_key": "k",
            },
            {},
        ),
        (
            {
                "queue_arguments": {
                    "x-dead-letter-exchange": "x",
                    "x-dead-letter-routing-key": "k",
                },
                "dead_letter_queue": "dlq",
            },
            {},
        ),
        (
            {"queue_type": "quorum", "dead_letter_queue": "dlq"},
            {"x-dead-letter-exchange": "jobs.dlx", **LOSSLESS},
        ),
        (
            {"queue_type": "quorum", "queue_arguments": {"x-dead-letter-exchange": "x"}},
            LOSSLESS,
        ),
        *(
            (
                {
                    "queue_type": "quorum",
                    "queue_arguments": {name: value},
                    "dead_letter_queue": "dlq",
                },
                {"x-dead-letter-exchange": "jobs.dlx"},
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
            assert {} == queue.wishes
        assert not queue.wishes.keys() & queue.arguments.keys()


@pytest.mark.parametrize(
    ("version", "at_least_once"),
    [(None, False), ((3, 8, 9), False), ((3, 10), True), ((4, 3, 6), True)],
)
def test_an_old_broker_gets_no_part_of_at_least_once(version, at_least_once):
    """It would ignore the strategy and keep only the overflow behaviour."""
    queue = Queue("jobs", arguments={"own": 1}, wishes={"a": 1, **LOSSLESS})
    expected = {"own": 1, "a": 1, **(LOSSLESS if at_least_once else {})}
    assert expected == queue.arguments_on(version)


WISHES = {**dead_lettering("dlx", "k"), **LOSSLESS}


def declared(wanted, existing):
    """The arguments by which a declaration succeeds; None if it is refused."""
    arguments = wanted.arguments_on((4, 0))
    for _ in range(10):
        # The broker refuses a routing key without an exchange, which costs another attempt.
        if "x-dead-letter-routing-key" in arguments:
            assert "x-dead-letter-exchange" in arguments
        if differs := sorted(
            name for name in {*arguments, *existing} if arguments.get(name) != existing.get(name)
        ):
            value = existing.get(differs[0])
            current = "none" if value is None else f"the value '{value}' of type 'longstr'"
            text = f"inequivalent arg '{differs[0]}' for queue 'jobs': but current is {current}"
        else:
            return arguments
        following = wanted.arguments_after(arguments, text)
        if following is None:
            return None
        arguments = following
    raise AssertionError("it goes on for ever")


@given(
    st.fixed_dictionaries(
        {},
        optional={name: st.sampled_from([value, "other"]) for name, value in WISHES.items()},
    ).filter(lambda has: "x-dead-letter-exchange" in has or "x-dead-letter-routing-key" not in has),
    st.sampled_from([WISHES, LOSSLESS | dead_lettering("dlx"), dead_lettering("dlx"), {}]),
    st.booleans(),
)
@example({}, WISHES, False)
def test_an_existing_queue_is_accepted_whatever_wishes_it_fulfils(has, wishes, is_other):
    """But it must have the arguments of the settings, and no others."""
    wanted = Queue("jobs", arguments={"own": "1"}, wishes=wishes, is_consumed=True)
    existing = {**has, "own": "2" if is_other else "1"}

    accepted = declared(wanted, existing)

    if is_other:
        assert accepted is None
        return
    assert existing == accepted
    found = wanted.unfulfilled(accepted, (4, 0))
    assert {name for name in wishes if name not in has} == {*found.lacking}
    assert {name: has[name] for name in has if has[name] != wishes.get(name)} == found.differing
    assert (has != wishes) is bool(found)


@pytest.mark.parametrize(
    ("arguments", "limit", "accepted"),
    [
        ({}, -1, {"x-delivery-limit": -1}),
        ({}, 5, None),
        ({"x-delivery-limit": 5}, -1, None),
    ],
)
def test_a_consumer_of_dead_letters_accepts_a_queue_without_a_delivery_limit(
    arguments, limit, accepted
):
    """The consumer before it has declared the queue so. Another limit must be in the settings."""
    text = f"inequivalent arg 'x-delivery-limit': current is the value '{limit}' of type 'long'"
    queue = Queue("dlq", arguments=arguments)
    assert accepted == replace(queue, is_consumed=True).arguments_after(arguments, text)
    assert queue.arguments_after(arguments, text) is None


def test_a_dead_letter_queue_lacks_nothing():
    """Only wishes are missed, and no delivery limit that a queue can't have."""
    assert not Queue("dlq", no_delivery_limit=True).unfulfilled({}, (4, 0))


@pytest.mark.parametrize(("vhost", "where"), [("/", []), ("my shop", ["-p", "my shop"])])
def test_the_policy_for_an_existing_queue(vhost, where):
    """A command with correct quotes, for exactly this queue."""
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
        ({"dead_letter_queue": "jobs.retry.1000"}, "the name of a queue for its retries"),
        (
            {"dead_letter_exchange": "", "dead_letter_routing_key": "jobs.retry.1000"},
            "by the name of the queue",
        ),
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
        ({"exchange_name": "x", "dead_letter_exchange": "x", "dead_letter_queue": "dlq"}, None),
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
