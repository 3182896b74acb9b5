"""The broker's reason is found in the exceptions of aiormq."""

from __future__ import annotations

import pytest
from aiormq import exceptions

from aio_pika_batch.adapters.aio_pika.client_errors import close_reason
from aio_pika_batch.adapters.aio_pika.events import ChannelClosed, ConnectionClosed


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
