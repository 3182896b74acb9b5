"""What a connection does if the installed aiormq cannot be used."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from aio_pika_batch.adapters.aio_pika.connection import (
    LoopMonitor,
    TappedConnection,
    open_connection,
)
from aio_pika_batch.errors import AioPikaBatchError, BrokerUnavailable, ConfigurationError
from aio_pika_batch.transport import Endpoint, Wire

if TYPE_CHECKING:
    from aio_pika_batch.testing.virtual_time import VirtualTimeLoop

URL = "amqp://u:s3cret@localhost"


async def failure(monkeypatch: pytest.MonkeyPatch, connect: Any, wire: Wire) -> Exception:
    """The error of a connection whose library connects in this way."""
    monkeypatch.setattr(TappedConnection, "connect", connect)
    endpoint = Endpoint(url=URL, wire=wire)
    with pytest.raises(AioPikaBatchError) as caught:
        await open_connection(endpoint)
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


@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_failed_attempt_leaves_no_line_of_the_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_ours: bool
) -> None:
    """The worker reports it. Other connections of the program keep aiormq's lines."""

    async def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", refuse)
    if is_ours:
        with pytest.raises(BrokerUnavailable):
            await open_connection(Endpoint(url=URL))
        assert [] == [each.getMessage() for each in caplog.records]
    # After one of ours, too: the mark doesn't leave its task.
    with pytest.raises(ConnectionError):
        await aio_pika.connect(URL)
    assert 1 == sum("creating transport" in each.getMessage() for each in caplog.records)


@pytest.mark.parametrize(("blocked", "logged"), [(1.0, []), (9.0, ["8.5"])])
async def test_a_blocked_event_loop_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    virtual_loop: VirtualTimeLoop,
    blocked: float,
    logged: list[str],
) -> None:
    """Once for each block, if it is longer than the heartbeat interval."""
    time = virtual_loop.time
    monitor = LoopMonitor(heartbeat=2)
    await asyncio.sleep(1.5)
    monkeypatch.setattr(virtual_loop, "time", lambda: time() + blocked)
    await asyncio.sleep(5)
    monitor.stop()
    await asyncio.sleep(10)
    assert logged == [each.seconds for each in caplog.records]  # type: ignore[attr-defined]
    assert all("the event loop was blocked" in each.getMessage() for each in caplog.records)
