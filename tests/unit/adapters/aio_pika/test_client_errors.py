"""The broker's reason is found, and errors say what is wrong, where, and what to do."""

from __future__ import annotations

import pytest
from aiormq import exceptions

from aio_pika_batch.adapters.aio_pika.client_errors import (
    close_reason,
    connection_error,
    describe_channel_close,
)
from aio_pika_batch.adapters.aio_pika.events import ChannelClosed, ConnectionClosed
from aio_pika_batch.adapters.url import Address
from aio_pika_batch.errors import AccessRefused, BrokerUnavailable, TransportError

HOST = Address("h", 5672, "me", "secret", "v")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.ChannelNotFoundEntity("NOT_FOUND - x"), ChannelClosed(404, "NOT_FOUND - x")),
        (exceptions.ChannelClosed(541, "INTERNAL_ERROR"), ChannelClosed(541, "INTERNAL_ERROR")),
        (exceptions.ChannelClosed(None, None), None),
        (exceptions.ProbableAuthenticationError("no"), ConnectionClosed(403, "no")),
        (exceptions.ConnectionNotAllowed("NOT_ALLOWED"), ConnectionClosed(530, "NOT_ALLOWED")),
        (exceptions.ConnectionClosed(320, "FORCED"), ConnectionClosed(320, "FORCED")),
        (exceptions.ConnectionClosed(0, "normal closed"), None),
        (OSError("no line"), None),
        (None, None),
    ],
)
def test_code_and_text_are_found(
    error: BaseException | None, expected: ChannelClosed | ConnectionClosed | None
) -> None:
    """By the exception's class if it stands for a code, else by its arguments."""
    assert expected == close_reason(error)


def test_the_cause_of_an_exception_is_searched_too() -> None:
    """It may have been wrapped."""
    error = RuntimeError("something went wrong")
    error.__cause__ = exceptions.ChannelAccessRefused("ACCESS_REFUSED - no")

    assert ChannelClosed(403, "ACCESS_REFUSED - no") == close_reason(error)


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
def test_a_refused_connection_has_the_brokers_words_and_advice(
    code: int, text: str, kind: type[TransportError], advice: str
) -> None:
    """The password isn't shown."""
    error = connection_error(ConnectionClosed(code, text), HOST)

    assert type(error) is kind
    assert all(piece in str(error) for piece in ("amqp://h:5672/v", "'me'", text, advice))
    assert "secret" not in str(error)


def test_guest_gets_a_hint_about_other_machines() -> None:
    """By default, a broker accepts guest only from its own machine."""
    assert "own machine" in str(connection_error(ConnectionClosed(403, "refused"), Address("h", 1)))


def test_a_consumer_timeout_is_named() -> None:
    """Only if the channel was closed for that."""
    slow = "PRECONDITION_FAILED - delivery acknowledgement timed out. This timeout value can be set"

    assert "consumer_timeout" in describe_channel_close(ChannelClosed(406, slow))
    assert "consumer_timeout" not in describe_channel_close(
        ChannelClosed(406, "PRECONDITION_FAILED - unknown tag")
    )
