"""Writes the settlements of one session, and knows which ones the broker has certainly received.

:mod:`~aio_pika_batch.core.settlement` explains why a quorum queue can lose settlements, and decides
how to send those that come after a cancel.

Laws:

- The answer to `basic.cancel` proves everything that was written before it. What is settled from
  the cancel on is held until then, so that it can be counted.
- After that, `SAFE_COMMANDS` commands are sent at most, the last ones before the channel is closed.
  The answers to `tx.commit` and `channel.close` prove what was written before them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from aio_pika_batch.adapters.aio_pika.client_errors import consume_exception
from aio_pika_batch.core.settlement import CommandBudget, DrainMode, Ledger, drain_mode
from aio_pika_batch.errors import SessionLost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aio_pika_batch.core.settlement import Frame, Settlement

SETTLE_PAUSE = 0.2
"""Seconds between the last settlement and the close, on brokers that don't call themselves
RabbitMQ. It is unknown what their answers prove."""


class SettlementChannel(Protocol):
    """What the writer needs of a session's channel."""

    def settle(self, frames: Sequence[Frame]) -> bool:
        """Write frames at once; return whether the channel is still open."""
        ...

    async def select(self) -> None:
        """Begin to settle in transactions. Raises SessionLost."""
        ...

    async def commit(self) -> None:
        """Commit what was settled since the last commit. Raises SessionLost."""
        ...


class SettlementWriter:
    """Writes settlements: at once until the cancel, then as `drain_mode` decides.

    Attributes:
        ledger: The session's unsettled deliveries.
        unproven: The number of settled messages whose settlement may not have been received.
    """

    def __init__(self, channel: SettlementChannel, *, is_rabbitmq: bool) -> None:
        self.ledger = Ledger()
        self.unproven = 0
        self._channel = channel
        self._is_rabbitmq = is_rabbitmq
        self._loop = asyncio.get_running_loop()
        self._is_holding = False
        self._is_transactional = False
        self._budget = CommandBudget()
        self._timer: asyncio.TimerHandle | None = None
        self._committing: asyncio.Task[None] | None = None
        self._settled_at = -SETTLE_PAUSE  # no pause if nothing was settled

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Write or hold settlements. Raises SettlementError, or SessionLost."""
        ledger = self.ledger
        if self._is_holding:
            held = ledger.held
            ledger.hold(settlements)
            self.unproven += ledger.held - held
            self._plan_commit()
            return
        unsettled = len(ledger)
        frames = ledger.settle(settlements)
        self.unproven += unsettled - len(ledger)
        self._write(frames)

    def hold(self) -> None:
        """Hold what is settled from now on, because `basic.cancel` is being sent."""
        self._is_holding = True

    def prove(self, settled: int) -> None:
        """Take note that the broker has received so many of the unproven settlements."""
        self.unproven = max(0, self.unproven - settled)

    async def on_cancelled(self, remaining: int, *, is_proof: bool) -> None:
        """Go on after the answer to `basic.cancel`. Raises SessionLost.

        Args:
            remaining: The number of messages that are held, or may still be settled.
            is_proof: Whether a consumer was cancelled, so that the queue itself has answered.
        """
        if is_proof:
            self.unproven = self.ledger.held
        match drain_mode(remaining, is_rabbitmq=self._is_rabbitmq):
            case DrainMode.DIRECT:
                self._is_holding = False
                self._write(self.ledger.release(joined=True))
            case DrainMode.COMMITTED:
                await self._channel.select()
                self._is_transactional = True
                self._plan_commit()
            case DrainMode.JOINED:
                pass  # `finish` joins them

    async def finish(self) -> None:
        """Write what is held; return when the channel may be closed. Raises SessionLost."""
        if self._timer is not None:
            self._timer.cancel()
        if self._committing is not None:
            await asyncio.wait({self._committing})
        if self._is_transactional:
            await self._commit()
        else:
            self._write(self.ledger.release(joined=True))
        if not self._is_rabbitmq:
            await asyncio.sleep(self._settled_at + SETTLE_PAUSE - self._loop.time())

    def on_channel_closed(self) -> None:
        """Take note of `channel.close-ok`."""
        self.unproven = self.ledger.held

    def _write(self, frames: Sequence[Frame]) -> None:
        if frames:
            if not self._channel.settle(frames):
                raise SessionLost("the connection was closed")
            self._settled_at = self._loop.time()

    # -- transactions -----------------------------------------------------------------------------

    def _plan_commit(self) -> None:
        """Commit what is held as soon as the budget allows."""
        is_planned = self._timer is not None or self._committing is not None
        if not self._is_transactional or is_planned or not self.ledger.held:
            return
        commit_at = self._budget.commit_at(self.ledger.held_kinds)
        if commit_at is not None:
            # By a timer even if it is due: results that come together share a commit.
            self._timer = self._loop.call_at(max(commit_at, self._loop.time()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        # Another disposition may have come meanwhile, for which the budget is too small.
        if self._budget.commit_at(self.ledger.held_kinds) is not None:
            # In a task of its own: cancelling a pending tx.commit would close the channel.
            self._committing = self._loop.create_task(self._commit())
            self._committing.add_done_callback(self._on_commit)

    def _on_commit(self, task: asyncio.Task[None]) -> None:
        consume_exception(task)  # only a lost session fails it, and that is noticed elsewhere
        self._committing = None
        self._plan_commit()

    async def _commit(self) -> None:
        held = self.ledger.held
        if held:
            self._budget.spend(self.ledger.held_kinds, self._loop.time())
            # Singles, because they can be sorted: the broker makes one command of those of one
            # disposition that follow each other.
            self._write(self.ledger.release(joined=False))
            await self._channel.commit()
            self.prove(held)
