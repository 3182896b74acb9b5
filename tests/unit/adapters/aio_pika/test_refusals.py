"""Does an error say what is wrong, where, and what to do?"""

from __future__ import annotations

import pytest

from aio_pika_batch.adapters.aio_pika.broker_errors import (
    refused_connection,
    refused_entity,
    why_channel_closed,
)
from aio_pika_batch.adapters.aio_pika.urls import Address
from aio_pika_batch.errors import AccessRefused, BrokerUnavailable, TopologyError, TransportError

HOST = Address("h", 5672, "me", "secret", "v")


@pytest.mark.parametrize(
    ("code", "text", "kind", "advice"),
    [
        (403, "ACCESS_REFUSED - Login was refused", AccessRefused, "check user and password"),
        (530, "NOT_ALLOWED - vhost v not found", AccessRefused, "virtual host 'v' in the URL"),
        (
            530,
            "NOT_ALLOWED - access to vhost 'v' refused for user 'me'",
            AccessRefused,
            "permissions",
        ),
        (530, "NOT_ALLOWED - connection limit (1) is reached", BrokerUnavailable, "again later"),
        (541, "INTERNAL_ERROR - vhost 'v' is down", BrokerUnavailable, "again later"),
        (320, "CONNECTION_FORCED - shutdown", BrokerUnavailable, "again later"),
    ],
)
def test_connections(code: int, text: str, kind: type[TransportError], advice: str) -> None:
    """The broker's own words, and never the password."""
    error = refused_connection(code, text, HOST)

    assert type(error) is kind
    assert all(piece in str(error) for piece in ("amqp://h:5672/v", "'me'", text, advice))
    assert "secret" not in str(error)


def test_guest_is_at_home_only() -> None:
    """What nearly everybody meets once."""
    assert "own machine" in str(refused_connection(403, "refused", Address("h", 1)))


@pytest.mark.parametrize(
    ("code", "text", "kind", "advice"),
    [
        (403, "ACCESS_REFUSED - configure access", TopologyError, "permission"),
        (403, "ACCESS_REFUSED - queue in exclusive use", TopologyError, "only consumer"),
        (404, "NOT_FOUND - no queue 'q'", TopologyError, "create it"),
        (
            404,
            "NOT_FOUND - home node of durable queue is down or inaccessible",
            BrokerUnavailable,
            "later",
        ),
        (405, "RESOURCE_LOCKED", TopologyError, "another connection"),
        (406, "PRECONDITION_FAILED - inequivalent arg", TopologyError, "settings"),
        (
            406,
            "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit'",
            TopologyError,
            "settings",
        ),
        (503, "COMMAND_INVALID - unknown exchange type", TopologyError, "plugin"),
        (406, "PRECONDITION_FAILED - unknown exchange type 'x-a'", TopologyError, "plugin"),
        (530, "NOT_ALLOWED", TopologyError, "not allow"),
        (540, "NOT_IMPLEMENTED", TopologyError, "version"),
        (541, "INTERNAL_ERROR - deprecated", TopologyError, "support"),
        (320, "CONNECTION_FORCED", BrokerUnavailable, "later"),
    ],
)
def test_entities(code: int, text: str, kind: type[TransportError], advice: str) -> None:
    """What it was about, and the fix."""
    error = refused_entity(code, text, "queue 'q'", HOST)

    assert type(error) is kind
    assert all(piece in str(error) for piece in ("queue 'q'", "amqp://h:5672/v", text, advice))


def test_channels() -> None:
    """Which of the broker's patience was tried."""
    slow = "PRECONDITION_FAILED - delivery acknowledgement timed out. This timeout value can be set"

    assert "consumer_timeout" in why_channel_closed(406, slow)
    assert "consumer_timeout" not in why_channel_closed(406, "PRECONDITION_FAILED - unknown tag")
