"""Whose settlements go out now, and whose wait a moment?

Batches stand in line. An original whose copy is not confirmed yet is a hole that no `multiple` may
reach across, and a frame for each message behind it is what it costs. So whoever is decided waits
for those in front, who leave the line soon, confirmed or not; but never for those behind, who are
on their way as long as messages come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.transport import Session

PATIENCE = 0.1
"""Seconds that a batch stands in line for its confirmations, at most."""


class Place:
    """A place in the line.

    Attributes:
        settlements: What was decided; None as long as it is not.
        settled: Done once that was sent, where somebody waits for it.
    """

    __slots__ = ("settled", "settlements")

    def __init__(self) -> None:
        self.settlements: Sequence[Settlement] | None = None
        self.settled: asyncio.Future[None] | None = None


class SettleDesk:
    """Takes the settlements of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._line: deque[Place] = deque()
        self._sending: set[asyncio.Task[None]] = set()

    def stand_in_line(self) -> Place:
        """Take a place, to be left within a moment: those behind wait for it."""
        place = Place()
        self._line.append(place)
        return place

    def leave(self, place: Place) -> None:
        """Let those behind go on, as far as it was not done by settling."""
        if place.settlements is None and place in self._line:
            self._line.remove(place)
            self._send(self._decided())

    async def settle(self, settlements: Sequence[Settlement], place: Place | None = None) -> None:
        """Settle, once nobody in front is undecided.

        Args:
            place: Where it stands; without one, or where it was left, at the end of the line.

        Raises:
            TransportError: As `Session.settle` does.
        """
        if place is None or place not in self._line:
            if not self._line:
                await self._session.settle(settlements)
                return
            place = self.stand_in_line()
        place.settlements = settlements
        decided = self._decided()
        if decided == [place]:
            await self._session.settle(settlements)
            return
        place.settled = self._loop.create_future()
        self._send(decided)
        await asyncio.shield(place.settled)

    def _decided(self) -> list[Place]:
        """Those in front who are; they leave the line."""
        decided = []
        while self._line and self._line[0].settlements is not None:
            decided.append(self._line.popleft())
        return decided

    def _send(self, places: Sequence[Place]) -> None:
        if places:
            # A task of its own: whoever waits may be cancelled, and others wait with it.
            task = self._loop.create_task(self._settle_all(places))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _settle_all(self, places: Sequence[Place]) -> None:
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


def _merged(places: Sequence[Place]) -> list[Settlement]:
    tags: dict[Disposition, list[int]] = {}
    for place in places:
        for settlement in place.settlements or ():
            tags.setdefault(settlement.disposition, []).extend(settlement.tags)
    return [Settlement(disposition, tuple(some)) for disposition, some in tags.items()]
