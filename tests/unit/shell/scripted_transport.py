"""A transport that does what a test scripts, where no broker would: a cancel that never returns, a
settle that raises, any sequence of outcomes, or a session that ends by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aio_pika_batch.core.message import Message, Properties
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.settlement import Settlement
from tests.unit.core.strategies import StubSource


async def at_once(*_: object) -> None:
    """Return at once."""


async def never(*_: object) -> None:
    """Wait forever."""
    await asyncio.get_running_loop().create_future()


def raising(error: BaseException) -> Callable[..., Awaitable[None]]:
    """Return a step that raises an error."""

    async def fail(*_: object) -> None:
        raise error

    return fail


class ScriptedSession:
    """Delivers what a test feeds to it.

    Attributes:
        unproven: How many settlements it claims to be unproven.
    """

    def __init__(self, script: ScriptedTransport) -> None:
        self._script = script
        self._inbox: asyncio.Queue[Sequence[Message] | BaseException | None] = asyncio.Queue()
        self._tag = 0
        self.settlements: list[Settlement] = []
        self.unproven = 0

    def feed(self, *bodies: bytes, **properties: Any) -> None:
        """Deliver a chunk."""
        messages = []
        for body in bodies:
            self._tag += 1
            has = Properties(**properties)
            message = Message(StubSource(), self._tag, False, body, ("", "jobs"), has)
            messages.append(message)
        self._inbox.put_nowait(messages)

    def end(self, error: BaseException | None = None) -> None:
        """End the session, as the broker would."""
        self._inbox.put_nowait(error)

    async def __aiter__(self):
        while (item := await self._inbox.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    async def cancel(self) -> None:
        self._script.note("cancel")
        await self._script.on_cancel()
        self.end()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        told = [(each.disposition.value, each.tags) for each in settlements]
        self._script.note("settle", told)
        await self._script.on_settle(settlements)
        self.settlements.extend(settlements)

    async def settled(self) -> None:
        await self._script.on_settled()


class ScriptedPublisher:
    """Confirms everything, unless the script says otherwise."""

    def __init__(self, script: ScriptedTransport) -> None:
        self._script = script
        self.is_open = True

    async def publish(self, publications: Sequence[Any]) -> Sequence[Outcome]:
        self._script.note("publish", [each.body for each in publications])
        await self._script.on_publish(publications)
        if self._script.outcomes:
            return [self._script.outcomes.pop(0) for _ in publications]
        return [Outcome.CONFIRMED for _ in publications]


class ScriptedTransport:
    """A transport whose every step is an attribute, to be replaced by another step.

    Attributes:
        calls: What was asked of it, in order, as (time, what, details).
        outcomes: Of the next publications; when they are spent, everything is confirmed.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[float, str, object]] = []
        self.sessions: list[ScriptedSession] = []
        self.outcomes: list[Outcome] = []
        self.on_declare: Callable[..., Awaitable[None]] = at_once
        self.on_open: Callable[..., Awaitable[None]] = at_once
        self.on_leave: Callable[..., Awaitable[None]] = at_once
        self.on_cancel: Callable[..., Awaitable[None]] = at_once
        self.on_settle: Callable[..., Awaitable[None]] = at_once
        self.on_settled: Callable[..., Awaitable[None]] = at_once
        self.on_publisher: Callable[..., Awaitable[None]] = at_once
        self.on_publish: Callable[..., Awaitable[None]] = at_once
        self.on_publisher_leave: Callable[..., Awaitable[None]] = at_once

    def note(self, what: str, details: object = None) -> None:
        """Record a call."""
        self.calls.append((asyncio.get_running_loop().time(), what, details))

    @property
    def steps(self) -> list[str]:
        """The names of all calls so far."""
        return [what for _, what, _ in self.calls]

    def times(self, step: str) -> list[float]:
        """Return the times of the calls of a step."""
        return [time for time, what, _ in self.calls if what == step]

    def details(self, step: str) -> list[Any]:
        """Return the details of the calls of a step."""
        return [details for _, what, details in self.calls if what == step]

    @property
    def last(self) -> ScriptedSession:
        """The session that was opened last."""
        return self.sessions[-1]

    async def declare(self, topology: object) -> None:
        self.note("declare", topology)
        await self.on_declare()

    @asynccontextmanager
    async def session(self, subscription: object):
        self.note("open", subscription)
        await self.on_open()
        session = ScriptedSession(self)
        self.sessions.append(session)
        try:
            yield session
        finally:
            self.note("leave")
            await self.on_leave()

    @asynccontextmanager
    async def publisher(self):
        self.note("publisher")
        await self.on_publisher()
        publisher = ScriptedPublisher(self)
        try:
            yield publisher
        finally:
            publisher.is_open = False
            self.note("leave publisher")
            await self.on_publisher_leave()
