"""Tests of the health server on real sockets: its limits in time, bytes and connections."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from aio_pika_batch import ConfigurationError, HealthServer
from aio_pika_batch.health import http_server


async def close(writer: asyncio.StreamWriter) -> None:
    """Close the client's end."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def ask(port: int, request: bytes) -> bytes:
    """Send a request and read until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 30)
    finally:
        await close(writer)


async def test_a_request_is_answered_and_the_connection_closed() -> None:
    """Without consumers the server is live."""
    async with HealthServer(port=0) as server:
        assert (await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\nok\n")


async def test_an_incomplete_request_times_out(monkeypatch) -> None:
    """Other requests are answered meanwhile."""
    monkeypatch.setattr(http_server, "TIMEOUT", 0.3)
    async with HealthServer(port=0) as server:
        silent = asyncio.ensure_future(ask(server.port, b"GET /livez HTT"))
        assert b"ok" in await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")
        assert b"" == await silent


async def test_a_request_that_is_too_long_is_refused() -> None:
    """With status 431."""
    async with HealthServer(port=0) as server:
        long = b"GET /livez HTTP/1.1\r\nX: " + b"x" * http_server.MAX_REQUEST + b"\r\n\r\n"
        assert b" 431 " in (await ask(server.port, long))[:15]


async def test_idle_clients_make_room_for_others(monkeypatch) -> None:
    """The one that has sent nothing for the longest time is closed."""
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 2)
    async with HealthServer(port=0) as server:
        first, one = await asyncio.open_connection("127.0.0.1", server.port)
        one.write(b"GET /livez HTT")
        second, other = await asyncio.open_connection("127.0.0.1", server.port)
        assert b"ok" in await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")
        with suppress(ConnectionResetError):
            assert b"" == await asyncio.wait_for(first.read(), 30)
        other.write(b"GET /livez HTTP/1.1\r\n\r\n")
        assert b"ok" in await asyncio.wait_for(second.read(), 30)
        await close(one)
        await close(other)


async def test_clients_that_read_no_response_make_room_for_others(monkeypatch) -> None:
    """They have theirs already."""
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 2)
    async with HealthServer(port=0) as server:
        slow = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        for _, writer in slow:
            writer.write(b"GET /livez HTTP/1.1\r\n\r\n")
        for _ in range(5):
            assert b"ok" in await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")
        for _, writer in slow:
            await close(writer)


async def test_an_error_in_an_answer_is_a_500(caplog) -> None:
    """And the other endpoints still answer."""

    class Broken:
        def status(self):
            raise RuntimeError("no status")

    async with HealthServer(Broken(), port=0) as server:
        assert b" 500 " in (await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n"))[:15]
        assert b" 200 " in (await ask(server.port, b"GET /metrics HTTP/1.1\r\n\r\n"))[:15]
    assert "a health endpoint failed" in caplog.text


async def test_the_server_closes_open_connections_at_its_end() -> None:
    """It doesn't wait for a slow client."""
    async with HealthServer(port=0) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert b"ok" in await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")
    with suppress(ConnectionResetError):
        assert b"" == await asyncio.wait_for(reader.read(), 30)
    await close(writer)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port) -> None:
    """At construction."""
    with pytest.raises(ConfigurationError, match=str(port)):
        HealthServer(port=port)
