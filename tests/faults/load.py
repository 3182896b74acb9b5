"""A steady publisher, which knows which messages the broker has confirmed.

It uses aio-pika, not this library, and continues whatever happens to the broker. A message that was
not confirmed may be stored or not. It is never published again, since that could cause duplicates
that are not the consumer's, and it does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from typing import Any, Self

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractExchange
from pamqp.commands import Basic

_CONNECT = 3.0
_CONFIRM = 5.0
_PAUSE = 0.1
"""Timeouts for connecting and for a confirm, and the pause between two connections."""


class Load:
    """Publishes messages steadily, each with a unique number as its ``message_id``.

    Args:
        urls: The URLs, used in turn whenever the connection is lost.
        queue: The queue, through the default exchange.
        rate: Messages per second.
        minimum: The minimum number of confirmed messages.

    Attributes:
        confirmed: The numbers of the confirmed messages.
        is_pausing: Set after ``pause``, while nothing is in flight.
    """

    def __init__(self, urls: Sequence[str], queue: str, *, rate: int, minimum: int) -> None:
        self.confirmed: set[int] = set()
        self._urls = cycle(urls)
        self._queue = queue
        self._chunk = max(1, int(rate * _PAUSE / 2))
        self._minimum = minimum
        self._next = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.is_pausing = asyncio.Event()
        self._may_end = False
        self._task: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def pause(self) -> None:
        """Stop publishing for a while; publications in flight may still be confirmed."""
        self._flowing.clear()

    def resume(self) -> None:
        """Continue after ``pause``."""
        self._flowing.set()

    async def finish(self) -> None:
        """Wait until enough messages are confirmed, and stop publishing."""
        self._may_end = True
        self.resume()
        if self._task is not None:
            await self._task
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CONNECT)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    @property
    def _is_over(self) -> bool:
        return self._may_end and len(self.confirmed) >= self._minimum

    async def _run(self) -> None:
        while not self._is_over:
            connection: AbstractConnection | None = None
            try:
                connection = await aio_pika.connect(next(self._urls), timeout=_CONNECT)
                channel = await connection.channel()
                while not self._is_over:
                    await self._flow()
                    await self._publish_some(channel.default_exchange)
                    await asyncio.sleep(_PAUSE / 2)
            except asyncio.CancelledError:
                # A client library also cancels what waited for a connection that is lost.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
            except Exception:  # noqa: BLE001  # whatever it is, that connection is over
                await asyncio.sleep(_PAUSE)
            finally:
                if connection is not None:
                    self._close(connection)

    async def _flow(self) -> None:
        if not self._flowing.is_set():
            self.is_pausing.set()
            await self._flowing.wait()
            self.is_pausing.clear()

    def _close(self, connection: AbstractConnection) -> None:
        """Close it without waiting: a peer that has stopped would be waited for."""
        task = asyncio.create_task(_close(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _publish_some(self, exchange: AbstractExchange) -> None:
        numbers = range(self._next, self._next + self._chunk)
        self._next += self._chunk
        outcomes = await asyncio.gather(
            *(self._publish(number, exchange) for number in numbers), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _publish(self, number: int, exchange: AbstractExchange) -> None:
        message = aio_pika.Message(
            b"%d" % number,
            message_id=str(number),
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        said: Any = await exchange.publish(message, self._queue, timeout=_CONFIRM)
        # What is returned, since there is no queue at the moment, is not the broker's either.
        if isinstance(said, Basic.Ack):
            self.confirmed.add(number)


async def _close(connection: AbstractConnection) -> None:
    with suppress(Exception):  # it is gone, and that is all that is wanted
        await connection.close()
