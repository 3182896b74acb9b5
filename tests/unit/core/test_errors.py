"""Whose fault is it? The type of an error says so, and every one can be caught as one family."""

from __future__ import annotations

import inspect

import pytest

from aio_pika_batch import errors
from tests.unit.core.strategies import a_message

FAMILY = [each for _, each in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("error", FAMILY)
def test_one_except_clause_catches_all_that_is_raised_on_purpose(error):
    """And what is not on purpose goes past it."""
    assert issubclass(error, errors.AioPikaBatchError)
    assert error.__doc__


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.MessageDecodeError, ValueError),
        (errors.ResultError, ValueError),
        (errors.HandlerTimeout, TimeoutError),
    ],
)
def test_code_that_knows_only_python_s_own_errors_understands(error, builtin):
    """A nonsense value is a ValueError, whoever's class it is."""
    assert issubclass(error, builtin)


@pytest.mark.parametrize(
    "error",
    [
        errors.BrokerUnavailable,
        errors.AccessRefused,
        errors.TopologyError,
        errors.SessionLost,
        errors.SessionClosed,
        errors.SettlementError,
        errors.PublishError,
    ],
)
def test_what_happens_on_the_way_to_a_broker_is_a_transport_error(error):
    """None of them is another: to catch one is to mean it."""
    assert errors.TransportError is error.__base__


def test_a_decode_error_names_message_field_and_reason():
    """And carries the first two, so that the one message can be singled out."""
    message = a_message(4, body=b"secret")

    error = errors.MessageDecodeError(message, "body", "no JSON")

    assert f"body of {message!r} cannot be decoded: no JSON" == str(error)
    assert (message, "body") == (error.message, error.field)
    assert "secret" not in str(error)
