"""Handles messages that may have crashed their process while the process holds no other message.

A session on a queue that counts deliveries begins with a prefetch count of 1. It gets the whole one
as soon as an ordinary message arrives. If a suspect arrives, deliveries are paused in all sessions
of the process, and what they hold is finished first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from aio_pika_batch.core.message import Message
from aio_pika_batch.core.quarantine import (
    CrashPolicy,
    OwnRequeues,
    Suspicion,
    came_back,
    delivery_count,
)
from aio_pika_batch.logs import BurstLog, KeywordLogger
from aio_pika_batch.runtime.handler import HandlerSlots
from aio_pika_batch.transport import AdjustableSession

DOUBT = 60.0
"""Seconds after the loss of a connection in which counts are not believed: a broker that restarts,
or a network that fails, returns messages of many processes."""

ALONE = 1
"""The prefetch count of a session that may get a suspect next."""


class GatedLoop(Protocol):
    """What a gate needs of the loop that consumes its session."""

    @property
    def is_idle(self) -> bool:
        """Whether everything that was delivered is settled, apart from what the gate has."""
        ...

    def finish_early(self) -> None:
        """Handle what is buffered, and publish the retries that are held, without a delay."""

    async def handle_alone(self, message: Message) -> None:
        """Handle a message, and return when it is settled or held. A slot must be free."""

    def replace_by_copies(self, messages: Sequence[Message], *, holds_copies: bool) -> None:
        """Begin to replace messages by copies that the broker counts from 0."""

    def dead_letter_crashed(self, messages: Sequence[Message]) -> None:
        """Dead-letter messages that came back too often."""


class Quarantine:
    """What the sessions of a consumer share.

    Attributes:
        own: What handlers requeued at once.
        doubt_until: Until when counts are not believed, in loop time.
        gates: Those of all sessions.
        owner: The gate whose suspect is handled, or will be.
    """

    def __init__(self, policy: CrashPolicy, log: KeywordLogger) -> None:
        self.policy = policy
        self.suspects = BurstLog(
            lambda count: log.warning(
                "messages came back repeatedly without a result: each is handled alone",
                messages=count,
            )
        )
        self.crashed = BurstLog(
            lambda count: log.error(
                "messages came back too often without a result: they aren't handled any more",
                messages=count,
            )
        )
        self.own = OwnRequeues()
        self.doubt_until = -DOUBT
        self.gates: set[SuspectGate] = set()
        self.owner: SuspectGate | None = None

    def acquire(self, gate: SuspectGate) -> bool:
        """Let other sessions make way; False if this one has to make way itself."""
        if self.owner is None:
            self.owner = gate
            self.wake()
        return self.owner is gate

    def release(self, gate: SuspectGate) -> None:
        """Let other sessions go on."""
        if self.owner is gate:
            self.owner = None
            self.wake()

    def wake(self) -> None:
        """Let all sessions look again at what they have to do."""
        for gate in self.gates:
            gate.changed.set()

    def close(self) -> None:
        """Log what hasn't been logged."""
        self.suspects.flush()
        self.crashed.flush()


class SuspectGate:
    """Keeps suspects away from the other messages of one session.

    Attributes:
        full: The prefetch count for ordinary messages.
        is_pausing: Whether nothing more is delivered, so that waiting for a batch is pointless.
        changed: Set when there may be something to do.
        suspects: Those that are unsettled.
    """

    def __init__(
        self,
        session: AdjustableSession,
        quarantine: Quarantine,
        loop: GatedLoop,
        slots: HandlerSlots,
        *,
        prefetch: int,
    ) -> None:
        self._session = session
        self._quarantine = quarantine
        self._loop = loop
        self._slots = slots
        self.full = prefetch
        self._wanted = ALONE
        self._current: int | None = ALONE
        self.is_pausing = False
        self.has_made_way = False
        self.changed = asyncio.Event()
        self.suspects: list[Message] = []

    def sort(self, chunk: Sequence[Message]) -> Sequence[Message]:
        """Keep the suspects of a chunk; return its ordinary messages."""
        found = came_back(chunk)
        if found:
            chunk = self._sort(chunk, found)
        if chunk and self._wanted != self.full:
            self._wanted = self.full
            self.changed.set()
        return chunk

    def _sort(self, chunk: Sequence[Message], found: Sequence[Message]) -> Sequence[Message]:
        policy, own = self._quarantine.policy, self._quarantine.own
        in_doubt = asyncio.get_running_loop().time() < self._quarantine.doubt_until
        kinds: dict[Suspicion, list[Message]] = {each: [] for each in Suspicion}
        for message in found:
            kinds[policy.judge(message, own, in_doubt=in_doubt)].append(message)
        if len(kinds[Suspicion.NONE]) == len(found):
            return chunk
        if crashed := kinds[Suspicion.CRASHED]:
            self._quarantine.crashed.note(len(crashed))
            self._loop.dead_letter_crashed(crashed)
        if worn := kinds[Suspicion.WORN]:
            self._loop.replace_by_copies(worn, holds_copies=False)
        if suspects := kinds[Suspicion.SUSPECT]:
            self.suspects += suspects
            self._quarantine.suspects.note(len(suspects))
            self.changed.set()
        kept = {*crashed, *worn, *suspects}
        return [each for each in chunk if each not in kept]

    async def run(self) -> None:
        """Adjust the deliveries to what arrives, until it is cancelled.

        Raises:
            TransportError: The session is lost.
        """
        quarantine = self._quarantine
        quarantine.gates.add(self)
        try:
            while True:
                self.changed.clear()
                if quarantine.owner not in (None, self):
                    await self._make_way()
                elif self.suspects:
                    await self._isolate()
                elif self._current != self._wanted:
                    await self._pause()
                    if not self.suspects:
                        await self._resume(self._wanted)
                else:
                    await self.changed.wait()
        finally:
            quarantine.gates.discard(self)
            quarantine.release(self)
            # An owner may wait for this session.
            quarantine.wake()

    async def _isolate(self) -> None:
        """Handle one suspect, and replace the others by copies."""
        quarantine = self._quarantine
        if not quarantine.acquire(self):
            return
        try:
            await self._finish(keep=1)
            await self._until(lambda: all(each.has_made_way for each in quarantine.gates - {self}))
            await self._until(lambda: self._slots.is_free)
            if self.suspects:
                await self._loop.handle_alone(self.suspects.pop())
        finally:
            self.is_pausing = False
            quarantine.release(self)
        await self._resume(ALONE)

    async def _make_way(self) -> None:
        """Hold nothing until the suspect of another session is handled."""
        quarantine = self._quarantine
        try:
            await self._finish(keep=0)
            self.has_made_way = True
            quarantine.wake()
            await self._until(lambda: quarantine.owner is None)
        finally:
            self.is_pausing = self.has_made_way = False
        await self._resume(ALONE)

    async def _finish(self, *, keep: int) -> None:
        """Pause, and settle everything but *keep* suspects.

        Suspects aren't returned: before RabbitMQ 4.3 each return would count against them.
        """
        await self._pause()
        self.is_pausing = True
        if len(self.suspects) > keep:
            # The likeliest one stays, because a copy keeps less of what is known.
            self.suspects.sort(key=delivery_count, reverse=True)
            self._loop.replace_by_copies(self.suspects[keep:], holds_copies=True)
            del self.suspects[keep:]
        while True:
            self._loop.finish_early()
            self.changed.clear()
            if self._loop.is_idle:
                return
            await self.changed.wait()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def _pause(self) -> None:
        if self._current is not None:
            await self._session.pause()
            self._current = None

    async def _resume(self, prefetch: int) -> None:
        self._wanted = self._current = prefetch
        await self._session.resume(prefetch)
