"""Whose settlements go out now, and whose wait a moment?

Batches stand in line. An original whose copy is not confirmed yet is a hole that no `multiple` may
reach across, and a frame for each message behind it is what it costs. So whoever is decided waits a
moment for those in front; but never for those behind, who are on their way as long as messages
come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import takewhile

from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.transport import Session

PATIENCE = 0.1
"""Seconds that what is decided waits for confirmations, its own or those of others, at most."""


class Ticket:
    """A place in the line.

    Attributes:
        settlements: What was decided; None as long as it is not.
        settled: Done once that was sent, where somebody waits for it.
    """

    __slots__ = ("settled", "settlements")

    def __init__(self) -> None:
        self.settlements: Sequence[Settlement] | None = None
        self.settled: asyncio.Future[None] | None = None


class SettlementQueue:
    """Takes the settlements of one session.

    Args:
        patience: Seconds that a settlement waits for those in front, at most.
    """

    def __init__(self, session: Session, patience: float = PATIENCE) -> None:
        self._session = session
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._line: deque[Ticket] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()

    def reserve(self) -> Ticket:
        """Take a place, to be left some day: those behind wait a moment for it."""
        place = Ticket()
        self._line.append(place)
        return place

    def leave(self, place: Ticket) -> None:
        """Let those behind go on, as far as it was not done by settling."""
        if place.settlements is None:
            self._line.remove(place)
            self._send(self._front())

    async def settle(self, settlements: Sequence[Settlement], place: Ticket | None = None) -> None:
        """Settle, once nobody in front is undecided, or patience is at its end.

        Args:
            place: Where it stands in line; None for the end of it.

        Raises:
            TransportError: As `Session.settle` does.
        """
        if not self._line:
            await self._session.settle(settlements)
            return
        if place is None:
            place = self.reserve()
        place.settlements = settlements
        going = self._front()
        if going == [place]:
            await self._session.settle(settlements)
            return
        place.settled = self._loop.create_future()
        self._send(going)
        if place not in going and self._timer is None:
            self._timer = self._loop.call_later(self._patience, self._lose_patience)
        await asyncio.shield(place.settled)

    def settle_at_once(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        """Settle without waiting for anybody; whatever else is decided goes along.

        Returns:
            Done once it is settled, or failed as `settle` would.
        """
        place = self.reserve()
        place.settlements = settlements
        place.settled = self._loop.create_future()
        self._send(self._decided())
        return place.settled

    def _front(self) -> list[Ticket]:
        """Those in front who are decided; they leave the line."""
        return self._let_go(list(takewhile(_is_decided, self._line)))

    def _decided(self) -> list[Ticket]:
        """All who are decided; they leave the line, whoever else stands between them."""
        return self._let_go(list(filter(_is_decided, self._line)))

    def _let_go(self, places: list[Ticket]) -> list[Ticket]:
        for place in places:
            self._line.remove(place)
        if self._timer is not None and not any(map(_is_decided, self._line)):
            self._timer.cancel()
            self._timer = None
        return places

    def _lose_patience(self) -> None:
        self._send(self._decided())

    def _send(self, places: Sequence[Ticket]) -> None:
        if places:
            # A task of its own: whoever waits may be cancelled, and others wait with it.
            task = self._loop.create_task(self._settle_all(places))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _settle_all(self, places: Sequence[Ticket]) -> None:
        error: Exception | None = None
        try:
            await self._session.settle(_merged(places))
        except Exception as raised:  # noqa: BLE001  -- whoever waits gets it, whatever it is
            error = raised
        for place in places:
            if place.settled is None or place.settled.done():
                continue
            if error is None:
                place.settled.set_result(None)
            else:
                place.settled.set_exception(error)
                # Retrieved, for the case that whoever waited has been cancelled meanwhile.
                place.settled.exception()


def _is_decided(place: Ticket) -> bool:
    return place.settlements is not None


def _merged(places: Sequence[Ticket]) -> list[Settlement]:
    tags: dict[Disposition, list[int]] = {}
    for place in places:
        for settlement in place.settlements or ():
            tags.setdefault(settlement.disposition, []).extend(settlement.tags)
    return [Settlement(disposition, tuple(some)) for disposition, some in tags.items()]
