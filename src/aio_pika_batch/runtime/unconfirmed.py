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
from aio_pika_batch.runtime.shutdown import Wait


class _HeldMessage:
    """A held message, its copy, and what happens next."""

    __slots__ = ("arrived", "copy", "pending", "step")

    def __init__(self, copy: PendingCopy, arrived: float, pending: Pending) -> None:
        self.copy = copy
        self.arrived = arrived
        self.pending = pending
        self.step: Republish | Return


class UnconfirmedCopies:
    """Holds messages and publishes their copies again.

    Args:
        publish: Publishes copies.
        on_confirmed: Gets copies that were confirmed, to acknowledge their originals.
        give_back: Gets copies whose originals have to be returned to the broker.
    """

    def __init__(
        self,
        policy: UnconfirmedPolicy,
        *,
        publish: Callable[[Sequence[PendingCopy]], Awaitable[Sequence[Outcome]]],
        on_confirmed: Callable[[Sequence[PendingCopy]], Awaitable[None]],
        give_back: Callable[[Sequence[PendingCopy]], Awaitable[None]],
    ) -> None:
        self._policy = policy
        self._publish = publish
        self._on_confirmed = on_confirmed
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()
        self._held: dict[int, _HeldMessage] = {}
        self._returning: set[_HeldMessage] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    def __len__(self) -> int:
        """The number of held messages."""
        return len(self._held)

    @property
    def since(self) -> float | None:
        """When the longest unsettled of them was delivered; None if none is held."""
        return min((each.arrived for each in self._held.values()), default=None)

    def add(self, copy: PendingCopy, *, arrived: float) -> None:
        """Hold a message whose copy has failed for the first time.

        Args:
            arrived: When the message was delivered, in loop time.
        """
        now = self._loop.time()
        held = _HeldMessage(copy, arrived, Pending(since=now, failures=1))
        self._held[copy.tag] = held
        self._decide(held, now)
        if self._task is None:
            self._task = self._loop.create_task(self._work())
        self._changed.set()

    def _decide(self, held: _HeldMessage, now: float) -> None:
        held.step = self._policy.next_step(
            held.pending,
            now=now,
            # Jitter spreads load; it needn't be unpredictable.
            jitter=random.random(),
            # Messages that are about to be returned don't count.
            held=len(self._held) - len(self._returning),
        )
        if isinstance(held.step, Return):
            self._returning.add(held)

    async def _work(self) -> None:
        while not self._is_closing:
            self._changed.clear()
            if not self._held:
                await self._changed.wait()
                continue
            due_at = min(each.step.at for each in self._held.values())
            if due_at > self._loop.time():
                try:
                    async with asyncio.timeout_at(due_at):
                        await self._changed.wait()
                    continue
                except TimeoutError:
                    pass
            now = max(due_at, self._loop.time())
            due = [each for each in self._held.values() if each.step.at <= now]
            # Divided before the attempt: one that fails now is returned after a pause, not at once.
            returning = [each for each in due if isinstance(each.step, Return)]
            republishing = [each for each in due if isinstance(each.step, Republish)]
            await self._return(returning)
            await self._republish(republishing)

    async def _republish(self, due: Sequence[_HeldMessage]) -> None:
        if not due:
            return
        outcomes = await self._publish([each.copy for each in due])
        confirmed = []
        for held, outcome in zip(due, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                del self._held[held.copy.tag]
                confirmed.append(held.copy)
            else:
                held.pending = replace(held.pending, failures=held.pending.failures + 1)
                self._decide(held, self._loop.time())
        if confirmed:
            await self._on_confirmed(confirmed)

    async def _return(self, due: Sequence[_HeldMessage]) -> None:
        for held in due:
            del self._held[held.copy.tag]
        self._returning.difference_update(due)
        if due:
            await self._give_back([each.copy for each in due])

    async def close(self, wait: Wait) -> Sequence[PendingCopy]:
        """Begin no further attempt, and wait for the one that is running.

        Args:
            wait: An attempt that isn't finished when this returns is abandoned.

        Returns:
            The copies of those that are still held.
        """
        if self._task is not None:
            self._is_closing = True
            self._changed.set()
            await wait({self._task})
            await self._cancel_task()
        left = [each.copy for each in self._held.values()]
        self._held.clear()
        return left

    async def abort(self) -> None:
        """Stop at once and forget everything: the session is gone."""
        await self._cancel_task()
        self._held.clear()

    async def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
