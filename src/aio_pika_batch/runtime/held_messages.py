"""Holds messages unsettled: until their retry is due, and while their copy is not confirmed.

The decisions are those of `hold_policy` and `UnconfirmedPolicy`. Everything ends with the session:
a copy whose original has gone back to the broker is not published.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from aio_pika_batch.core.hold_policy import (
    NEVER,
    Pending,
    Republish,
    Return,
    UnconfirmedPolicy,
    early_release_at,
)
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.settlement_plan import PendingCopy
from aio_pika_batch.runtime.shutdown import Wait, cancel_and_wait


@dataclass(slots=True, eq=False)
class _HeldMessage:
    """A held message, its copy, and what happens next.

    Attributes:
        step: None while its copy is being published.
        pending: None as long as its copy has not been published.
    """

    copy: PendingCopy
    arrived: float
    step: Republish | Return | None
    pending: Pending | None = None


class HeldMessages:
    """Holds messages, and publishes their copies when they are due.

    Args:
        publish: Publishes copies.
        on_confirmed: Gets copies that were confirmed, to acknowledge their originals.
        give_back: Gets copies whose originals have to be returned to the broker.
        on_end: Called with the error if this can't go on.

    Attributes:
        messages: By delivery tag, in the order in which they came, so that the first retry has been
            held longest.
        last_success: When a message last succeeded, in loop time.
        retries: The number of held messages whose retry has not been published yet.
    """

    def __init__(
        self,
        policy: UnconfirmedPolicy,
        *,
        publish: Callable[[Sequence[PendingCopy]], Awaitable[Sequence[Outcome]]],
        on_confirmed: Callable[[Sequence[PendingCopy]], Awaitable[None]],
        give_back: Callable[[Sequence[PendingCopy]], Awaitable[None]],
        on_end: Callable[[BaseException], None],
    ) -> None:
        self._policy = policy
        self._publish = publish
        self._on_confirmed = on_confirmed
        self._give_back = give_back
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self.messages: dict[int, _HeldMessage] = {}
        self._returning: set[_HeldMessage] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._attempts: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self.last_success = NEVER
        self._last_release = NEVER
        self.retries = 0

    @property
    def oldest(self) -> float | None:
        """When the oldest held message was delivered, in loop time; None if none is held."""
        return min((each.arrived for each in self.messages.values()), default=None)

    @property
    def since(self) -> float | None:
        """When the longest unsettled message was delivered, in loop time; None if none is held.

        Messages that wait for their retry, or should not be returned, don't count: they are held
        on purpose.
        """
        return min(
            (
                each.arrived
                for each in self.messages.values()
                if each.pending is not None and not self._policy.is_kept(each.pending)
            ),
            default=None,
        )

    def add_retry(self, copy: PendingCopy, *, arrived: float) -> None:
        """Hold a message for `copy.hold` seconds before its copy is published.

        Args:
            arrived: When the message was delivered, in loop time.
        """
        due = Republish(self._loop.time() + copy.hold)
        self.retries += 1
        self._add(_HeldMessage(copy, arrived, due))

    def add_unconfirmed(self, copy: PendingCopy, outcome: Outcome, *, arrived: float) -> None:
        """Hold a message whose copy has failed for the first time.

        Args:
            arrived: When the message was delivered, in loop time.
        """
        held = _HeldMessage(copy, arrived, Republish(self._loop.time()))
        self._add(held)
        self._decide(held, outcome)

    def note_late(self) -> None:
        """Note that the late outcome of a copy is known: see `PendingCopy.late`."""
        self._changed.set()

    def _add(self, held: _HeldMessage) -> None:
        self.messages[held.copy.tag] = held
        if self._task is None:
            self._task = self._loop.create_task(self._work())
            self._task.add_done_callback(self._on_task_end)
        self._changed.set()

    def release_retries(self) -> None:
        """Publish all retries without waiting until they are due."""
        now = Republish(self._loop.time())
        for each in self.messages.values():
            if each.pending is None and each.step is not None:
                each.step = now
        self._changed.set()

    def decide_again(self) -> None:
        """Decide again when the next retry is published, after a message has succeeded."""
        if self.retries > self._policy.max_held:
            self._changed.set()

    def _decide(self, held: _HeldMessage, outcome: Outcome) -> None:
        was = held.pending
        if was is None:
            was = Pending(self._loop.time(), failures=0, deliveries=held.copy.deliveries)
        held.pending = pending = was.after(outcome)
        held.step = self._policy.next_step(
            pending,
            now=self._loop.time(),
            # Jitter spreads load; it needn't be unpredictable.
            jitter=random.random(),
            # Messages that wait for their retry, or are about to be returned, don't count.
            held=len(self.messages) - self.retries - len(self._returning),
        )
        if isinstance(held.step, Return):
            self._returning.add(held)
        else:
            self._returning.discard(held)

    def _release_at(self) -> float | None:
        return early_release_at(
            held=self.retries,
            limit=self._policy.max_held,
            last_success=self.last_success,
            last_release=self._last_release,
            now=self._loop.time(),
        )

    async def _work(self) -> None:
        while not self._is_closing:
            self._changed.clear()
            await self._settle_late()
            release_at = self._release_at()
            due_at = min(
                (each.step.at for each in self.messages.values() if each.step is not None),
                default=None,
            )
            if release_at is not None and due_at is not None:
                due_at = min(due_at, release_at)
            if due_at is None or due_at > self._loop.time():
                try:
                    async with asyncio.timeout_at(due_at):
                        await self._changed.wait()
                    continue
                except TimeoutError:
                    pass
            now = max(due_at or 0.0, self._loop.time())
            due = [
                each
                for each in self.messages.values()
                if each.step is not None and each.step.at <= now
            ]
            if release_at is not None and release_at <= now:
                self._last_release = now
                early = next(
                    each for each in self.messages.values() if each.pending is None and each.step
                )
                if early not in due:
                    due.append(early)
            # Divided before the attempt: one that fails now is returned after a pause, not at once.
            returning = [each for each in due if isinstance(each.step, Return)]
            self._republish([each for each in due if isinstance(each.step, Republish)])
            await self._return(returning)

    async def _settle_late(self) -> None:
        """Settle the originals whose copies were confirmed late; decide again about others."""
        confirmed = []
        for held in [each for each in self.messages.values() if each.copy.late is not None]:
            if held.step is None:
                continue
            outcome, held.copy.late = held.copy.late, None
            if outcome is Outcome.CONFIRMED:
                self._remove(held)
                confirmed.append(held.copy)
            elif outcome is not None:
                self._decide(held, outcome)
        if confirmed:
            await self._on_confirmed(confirmed)

    def _remove(self, held: _HeldMessage) -> None:
        del self.messages[held.copy.tag]
        self._returning.discard(held)

    def _republish(self, due: Sequence[_HeldMessage]) -> None:
        """Publish copies, in tasks of their own: a queue may be silent while another confirms."""
        groups: dict[object, list[_HeldMessage]] = {}
        for held in due:
            held.step = None
            if held.pending is None:
                self.retries -= 1
            groups.setdefault(held.copy.lane, []).append(held)
        for group in groups.values():
            task = self._loop.create_task(self._attempt(group))
            self._attempts.add(task)
            task.add_done_callback(self._attempts.discard)
            task.add_done_callback(self._on_task_end)

    async def _attempt(self, group: Sequence[_HeldMessage]) -> None:
        outcomes = await self._publish([each.copy for each in group])
        confirmed = []
        for held, outcome in zip(group, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                self._remove(held)
                confirmed.append(held.copy)
            else:
                self._decide(held, outcome)
        self._changed.set()
        if confirmed:
            await self._on_confirmed(confirmed)

    async def _return(self, due: Sequence[_HeldMessage]) -> None:
        for held in due:
            self._remove(held)
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
            await wait({self._task, *self._attempts})
            await self._cancel_tasks()
        left = [each.copy for each in self.messages.values()]
        self._forget()
        return left

    async def abort(self) -> None:
        """Stop at once and forget everything: the session is gone."""
        await self._cancel_tasks()
        self._forget()

    def _forget(self) -> None:
        self.messages.clear()
        self._returning.clear()
        self.retries = 0

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_end(error)

    async def _cancel_tasks(self) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task, *self._attempts)
            self._task = None
