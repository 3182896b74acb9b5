"""What a connection does if the installed aiormq cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from aio_pika_batch.adapters.aio_pika.connection import TappedConnection, open_connection
from aio_pika_batch.adapters.aio_pika.url import parse_url
from aio_pika_batch.errors import AioPikaBatchError, BrokerUnavailable, ConfigurationError
from aio_pika_batch.transport import Endpoint, Wire

URL = "amqp://u:s3cret@localhost"


async def failure(monkeypatch: pytest.MonkeyPatch, connect: Any, wire: Wire) -> Exception:
    """The error of a connection whose library connects in this way."""
    monkeypatch.setattr(TappedConnection, "connect", connect)
    endpoint = Endpoint(url=URL, wire=wire)
    with pytest.raises(AioPikaBatchError) as caught:
        await open_connection(endpoint, parse_url(URL))
    return caught.value


@pytest.mark.parametrize("wire", ["auto", "fast", "plain"])
async def test_an_aiormq_that_ignores_the_transport_factory_is_refused(
    monkeypatch: pytest.MonkeyPatch, wire: Wire
) -> None:
    """It has opened a socket of its own. The error says which version to install."""

    async def connect(_: Any) -> None:
        """Connect without the tap."""

    error = await failure(monkeypatch, connect, wire)

    assert isinstance(error, ConfigurationError)
    assert "transport_factory" in str(error)
    assert "install aiormq 7.2.4 or newer" in str(error)


async def test_an_aiormq_that_does_not_know_the_transport_factory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cause is kept."""
    unknown = TypeError("unexpected keyword argument 'transport_factory'")

    async def connect(_: Any) -> None:
        raise unknown

    error = await failure(monkeypatch, connect, "auto")

    assert isinstance(error, ConfigurationError)
    assert "install aiormq 7.2.4 or newer" in str(error)
    assert unknown is error.__cause__


async def test_any_other_failure_before_the_socket_is_open_is_not_aiormqs_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broker that does not answer is worth another attempt."""

    async def connect(_: Any) -> None:
        raise ConnectionRefusedError

    error = await failure(monkeypatch, connect, "auto")

    assert isinstance(error, BrokerUnavailable)
    assert "nothing listens there" in str(error)
