"""The error for a broker's refusal says what was refused, why, and what to do about it."""

from __future__ import annotations

import pytest

from aio_pika_batch.core.refusals import refusal_error
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
