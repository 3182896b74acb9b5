"""Orders the settlements of concurrent batches, so that one `multiple` ack can cover several.

A message whose copy is not confirmed yet is a gap that no `multiple` ack may reach across, and
every message behind the gap costs a frame of its own. So a settlement waits a moment for those
before it. It never waits for those behind it: as long as messages arrive, there always are some.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import takewhile

from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.errors import SessionLost
from aio_pika_batch.transport import Session

PATIENCE = 0.1
"""Seconds that a settlement waits for publisher confirms, its own or other batches', at most.

Until then one frame can settle everything. After that, only what is decided is settled.
"""


class Ticket:
    """A position in the queue.

    Attributes:
        settlements: What was decided; None until then.
        settled: Done once the settlements are sent, if a caller waits for that.
    """

    __slots__ = ("settled", "settlements")

    def __init__(self) -> None:
        self.settlements: Sequence[Settlement] | None = None
        self.settled: asyncio.Future[None] | None = None


class SettlementQueue:
    """Sends the settlements of one session.

    Args:
        patience: Seconds that a settlement waits for those before it, at most.

    Attributes:
        tickets: The positions that are reserved or decided, and not sent yet.
    """

    def __init__(self, session: Session, patience: float = PATIENCE) -> None:
        self._session = session
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self.tickets: deque[Ticket] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()

    def reserve(self) -> Ticket:
        """Take a position for settlements that are decided later, or never: see `release`."""
        ticket = Ticket()
        self.tickets.append(ticket)
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Give up a position that was not used, so that those behind it can be sent."""
        if ticket.settlements is None and ticket in self.tickets:
            self.tickets.remove(ticket)
            self._send(self._take_front())

    def abort(self) -> None:
        """Send nothing more: the session is gone. Those who wait get a SessionLost."""
        for ticket in self._take(list(self.tickets)):
            if ticket.settled is not None and not ticket.settled.done():
                ticket.settled.set_exception(SessionLost("the session ended before it settled"))
                ticket.settled.exception()  # marks it as retrieved

    async def settle(self, settlements: Sequence[Settlement], ticket: Ticket | None = None) -> None:
        """Settle as soon as everything before is decided, or patience has run out.

        Args:
            ticket: The reserved position; None for the end of the queue.

        Raises:
            TransportError: As `Session.settle` does.
        """
        if ticket is None:
            ticket = self.reserve()
        ticket.settlements = settlements
        front = self._take_front()
        if front == [ticket]:
            await self._session.settle(settlements)
            return
        # One write may settle several batches: a cancelled caller must not cancel the others'.
        await asyncio.shield(self._wait(ticket, front))

    def enqueue(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        """Queue a settlement behind the positions that are reserved now, and return at once.

        Returns:
            A future: done once it is settled, or with the error that `settle` would raise.
        """
        ticket = self.reserve()
        ticket.settlements = settlements
        return self._wait(ticket, self._take_front())

    def _wait(self, ticket: Ticket, front: list[Ticket]) -> asyncio.Future[None]:
        ticket.settled = self._loop.create_future()
        self._send(front)
        if ticket not in front and self._timer is None:
            self._timer = self._loop.call_later(self._patience, self._send_decided)
        return ticket.settled

    def _send_decided(self) -> None:
        """Send everything that is decided, although something before it is not."""
        self._send(self._take(list(filter(_is_decided, self.tickets))))

    def _take_front(self) -> list[Ticket]:
        """Remove and return the decided settlements at the front."""
        return self._take(list(takewhile(_is_decided, self.tickets)))

    def _take(self, tickets: list[Ticket]) -> list[Ticket]:
        for ticket in tickets:
            self.tickets.remove(ticket)
        if self._timer is not None and not any(map(_is_decided, self.tickets)):
            self._timer.cancel()
            self._timer = None
        return tickets

    def _send(self, tickets: Sequence[Ticket]) -> None:
        if tickets:
            # A task of its own: one caller may be cancelled while the others still wait.
            task = self._loop.create_task(self._settle_all(tickets))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _settle_all(self, tickets: Sequence[Ticket]) -> None:
        error: BaseException | None = None
        try:
            await self._session.settle(_merge(tickets))
        except asyncio.CancelledError:
            error = SessionLost("the settlement was cancelled")
        except BaseException as raised:  # noqa: BLE001  -- passed on to those who wait
            error = raised
        for ticket in tickets:
            if ticket.settled is None or ticket.settled.done():
                continue
            if error is None:
                ticket.settled.set_result(None)
            else:
                ticket.settled.set_exception(error)
                # Marks it as retrieved, in case the caller has been cancelled meanwhile.
                ticket.settled.exception()


def _is_decided(ticket: Ticket) -> bool:
    return ticket.settlements is not None


def _merge(tickets: Sequence[Ticket]) -> list[Settlement]:
    tags: dict[Disposition, list[int]] = {}
    for ticket in tickets:
        for settlement in ticket.settlements or ():
            tags.setdefault(settlement.disposition, []).extend(settlement.tags)
    # One settlement for each disposition, so that one frame can cover tags of several batches.
    return [Settlement(disposition, tuple(some)) for disposition, some in tags.items()]
