"""Does the server for probes hold its limits, on real sockets?"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from aio_pika_batch import ConfigurationError, HealthServer
from aio_pika_batch.health import http_server


async def close(writer: asyncio.StreamWriter) -> None:
    """Close our end, whatever the other has done."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def ask(port: int, request: bytes) -> bytes:
    """Send something, and read until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 30)
    finally:
        await close(writer)


async def test_a_request_is_answered_and_the_connection_closed() -> None:
    """Without consumers nobody is stuck."""
    async with HealthServer(port=0) as server:
        assert (await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\nok\n")


async def test_who_says_nothing_is_not_waited_for(monkeypatch) -> None:
    """Nor is half a request; and nobody else has to wait meanwhile."""
    monkeypatch.setattr(http_server, "TIMEOUT", 0.3)
    async with HealthServer(port=0) as server:
        silent = asyncio.ensure_future(ask(server.port, b"GET /livez HTT"))
        assert b"ok" in await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")
        assert b"" == await silent


async def test_a_request_has_its_bounds() -> None:
    """Of what is too long, nothing is kept."""
    async with HealthServer(port=0) as server:
        long = b"GET /livez HTTP/1.1\r\nX: " + b"x" * http_server.MAX_REQUEST + b"\r\n\r\n"
        assert b" 431 " in (await ask(server.port, long))[:15]


async def test_so_do_connections(monkeypatch) -> None:
    """One too many is told so."""
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 1)
    async with HealthServer(port=0) as server:
        _, first = await asyncio.open_connection("127.0.0.1", server.port)
        second = await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")
        assert b" 503 " in second[:15]
        await close(first)


async def test_it_closes_whatever_is_open() -> None:
    """A slow client does not hold up the end."""
    async with HealthServer(port=0) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert b"ok" in await ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n")
    with suppress(ConnectionResetError):
        assert b"" == await asyncio.wait_for(reader.read(), 30)
    await close(writer)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_has_its_bounds_too(port) -> None:
    """Said at once."""
    with pytest.raises(ConfigurationError, match=str(port)):
        HealthServer(port=port)
