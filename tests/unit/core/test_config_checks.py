"""Warnings about settings that are valid, but probably not intended."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.config_checks import (
    ConsumerProfile,
    amqp10_hint,
    amqp10_warnings_for,
    broker_warnings_for,
    clock_warning,
    costliest_setting,
    crash_policy,
    dead_letter_queue_warnings,
    delays_natively,
    existing_queue_warnings,
    hints_for,
    warnings_for,
)
from aio_pika_batch.core.quarantine import CrashPolicy
from aio_pika_batch.core.results import MessageResult
from aio_pika_batch.core.topology import TopologyOptions
from aio_pika_batch.core.topology_options import DEAD_LETTER_EXCHANGE
from tests.unit.core.strategies import options

SOUND = TopologyOptions(queue_name="jobs", dead_letter_exchange="dlx")
LIMITS = ("x-message-ttl=9", "x-max-length=5", "x-max-length-bytes=7")
QUORUM = TopologyOptions(
    queue_name="jobs", queue_type="quorum", queue_arguments={"x-dead-letter-exchange": "dlx"}
)
USUAL = ConsumerProfile(prefetch=20, batch_size=10)

OUR_NAMES = (
    "prefetch_count",
    "dead_letter_exchange",
    "dead_letter_queue",
    "broker_dead_letters",
    "queue_arguments",
    "queue_type",
    "max_requeue_attempts",
    "process_timeout",
)

versions = st.none() | st.sampled_from([(3, 8, 9), (3, 10, 8), (3, 13), (4, 0), (4, 0, 5), (4, 3)])
seconds = st.floats(0, 10_000)
profiles = st.builds(
    ConsumerProfile,
    prefetch=st.integers(0, 100),
    batch_size=st.integers(1, 100),
    batch_timeout=seconds,
    concurrency=st.integers(1, 5),
    process_timeout=st.none() | seconds,
    max_requeue_attempts=st.integers(0, 50),
    failure_results=st.sets(st.sampled_from(MessageResult)),
    consumer_arguments=st.sampled_from([{}, {"x-consumer-timeout": 60_000}, {"x-priority": 3}]),
    retry_seconds=seconds,
    ordered=st.booleans(),
)


def with_arguments(**arguments):
    """A quorum queue with further arguments, whose underscores are dashes."""
    more = {f"x-{name.replace('_', '-')}": value for name, value in arguments.items()}
    return replace(QUORUM, queue_arguments={**QUORUM.queue_arguments, **more})


@given(options, profiles, versions)
def test_each_warning_names_the_setting_to_change(settings, profiles, version):
    """And no warning occurs twice."""
    found = [
        *warnings_for(settings, profiles),
        *hints_for(settings, profiles),
        *broker_warnings_for(settings, profiles, version),
    ]

    for line in found:
        assert any(name in line for name in OUR_NAMES)
        assert "\n" not in line
        assert 30 > len(line.split())
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("settings", [SOUND, QUORUM])
def test_good_settings_have_no_warnings(settings):
    """A queue of either type."""
    assert [] == warnings_for(settings, USUAL)


@pytest.mark.parametrize(
    ("prefetch", "batch_size", "expected"),
    [(0, 100, False), (9, 10, True), (10, 10, False), (11, 10, False), (1, 1, False)],
)
def test_a_prefetch_below_the_batch_size(prefetch, batch_size, expected):
    """No batch would ever be full. 0 means no limit."""
    found = warnings_for(SOUND, ConsumerProfile(prefetch=prefetch, batch_size=batch_size))

    assert expected is any(
        line.startswith(f"prefetch_count={prefetch} is below batch_size={batch_size}")
        for line in found
    )
    assert expected is bool(found)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, True),
        ({"dead_letter_exchange": "dlx"}, False),
        ({"dead_letter_queue": "dlq"}, False),
        ({"queue_arguments": {"x-dead-letter-exchange": "dlx"}}, False),
        ({"dead_letter_routing_key": "dead"}, True),
    ],
)
@pytest.mark.parametrize("rejects", [False, True])
def test_no_dead_letter_exchange(stated, expected, rejects):
    """Without one the policies of the broker decide. It is a warning if failures are discarded."""
    settings = TopologyOptions(queue_name="jobs", queue_type="classic", **stated)
    profile = replace(USUAL, rejects_undeliverable=rejects)
    found = warnings_for(settings, profile)
    hints = [each for each in hints_for(settings, profile) if "x-death" not in each]

    assert (expected and rejects, expected and not rejects) == (bool(found), bool(hints))
    for line in found + hints:
        assert line.startswith("no dead-letter destination is known: NACK discards messages")
        assert ("retried forever" not in line) is rejects


@pytest.mark.parametrize("stated", [{}, {"dead_letter_exchange": "dlx"}])
def test_a_dead_letter_exchange_in_the_arguments_is_ours_now(stated):
    """0.1.0 left the publishing to the broker, whose dead letters have other headers."""
    settings = TopologyOptions(
        queue_name="jobs",
        queue_type="classic",
        queue_arguments={DEAD_LETTER_EXCHANGE: "x"},
        **stated,
    )
    hints = hints_for(settings, USUAL)
    assert bool(stated) is not any(
        "x-dead-letter-reason replaces x-death" in each for each in hints
    )


def test_consequences_of_defaults_are_not_warnings():
    """Hints name the settings to change; with them there are none."""
    settings = TopologyOptions(queue_name="jobs")
    assert [] == warnings_for(settings, USUAL) + broker_warnings_for(settings, USUAL, None)
    no_destination, classic = hints_for(settings, USUAL)
    assert no_destination.endswith("set dead_letter_queue")
    assert classic.endswith("set queue_type='quorum'")
    better = replace(settings, dead_letter_queue="dead", queue_type="quorum")
    assert [] == hints_for(better, USUAL) + warnings_for(better, USUAL)
    assert [] == broker_warnings_for(better, USUAL, (4, 3))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, []),
        ({"queue_type": "classic"}, []),
        ({"queue_type": "quorum"}, ["a quorum queue drops messages"]),
        ({"queue_arguments": {"x-queue-type": "quorum"}}, ["a quorum queue drops messages"]),
        ({"queue_type": "quorum", "queue_arguments": {"x-dead-letter-exchange": "dlx"}}, []),
        ({"queue_type": "quorum", "dead_letter_queue": "dlq"}, []),
        ({"queue_type": "quorum", "dead_letter_exchange": "dlx"}, []),
        (
            {"queue_type": "quorum", "dead_letter_exchange": "dlx", "declare": False},
            ["a quorum queue drops messages"],
        ),
        (
            {
                "queue_type": "quorum",
                "dead_letter_exchange": "dlx",
                "broker_dead_letters": False,
                "queue_arguments": {"x-message-ttl": 9},
            },
            [],
        ),
        (
            {"queue_arguments": {"x-message-ttl": 9, "x-max-length": 5, "x-max-length-bytes": 7}},
            [f"messages because of {each} in" for each in LIMITS],
        ),
        ({"queue_arguments": {"x-max-length": 5, "x-overflow": "reject-publish"}}, []),
        ({"queue_arguments": {"x-message-ttl": 9}, "dead_letter_queue": "dlq"}, []),
    ],
)
def test_messages_that_the_broker_itself_drops(stated, expected):
    """Unless it dead-letters them. Who opts out of that knows it."""
    found = warnings_for(TopologyOptions(queue_name="jobs", **stated), USUAL)

    assert len(expected) == len([line for line in found if " drops messages " in line])
    for line in expected:
        assert any(line in each for each in found)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, []),
        ({"x-message-ttl": 9}, ["queue 'jobs' has x-message-ttl=9: the broker drops"]),
        ({"x-max-length": 5, "x-overflow": "reject-publish"}, []),
        ({"x-message-ttl": 9, "x-dead-letter-exchange": "dlx"}, []),
        ({"x-dead-letter-exchange": ""}, ["queue 'jobs' dead-letters to itself, a loop"]),
        (
            {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "jobs"},
            ["queue 'jobs' dead-letters to itself, a loop"],
        ),
        ({"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dlq"}, []),
    ],
)
def test_the_arguments_that_a_queue_has_on_the_broker(arguments, expected):
    """If the settings don't declare them."""
    found = existing_queue_warnings(TopologyOptions(queue_name="jobs"), arguments)

    assert len(expected) == len(found)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("arguments", "version", "expected"),
    [
        ({"x-queue-type": "classic"}, (4, 0), []),
        ({"x-queue-type": "quorum"}, (4, 0), ["a delivery limit of 20"]),
        ({"x-queue-type": "quorum"}, None, ["a delivery limit of 20"]),
        ({"x-queue-type": "quorum"}, (3, 10), []),
        ({"x-queue-type": "quorum", "x-delivery-limit": -1}, (4, 0), []),
        ({"x-queue-type": "quorum", "x-delivery-limit": 3}, (3, 10), ["a delivery limit of 3"]),
        (
            {"x-queue-type": "classic", "x-message-ttl": 9, "x-max-length": 5},
            (4, 0),
            ["x-max-length=5", "x-message-ttl=9"],
        ),
        (
            {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "jobs"},
            (4, 0),
            ["dead-letters to queue 'jobs': a loop"],
        ),
    ],
)
def test_a_dead_letter_queue_that_loses_dead_letters(arguments, version, expected):
    """By its limits, or to the queue that they come from."""
    settings = TopologyOptions(queue_name="jobs", dead_letter_queue="dlq")

    found = dead_letter_queue_warnings(settings, arguments, version)

    assert len(expected) == len(found)
    for line, words in zip(found, expected, strict=True):
        assert line.startswith("dead-letter queue 'dlq' ")
        assert words in line


@pytest.mark.parametrize(
    ("settings", "attempts", "expected"),
    [
        (QUORUM, 20, None),
        (QUORUM, 21, "the delivery limit 20 (RabbitMQ 4's default)"),
        (with_arguments(delivery_limit=3), 3, None),
        (with_arguments(delivery_limit=3), 4, "the delivery limit 3 (in queue_arguments)"),
        (with_arguments(delivery_limit=-1), 100, None),
        (with_arguments(delivery_limit="3"), 20, None),
        (with_arguments(delivery_limit=True), 20, None),
        (replace(SOUND, queue_type="classic"), 100, None),
        (SOUND, 100, None),
    ],
)
def test_a_delivery_limit_below_the_attempts(settings, attempts, expected):
    """The limit does not apply to REQUEUE, whose copies are new messages, but to all other
    redeliveries.
    """
    found = warnings_for(settings, replace(USUAL, max_requeue_attempts=attempts))

    if expected is None:
        assert [] == found
    else:
        [line] = found
        assert line.startswith(f"{expected} is below max_requeue_attempts={attempts}")


@pytest.mark.parametrize(
    ("given", "arguments", "held"),
    [
        ({}, {}, None),
        ({"batch_timeout": 1800}, {}, None),
        ({"batch_timeout": 1801}, {}, "1801 s"),
        ({"process_timeout": 900}, {}, None),
        ({"process_timeout": 901}, {}, "1802 s"),
        ({"process_timeout": 901, "prefetch": 10}, {}, None),
        ({"process_timeout": 901, "prefetch": 0}, {}, None),
        ({"process_timeout": 901, "concurrency": 2}, {}, None),
        ({"process_timeout": 901, "prefetch": 5}, {}, None),
        ({"process_timeout": 900, "batch_timeout": 901, "prefetch": 10}, {}, "1801 s"),
        ({"retry_seconds": 1801}, {}, None),
        ({"retry_seconds": 1801, "ordered": True}, {}, "1801 s"),
        ({"process_timeout": 10}, {"x-consumer-timeout": 20_000}, None),
        ({"process_timeout": 11}, {"x-consumer-timeout": 20_000}, "22 s"),
        ({"process_timeout": 900}, {"x-consumer-timeout": 0}, None),
    ],
)
@pytest.mark.parametrize("where", ["queue_arguments", "consumer_arguments"])
def test_messages_held_longer_than_the_broker_waits(given, arguments, held, where):
    """A message waits for its batch, or for earlier batches, and is handled."""
    settings, profiles = SOUND, replace(USUAL, **given)
    if where == "queue_arguments":
        settings = replace(settings, queue_arguments=arguments)
    else:
        profiles = replace(profiles, consumer_arguments=arguments)

    found = [line for line in warnings_for(settings, profiles) if "may be held" in line]

    if held is None:
        assert [] == found
    else:
        [line] = found
        assert line.startswith(f"a message may be held for {held} ")
        assert (where if arguments else "default") in line


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        ({}, {"retry_seconds": 1e6}, False),
        ({"message_ttl": 60_000}, {"retry_seconds": 60}, False),
        ({"message_ttl": 60_000}, {"retry_seconds": 60.1}, True),
        ({"message_ttl": 60_000}, {"retry_seconds": 61, "ordered": True}, False),
        ({"message_ttl": "60000"}, {"retry_seconds": 61}, False),
    ],
)
def test_retries_that_outlive_the_time_to_live(arguments, given, expected):
    """Each copy has a new time to live. Retries in place have no copies."""
    found = warnings_for(with_arguments(**arguments), replace(USUAL, **given))

    assert expected is any("x-message-ttl=60000 ms" in line for line in found)
    assert expected is bool(found)


@pytest.mark.parametrize(
    ("settings", "version", "expected"),
    [
        (SOUND, None, None),
        (replace(SOUND, queue_type="classic"), (4, 3, 6), "queue 'jobs' is a classic queue: "),
        (QUORUM, None, None),
        (QUORUM, (3, 10, 8), None),
        (QUORUM, (3, 13), None),
        (QUORUM, (4, 0), None),
        (QUORUM, (4, 3, 6), None),
        (with_arguments(delivery_limit=3), (3, 10), None),
        (with_arguments(delivery_limit=0), (4, 3), None),
        (with_arguments(delivery_limit=-1), (4, 3), None),
        (with_arguments(delivery_limit=-1), None, None),
        (with_arguments(delivery_limit=-1), (3, 10), "before RabbitMQ 4.0 a negative"),
    ],
)
def test_a_broker_that_redelivers_forever_or_drops_at_once(settings, version, expected):
    """Old brokers drop at the first redelivery if the limit is negative."""
    found = broker_warnings_for(settings, USUAL, version)

    if expected is None:
        assert [] == found
    else:
        [line] = found
        assert line.startswith(expected)


@pytest.mark.parametrize(
    ("settings", "ordered", "why"),
    [
        (QUORUM, False, None),
        (QUORUM, True, "since ordered_by_key keeps"),
        (with_arguments(single_active_consumer=True), False, "the single active one"),
        (with_arguments(single_active_consumer=False), False, None),
        (replace(QUORUM, queue_auto_delete=True), False, "since queue_auto_delete deletes"),
    ],
)
def test_what_prevents_that_suspects_are_handled_alone(settings, ordered, why):
    """A warning says so, and the policy is left out."""
    found = broker_warnings_for(settings, replace(USUAL, ordered=ordered), (4, 0))
    policy = crash_policy(settings, suspect_after=3, limit=8, ordered=ordered)
    if why is None:
        assert ([], CrashPolicy(3, 8)) == (found, policy)
    else:
        [line] = found
        assert why in line
        assert policy is None


def test_without_a_limit_of_the_broker_the_warning_is_about_endless_redelivery():
    """Because nothing gives the message up then."""
    settings = with_arguments(single_active_consumer=True)
    [line] = broker_warnings_for(settings, USUAL, (3, 10))
    assert "before RabbitMQ 4.0 a quorum queue has no delivery limit" in line
    settings = with_arguments(single_active_consumer=True, delivery_limit=-1)
    [line] = broker_warnings_for(settings, USUAL, None)
    assert line.startswith("x-delivery-limit=-1 lifts the delivery limit")


@pytest.mark.parametrize(
    ("limit", "policy"),
    [
        (None, CrashPolicy(3, 8)),
        (-1, CrashPolicy(3, 8)),
        (20, CrashPolicy(3, 8)),
        (8, CrashPolicy(3, 8)),
        (7, CrashPolicy(3, 7, requeues_to_the_end=True)),
        (3, CrashPolicy(2, 3, requeues_to_the_end=True)),
        (2, CrashPolicy(1, 2, requeues_to_the_end=True)),
        (1, None),
        (0, None),
    ],
)
def test_the_crash_limit_acts_before_the_queues_delivery_limit(limit, policy):
    """A queue that allows one return, or none, can't tell a suspect."""
    settings = QUORUM if limit is None else with_arguments(delivery_limit=limit)
    assert policy == crash_policy(settings, suspect_after=3, limit=8, ordered=False)
    classic = replace(settings, queue_type="classic")
    assert crash_policy(classic, suspect_after=3, limit=8, ordered=False) is None


def test_failures_that_the_settings_map_to_requeue_immediate():
    """With `unhandled_exception_action` or `exception_results`: no default any more."""
    profiles = replace(USUAL, failure_results={MessageResult.REQUEUE_IMMEDIATE})
    classic = replace(SOUND, queue_type="classic")

    [usual], [named] = (broker_warnings_for(classic, each, None) for each in (USUAL, profiles))
    [default] = broker_warnings_for(SOUND, profiles, None)

    assert default.startswith("queue 'jobs' is a classic queue (unless the virtual host")

    assert "a message that always makes its handler fail (REQUEUE_IMMEDIATE)" in named
    assert "its handler" not in usual


def test_with_retries_in_place_only_crashes_are_not_counted():
    """The library counts REQUEUE_IMMEDIATE then."""
    profiles = replace(USUAL, failure_results={MessageResult.REQUEUE_IMMEDIATE}, ordered=True)

    [line] = broker_warnings_for(SOUND, profiles, None)

    assert "a message that always crashes its consumer is redelivered forever" in line


# --- AMQP 1.0 ------------------------------------------------------------------------------

NATIVE = TopologyOptions(queue_name="jobs", queue_type="quorum", dead_letter_queue="dead")
WIRED = replace(USUAL, wire="amqp10", max_requeue_attempts=5)


@pytest.mark.parametrize(
    ("options", "profile", "version", "why"),
    [
        (NATIVE, WIRED, (3, 13), "RabbitMQ 4.0"),
        (replace(NATIVE, queue_type=None), WIRED, (4, 3), "queue_type='quorum'"),
        (replace(NATIVE, queue_type="classic"), WIRED, None, "queue_type='quorum'"),
        (NATIVE, WIRED, (4, 0, 5), "x-delivery-limit=-1"),
        (
            replace(NATIVE, queue_arguments={"x-delivery-limit": 50}),
            WIRED,
            (4, 2),
            "x-delivery-limit=-1",
        ),
        (
            NATIVE,
            replace(WIRED, consumer_arguments={"x-cancel-on-ha-failover": True}),
            (4, 3),
            "consumer_arguments",
        ),
    ],
)
def test_what_prevents_amqp_1_0(options, profile, version, why):
    """In one line, and then there is nothing to gain from the setting."""
    [line] = amqp10_warnings_for(options, profile, version)
    assert "AMQP 0-9-1 is used" in line
    assert why in line
    assert amqp10_hint(options, replace(profile, wire="auto"), version) is None
    assert [] == amqp10_warnings_for(options, replace(profile, wire="auto"), version)


@pytest.mark.parametrize(
    ("options", "version"),
    [(NATIVE, (4, 3)), (replace(NATIVE, queue_arguments={"x-delivery-limit": -1}), (4, 0))],
)
def test_where_amqp_1_0_is_possible_it_is_suggested(options, version):
    """With what it would save."""
    assert [] == amqp10_warnings_for(options, WIRED, version)
    assert "up to 6 now" in (amqp10_hint(options, replace(WIRED, wire="auto"), version) or "")
    assert amqp10_hint(options, WIRED, version) is None
    assert amqp10_hint(options, replace(WIRED, wire="auto"), None) is None
    assert amqp10_hint(options, replace(WIRED, wire="auto", ordered=True), version) is None


def test_the_broker_decides_when_a_retry_is_due_if_it_delays_it():
    """AMQP 1.0 on RabbitMQ 4.3, where that is possible."""
    assert delays_natively(NATIVE, WIRED, (4, 3))
    assert not delays_natively(NATIVE, WIRED, (4, 2))
    assert not delays_natively(NATIVE, WIRED, None)
    assert not delays_natively(NATIVE, replace(WIRED, wire="auto"), (4, 3))
    assert not delays_natively(replace(NATIVE, queue_type="classic"), WIRED, (4, 3))


@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        (None, None),
        (0.0, None),
        (-1.0, None),
        (1.5, "2 s ahead of this computer's: retries over AMQP 1.0 come back earlier"),
        (-90, "90 s behind this computer's: retries over AMQP 1.0 come back later"),
    ],
)
def test_clocks_that_differ_are_pointed_out(ahead, words):
    """From a second on."""
    assert (words or "None") in str(clock_warning(ahead))


@pytest.mark.parametrize(
    ("options", "profile", "what"),
    [
        (NATIVE, replace(WIRED, retry_count_header="attempts"), "retry_count_header"),
        (
            replace(NATIVE, queue_arguments={"x-max-length": 10}),
            WIRED,
            "dead letters are copies",
        ),
        (
            replace(
                NATIVE,
                dead_letter_exchange="dlx",
                queue_arguments={"x-dead-letter-exchange": "elsewhere"},
            ),
            WIRED,
            "dead letters are copies",
        ),
        (
            replace(NATIVE, queue_arguments={"x-message-ttl": 1000}),
            replace(WIRED, retry_seconds=5),
            "x-message-ttl",
        ),
        (
            replace(NATIVE, queue_arguments={"x-delayed-retry-type": "all"}),
            WIRED,
            "x-delayed-retry-type",
        ),
    ],
)
def test_what_makes_amqp_1_0_less_useful(options, profile, what):
    """It is used all the same."""
    [line] = amqp10_warnings_for(options, profile, (4, 3))
    assert what in line


@pytest.mark.parametrize(
    ("expected", "profile", "singly"),
    [
        ("wire", ConsumerProfile(prefetch=10, batch_size=1, wire="plain"), False),
        ("batch_size", ConsumerProfile(prefetch=20, batch_size=10, adapts_prefetch=True), False),
        (None, ConsumerProfile(prefetch=20, batch_size=100, adapts_prefetch=True), False),
        ("prefetch_count", ConsumerProfile(prefetch=10, batch_size=10), False),
        (None, ConsumerProfile(prefetch=500, batch_size=100), False),
        ("prefetch_count", ConsumerProfile(prefetch=10, batch_size=1), True),
        (None, ConsumerProfile(prefetch=10, batch_size=1, adapts_prefetch=True), True),
        (None, ConsumerProfile(prefetch=0, batch_size=100), False),
    ],
)
def test_the_setting_that_costs_most_is_named(expected, profile, singly):
    """If it costs much, and the consumer has it."""
    assert expected == costliest_setting(profile, singly=singly)
