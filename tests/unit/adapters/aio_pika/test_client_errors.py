"""Are the broker's words found in what the client library makes of them?"""

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
def test_code_and_text(
    error: BaseException | None, expected: ChannelClosed | ConnectionClosed | None
) -> None:
    """By the exception's class where it stands for a code, else by what it carries."""
    assert expected == close_reason(error)


def test_the_cause_counts_too() -> None:
    """Where it was wrapped on its way up."""
    error = RuntimeError("something went wrong")
    error.__cause__ = exceptions.ChannelAccessRefused("ACCESS_REFUSED - no")

    assert ChannelClosed(403, "ACCESS_REFUSED - no") == close_reason(error)
