"""How do the settlements of several batches share one write?

While confirmations are on their way, settlements wait a moment for them: an original that is still
undecided is a hole that no `multiple` may reach across, and a frame for each message is what it
costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.transport import Session

PATIENCE = 0.1
"""Seconds that a settlement waits for other messages' confirmations, at most."""


class SettleDesk:
    """Takes the settlements of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._rounds = 0
        self._pending: list[Settlement] = []
        self._flushed: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: set[asyncio.Task[None]] = set()

    @contextmanager
    def round(self) -> Iterator[None]:
        """While this is open, confirmations are being waited for."""
        self._rounds += 1
        try:
            yield
        finally:
            self._rounds -= 1
            if not self._rounds:
                self._flush_soon()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Settle, at once or together with others a moment later.

        Raises:
            TransportError: As `Session.settle` does.
        """
        if not self._rounds and not self._pending:
            await self._session.settle(settlements)
            return
        self._pending.extend(settlements)
        if self._flushed is None:
            self._flushed = self._loop.create_future()
            self._timer = self._loop.call_later(PATIENCE, self._flush_soon)
        await asyncio.shield(self._flushed)

    def _flush_soon(self) -> None:
        if self._pending:
            task = self._loop.create_task(self._flush())
            self._flushing.add(task)
            task.add_done_callback(self._flushing.discard)

    async def _flush(self) -> None:
        pending, self._pending = self._pending, []
        flushed, self._flushed = self._flushed, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if flushed is None:
            return
        try:
            await self._session.settle(_merged(pending))
        except Exception as error:  # noqa: BLE001  -- whoever waits gets it, whatever it is
            flushed.set_exception(error)
            # Retrieved, for the case that whoever waited has been cancelled meanwhile.
            flushed.exception()
        else:
            flushed.set_result(None)


def _merged(settlements: Sequence[Settlement]) -> list[Settlement]:
    tags: dict[Disposition, list[int]] = {}
    for settlement in settlements:
        tags.setdefault(settlement.disposition, []).extend(settlement.tags)
    return [Settlement(disposition, tuple(some)) for disposition, some in tags.items()]
