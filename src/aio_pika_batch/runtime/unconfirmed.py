"""Holds messages whose retry or dead-letter copy is unconfirmed, and republishes the copies.

The decisions are those of `UnconfirmedPolicy`. It ends with its session: a copy whose original has
gone back to the broker is not published again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.settlement_plan import PendingCopy
from aio_pika_batch.core.unconfirmed_policy import Pending, Republish, Return, UnconfirmedPolicy
from aio_pika_batch.runtime.handler_slots import Wait


class _Pending:
    """One original, and what is next for it."""

    __slots__ = ("arrived", "held", "republication", "step")

    def __init__(self, republication: PendingCopy, arrived: float, held: Pending) -> None:
        self.republication = republication
        self.arrived = arrived
        self.held = held
        self.step: Republish | Return


class UnconfirmedCopies:
    """Holds originals and tries their copies again.

    Args:
        publish: Publishes copies.
        confirmed: Told which copies have been confirmed, to ack their originals.
        give_back: Told which originals are to be returned.
    """

    def __init__(
        self,
        policy: UnconfirmedPolicy,
        *,
        publish: Callable[[Sequence[PendingCopy]], Awaitable[Sequence[Outcome]]],
        confirmed: Callable[[Sequence[PendingCopy]], Awaitable[None]],
        give_back: Callable[[Sequence[PendingCopy]], Awaitable[None]],
    ) -> None:
        self._policy = policy
        self._publish = publish
        self._confirmed = confirmed
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()
        self._guests: dict[int, _Pending] = {}
        self._leaving: set[_Pending] = set()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    def __len__(self) -> int:
        """How many originals are held."""
        return len(self._guests)

    @property
    def since(self) -> float | None:
        """When the longest unsettled of them was delivered; None if nobody waits."""
        return min((guest.arrived for guest in self._guests.values()), default=None)

    def add(self, republication: PendingCopy, *, arrived: float) -> None:
        """Take in an original whose copy has just failed for the first time.

        Args:
            arrived: When the original was delivered, in loop time.
        """
        now = self._loop.time()
        guest = _Pending(republication, arrived, Pending(since=now, failures=1))
        self._guests[republication.tag] = guest
        self._decide(guest, now)
        if self._task is None:
            self._task = self._loop.create_task(self._attend())
        self._news.set()

    def _decide(self, guest: _Pending, now: float) -> None:
        guest.step = self._policy.next_step(
            guest.held,
            now=now,
            # Jitter spreads load; nobody gains by predicting it.
            jitter=random.random(),
            # Those who are about to leave take nobody's place.
            held=len(self._guests) - len(self._leaving),
        )
        if isinstance(guest.step, Return):
            self._leaving.add(guest)

    async def _attend(self) -> None:
        while not self._is_closing:
            self._news.clear()
            if not self._guests:
                await self._news.wait()
                continue
            due_at = min(guest.step.at for guest in self._guests.values())
            if due_at > self._loop.time():
                try:
                    async with asyncio.timeout_at(due_at):
                        await self._news.wait()
                    continue
                except TimeoutError:
                    pass
            now = max(due_at, self._loop.time())
            due = [guest for guest in self._guests.values() if guest.step.at <= now]
            # Told apart first: who has just failed again may leave after a pause, and not at once.
            leaving = [guest for guest in due if isinstance(guest.step, Return)]
            trying = [guest for guest in due if isinstance(guest.step, Republish)]
            await self._let_go(leaving)
            await self._try_again(trying)

    async def _try_again(self, guests: Sequence[_Pending]) -> None:
        if not guests:
            return
        outcomes = await self._publish([guest.republication for guest in guests])
        confirmed = []
        for guest, outcome in zip(guests, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                del self._guests[guest.republication.tag]
                confirmed.append(guest.republication)
            else:
                guest.held = replace(guest.held, failures=guest.held.failures + 1)
                self._decide(guest, self._loop.time())
        if confirmed:
            await self._confirmed(confirmed)

    async def _let_go(self, guests: Sequence[_Pending]) -> None:
        for guest in guests:
            del self._guests[guest.republication.tag]
        self._leaving.difference_update(guests)
        if guests:
            await self._give_back([guest.republication for guest in guests])

    async def close(self, wait: Wait) -> Sequence[PendingCopy]:
        """Begin no further attempt, and wait for the one under way.

        Args:
            wait: An attempt that is not over when this returns is abandoned.

        Returns:
            Those that are still held.
        """
        if self._task is not None:
            self._is_closing = True
            self._news.set()
            await wait({self._task})
            await self._dismiss()
        left = [guest.republication for guest in self._guests.values()]
        self._guests.clear()
        return left

    async def abort(self) -> None:
        """Stop at once, and forget everybody: the session is gone, and with it the right to try."""
        await self._dismiss()
        self._guests.clear()

    async def _dismiss(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
