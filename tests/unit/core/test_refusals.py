"""The error for a broker's refusal says what was refused, why, and what to do about it."""

from __future__ import annotations

import pytest

from aio_pika_batch.core.refusals import (
    UnequalArgument,
    publish_refusal_error,
    refusal_error,
    unequal_argument,
)
from aio_pika_batch.errors import BrokerUnavailable, TopologyError


@pytest.mark.parametrize(
    ("code", "text", "advice"),
    [
        (403, "ACCESS_REFUSED - configure access to queue 'q' in vhost '/' refused", "permission"),
        (403, "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use", "its only consumer"),
        (403, "ACCESS_REFUSED - queue name 'amq.q' contains reserved prefix 'amq.*'", "amq. are"),
        (
            403,
            "ACCESS_REFUSED - operation not permitted on the default exchange",
            "name another exchange",
        ),
        (404, "NOT_FOUND - no queue 'q' in vhost '/'", "create it"),
        (405, "RESOURCE_LOCKED - cannot obtain exclusive access", "another connection"),
        (406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q'", "the settings"),
        (406, "PRECONDITION_FAILED - unknown exchange type 'x-a'", "plugin"),
        (406, "PRECONDITION_FAILED - invalid arg 'x-expires' for queue 'q'", "this argument"),
        (406, "PRECONDITION_FAILED - invalid property 'non-durable' for queue 'q'", "durable"),
        (
            406,
            (
                "PRECONDITION_FAILED - invalid arg 'x-priority' for queue 'q' in vhost '/' of queue"
                " type rabbit_stream_queue"
            ),
            "it is a stream",
        ),
        (406, "PRECONDITION_FAILED - anything else", "the settings"),
        (503, "COMMAND_INVALID - unknown exchange type 'x-a'", "plugin"),
        (530, "NOT_ALLOWED - anything", "does not allow"),
        (540, "NOT_IMPLEMENTED - anything", "this version"),
        (541, "INTERNAL_ERROR - a deprecated feature", "does not support"),
    ],
)
def test_what_cannot_be_had_comes_with_advice(code: int, text: str, advice: str):
    """After what was refused, and the broker's own words."""
    error = refusal_error(code, text, "queue 'q' at amqp://h")
    assert type(error) is TopologyError
    assert str(error).startswith(f"queue 'q' at amqp://h: {code} {text}; ")
    assert advice in str(error).removeprefix(f"queue 'q' at amqp://h: {code} {text}; ")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (404, "NOT_FOUND - home node 'a' of durable queue 'q' is down or inaccessible"),
        (406, "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost '/' (1)"),
        (541, "INTERNAL_ERROR - timed out"),
        (320, "CONNECTION_FORCED - broker forced connection closure"),
        (999, "anything"),
    ],
)
def test_what_may_pass_is_to_be_tried_again(code: int, text: str):
    """As if the broker could not be reached."""
    error = refusal_error(code, text, "queue 'q'")
    assert type(error) is BrokerUnavailable
    assert str(error) == f"queue 'q': {code} {text}; try again later"


@pytest.mark.parametrize(
    "text",
    [
        "NOT_FOUND - no queue 'rate-limit' in vhost '/'",
        "PRECONDITION_FAILED - invalid arg 'x-delivery-limit' for queue 'q' in vhost '/'",
        "PRECONDITION_FAILED - inequivalent arg 'x-consumer-timeout' for queue 'timeout'",
    ],
)
def test_names_are_not_searched_for_words(text: str):
    """A queue or an argument may be called after a limit or a timeout."""
    assert type(refusal_error(404, text, "queue 'q'")) is TopologyError


@pytest.mark.parametrize(
    ("text", "is_used"),
    [
        ("PRECONDITION_FAILED - inequivalent arg 'x-message-ttl'", True),
        ("PRECONDITION_FAILED - invalid arg 'x-message-ttl'", False),
        ("NOT_FOUND - no queue 'q' in vhost '/'", False),
    ],
)
def test_advice_of_a_queues_own_is_for_other_arguments_only(text: str, is_used: bool):
    """Its other mistakes are those of any queue."""
    error = refusal_error(406, text, "queue 'q'", if_unequal="let it run empty first")
    assert str(error).endswith("; let it run empty first") is is_used


def unequal(name, current, received="none"):
    """The text of a refusal."""
    return (
        f"PRECONDITION_FAILED - inequivalent arg '{name}' for queue 'q' in vhost '/': received"
        f" {received} but current is {current}"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (unequal("type", "'direct'", "'fanout'"), UnequalArgument("type", "direct")),
        (
            "406 "
            + unequal("x-message-ttl", "the value '1000' of type 'signedint'")
            + "; change it",
            UnequalArgument("x-message-ttl", 1000),
        ),
        (unequal("x-delivery-limit", "'-1'"), UnequalArgument("x-delivery-limit", -1)),
        (
            unequal("x-single-active-consumer", "the value 'true' of type 'bool'"),
            UnequalArgument("x-single-active-consumer", True),
        ),
        (
            unequal("x-dead-letter-exchange", "the value '' of type 'longstr'"),
            UnequalArgument("x-dead-letter-exchange", ""),
        ),
        (
            unequal("x-queue-type", "none", "the value 'quorum' of type 'longstr'"),
            UnequalArgument("x-queue-type", None),
        ),
        (unequal("x-queue-type", "other words"), None),
        ("PRECONDITION_FAILED - invalid arg 'x-expires' for queue 'q' in vhost '/'", None),
        ("NOT_FOUND - no queue 'q'", None),
        ("", None),
        (None, None),
    ],
)
def test_how_what_exists_differs(text, expected):
    """As RabbitMQ says it, from 3.10 to 4.3."""
    assert expected == unequal_argument(text)


@pytest.mark.parametrize(("exchange", "name"), [("", "amq.default"), ("dlx", "dlx")])
def test_a_missing_permission_to_publish_is_named(exchange, name):
    """With the command that grants it."""
    text = f"ACCESS_REFUSED - write access to exchange '{name}' in vhost '/' refused for user 'u'"
    error = publish_refusal_error(403, text, exchange, "amqp://h")
    assert type(error) is TopologyError
    assert str(error) == (
        f"publishing to exchange '{name}' at amqp://h: 403 {text}; this needs the write permission:"
        f" let the write pattern of `rabbitmqctl set_permissions` match '{name}', or connect as"
        " another user"
    )


@pytest.mark.parametrize(
    ("code", "text", "advice"),
    [
        (404, "NOT_FOUND - no exchange 'dlx' in vhost '/'", "create it"),
        (403, "ACCESS_REFUSED - cannot publish to internal exchange 'dlx'", "is not internal"),
    ],
)
def test_other_refusals_of_a_publish(code, text, advice):
    """A missing exchange, and one that only other exchanges may publish to."""
    error = publish_refusal_error(code, text, "dlx", "amqp://h")
    assert type(error) is TopologyError
    assert advice in str(error)
