"""Holds what a session has received until it is taken, by an iteration or by a pump.

Sessions over both protocols inherit this. They add how deliveries come, and how they are settled.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Self

from aio_pika_batch.errors import SessionClosed, SessionLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aio_pika_batch.adapters.url import Address
    from aio_pika_batch.core.message import Message

WIND_UP_TIMEOUT: Final = 5.0
"""Seconds for everything that comes before the close of the connection."""

ANSWER_TIMEOUT: Final = 10.0
"""Seconds that a broker has to confirm a pause or its end, or to open a native channel. A queue
without a leader leaves the answer out, and heartbeats go on."""


class BufferedSession:
    """The receiving side of a :class:`~aio_pika_batch.transport.PumpingSession`."""

    def __init__(self, queue: str, address: Address) -> None:
        self._queue = queue
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._pending: list[Message] = []
        self._waiters: set[asyncio.Future[None]] = set()
        self._sink: Callable[[Sequence[Message]], None] | None = None
        self._sink_error: Exception | None = None
        self._loss: str | None = None
        self._is_drained = False
        self._is_closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Message]:
        while True:
            self._check()
            if self._pending:
                return self._take()
            if self._is_drained:
                raise StopAsyncIteration
            await self._wait()

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        """Hand chunks over as soon as they arrive: no task is woken for a read."""
        self._sink = sink
        try:
            while True:
                self._check()
                self._receive(())
                if self._sink_error is not None:
                    raise self._sink_error
                if self._is_drained:
                    return
                await self._wait()
        finally:
            self._sink = None

    def _receive(self, messages: Sequence[Message]) -> None:
        """Add messages, and give all pending ones to the sink. What it raises, `pump` raises."""
        if self._loss is not None:
            return
        self._pending.extend(messages)
        if self._sink is None:
            self._wake()
        elif self._pending and self._sink_error is None:
            try:
                self._sink(self._take())
            except Exception as error:  # noqa: BLE001  -- not the connection's fault
                self._sink_error = error
                self._wake()

    def _take(self) -> list[Message]:
        messages, self._pending = self._pending, []
        return messages

    def _lose(self, reason: str) -> None:
        if self._loss is None:
            # The broker delivers the pending messages again, to another session.
            self._loss = reason
            self._pending.clear()
            self._wake()

    def _check(self) -> None:
        """Raise SessionClosed or SessionLost if the session has ended."""
        if self._is_closed:
            raise SessionClosed(f"the session on queue {self._queue!r} is closed")
        if self._loss is not None:
            raise self._lost(self._loss)

    def _lost(self, reason: str) -> SessionLost:
        return SessionLost(
            f"the session on queue {self._queue!r} at {self._address} was lost: {reason}"
        )

    async def _wait(self) -> None:
        """Wait until something has changed."""
        waiter = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
