"""What does the library do when the line to the broker is slow, silent or cut?

A proxy between the two can be each of these at will. A black hole is made by forwarding nothing:
what a side sends is taken from it and goes nowhere, as on a line whose packets are lost, until
``thaw`` lets all of it through, as the retransmissions would.
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
    """A proxy on a port of 127.0.0.1 of its own, in front of ``host:port``.

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
        """How many connections are open now; those that were cut are not."""
        return sum(not task.cancelling() for task in self._lines)

    def url(self, amqp_url: str) -> str:
        """Return *amqp_url* with this proxy's address in place of the broker's."""
        parts = urlsplit(amqp_url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{LOCALHOST}:{self.port}").geturl()

    def cut(self) -> None:
        """Reset all connections, as a firewall does that has forgotten them. New ones may come."""
        for task, writers in self._lines.items():
            _reset(writers)
            task.cancel()

    def cut_after(self, n_bytes: int, direction: Direction = "to_client") -> None:
        """Let exactly *n_bytes* more through in *direction*, then ``cut``, in mid-frame or not."""
        self._left[direction] = n_bytes

    async def refuse(self, on: bool = True) -> None:
        """Refuse new connections as a machine without a broker does, or accept them again."""
        if on and self._server is not None:
            self._server.close()
            self._server = None
        elif not on and self._server is None:
            self._server = await asyncio.start_server(self._accept, LOCALHOST, self.port)

    def freeze(self, *directions: Direction) -> None:
        """Let nothing through in *directions*, or in both, if none is given."""
        for direction in directions or _BOTH:
            self._open[direction].clear()

    def thaw(self) -> None:
        """Let everything through again, first of all what was held."""
        for gate in self._open.values():
            gate.set()

    def latency(self, seconds: float) -> None:
        """Hold whatever comes from now on for so long, in each direction, in order."""
        self._latency = seconds

    def trickle(self, n_bytes: int, seconds: float) -> None:
        """Let through *n_bytes* at a time, with so many seconds between; 0 bytes: all there is."""
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
        """Carry one connection until both sides have ended it, or either was reset."""
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
        """Carry one direction: bytes are taken as they come, and handed on when they are due."""
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
