"""A TCP proxy in front of the broker, which can be slow, silent or cut.

A black hole is simulated by forwarding nothing: bytes are read and held, as on a network that loses
packets, until ``thaw`` forwards all of them, as retransmissions would.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Literal, Self
from urllib.parse import urlsplit

from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port

Direction = Literal["to_broker", "to_client"]
_BOTH: tuple[Direction, Direction] = ("to_broker", "to_client")
_DIE_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER for 0 s: closing sends RST, not FIN


class TcpProxy:
    """A proxy with its own port of 127.0.0.1, in front of ``host:port``.

    Attributes:
        port: Where it listens, also after it refused for a while.
        accepted: How many connections it has taken so far.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = free_port()
        self.accepted = 0
        self._upstream = (host, port)
        self._server: asyncio.Server | None = None
        self._lines: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._latency = 0.0
        self._trickle: tuple[int, float] | None = None
        self._open = {direction: asyncio.Event() for direction in _BOTH}
        self._left: dict[Direction, int | None] = dict.fromkeys(_BOTH)
        self.thaw()

    @property
    def connections(self) -> int:
        """The number of open connections, without those that were cut."""
        return sum(not task.cancelling() for task in self._lines)

    def url(self, amqp_url: str) -> str:
        """Return *amqp_url* with this proxy's address in place of the broker's."""
        parts = urlsplit(amqp_url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{LOCALHOST}:{self.port}").geturl()

    def cut(self) -> None:
        """Reset all connections, like a firewall that lost its state; new ones are accepted."""
        for task, writers in self._lines.items():
            _reset(writers)
            task.cancel()

    def cut_after(self, n_bytes: int, direction: Direction = "to_client") -> None:
        """Forward exactly *n_bytes* more in *direction*, then ``cut``, within a frame or not."""
        self._left[direction] = n_bytes

    async def refuse(self, on: bool = True) -> None:
        """Refuse new connections, like a machine without a broker, or accept them again."""
        if on and self._server is not None:
            self._server.close()
            self._server = None
        elif not on and self._server is None:
            self._server = await asyncio.start_server(self._accept, LOCALHOST, self.port)

    def freeze(self, *directions: Direction) -> None:
        """Forward nothing in *directions*; by default in both."""
        for direction in directions or _BOTH:
            self._open[direction].clear()

    def thaw(self) -> None:
        """Forward everything again, first the bytes that were held."""
        for gate in self._open.values():
            gate.set()

    def latency(self, seconds: float) -> None:
        """Delay everything from now on by this many seconds, in each direction and in order."""
        self._latency = seconds

    def trickle(self, n_bytes: int, seconds: float) -> None:
        """Forward *n_bytes* at a time, with a pause of *seconds* in between; 0 bytes: no limit."""
        self._trickle = (n_bytes, seconds) if n_bytes else None

    async def __aenter__(self) -> Self:
        await self.refuse(False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        self.cut()
        await asyncio.gather(*self._lines, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        writers = [writer]
        task = asyncio.ensure_future(self._serve(reader, writers))
        self._lines[task] = writers
        task.add_done_callback(self._lines.pop)

    async def _serve(
        self, client: asyncio.StreamReader, writers: list[asyncio.StreamWriter]
    ) -> None:
        """Forward one connection until both sides have closed it, or one has reset it."""
        try:
            broker, writer = await asyncio.open_connection(*self._upstream)
            writers.append(writer)
            for each in writers:
                each.transport.set_write_buffer_limits(high=0)  # drain() waits for the last byte
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(client, writers[1], "to_broker"))
                both.create_task(self._pump(broker, writers[0], "to_client"))
            for each in writers:
                each.close()
        except* OSError:  # one side is gone, so the other must go too
            _reset(writers)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        """Forward one direction: read bytes as they come, and write them when they are due."""
        time = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)

        async def take() -> None:
            chunk = b"-"
            while chunk:
                chunk = await reader.read(1 << 16)
                await under_way.put((time() + self._latency, chunk))

        async with asyncio.TaskGroup() as group:
            group.create_task(take())
            while True:
                due, chunk = await under_way.get()
                await asyncio.sleep(due - time())
                await self._open[direction].wait()
                if not chunk:
                    break
                await self._hand_on(chunk, writer, direction)
        writer.write_eof()

    async def _hand_on(
        self, chunk: bytes, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        left = self._left[direction]
        if left is not None:
            chunk = chunk[:left]
            self._left[direction] = left - len(chunk)
        while self._trickle is not None and chunk:
            size, seconds = self._trickle
            writer.write(chunk[:size])
            chunk = chunk[size:]
            await asyncio.sleep(seconds)
        writer.write(chunk)
        await writer.drain()
        if self._left[direction] == 0:
            self._left[direction] = None
            self.cut()


def _reset(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        with suppress(OSError):  # closed already
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, _DIE_AT_ONCE
            )
        writer.transport.abort()
