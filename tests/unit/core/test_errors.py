"""The classes of errors and their relations."""

from __future__ import annotations

import inspect

import pytest

from aio_pika_batch import errors
from tests.unit.core.strategies import a_message

FAMILY = [each for _, each in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("error", FAMILY)
def test_one_base_class_catches_all_errors_of_the_library(error):
    """And no others."""
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
def test_errors_are_also_built_in_errors(error, builtin):
    """An invalid value is a ValueError."""
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
def test_errors_from_the_broker_are_transport_errors(error):
    """None of them is a subclass of another."""
    assert errors.TransportError is error.__base__


def test_a_decode_error_has_its_message_field_and_reason():
    """So that the one message can be found."""
    message = a_message(4, body=b"secret")

    error = errors.MessageDecodeError(message, "body", "no JSON")

    assert f"body of {message!r} cannot be decoded: no JSON" == str(error)
    assert (message, "body") == (error.message, error.field)
    assert "secret" not in str(error)
