"""Which publication does a confirm, or a return, speak of?

Pure: the broker's word in, outcomes out. A return carries no number; it precedes its own confirm,
but others may stand between, and brokers have been seen to sort its headers. So it is matched by
where it was to go, its body and its properties; where nothing matches, every publication on that
route counts as returned, which may make duplicates and never loses one.

Laws:

- Each publication gets one outcome, and only the broker's own word makes it `CONFIRMED`.
- Confirms may come in any order, and `multiple` speaks of those only that are still open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.properties import decode
from aio_pika_batch.core.publication import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from aio_pika_batch.adapters.aio_pika.events import Confirm, Returned

Route = tuple[bytes, bytes]


class Call:
    """One call of `publish`: the outcomes that it waits for."""

    __slots__ = ("done", "missing", "outcomes")

    def __init__(self, size: int, done: Callable[[], None]) -> None:
        self.outcomes: list[Outcome | None] = [None] * size
        self.missing = size
        self.done = done

    def settle(self, index: int, outcome: Outcome) -> None:
        """Enter an outcome; a publication has only one."""
        if self.outcomes[index] is None:
            self.outcomes[index] = outcome
            self.missing -= 1
            if not self.missing:
                self.done()


class Entry:
    """One publication on its way."""

    __slots__ = ("body", "call", "index", "properties", "returned", "route")

    def __init__(
        self, call: Call, index: int, route: Route, properties: bytes, body: bytes
    ) -> None:
        self.call = call
        self.index = index
        self.route = route
        self.properties = properties
        self.body = body
        self.returned = False


class Books:
    """The publications of one channel that the broker has not answered."""

    def __init__(self) -> None:
        self._last = 0
        self._oldest = 1
        self._open: dict[int, Entry] = {}
        # By route, so that a return need not be held against all of them. Without those that have
        # been returned already.
        self._routes: dict[Route, dict[int, Entry]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, entry: Entry) -> int:
        """Note a publication; the channel numbers them from 1, as we do."""
        self._last = number = self._last + 1
        self._open[number] = entry
        route = self._routes.get(entry.route)
        if route is None:
            self._routes[entry.route] = {number: entry}
        else:
            route[number] = entry
        return number

    def close(self, number: int, outcome: Outcome) -> None:
        """End a publication whose outcome was learnt otherwise; a return weighs more."""
        self._close(number, outcome)

    def confirm(self, confirm: Confirm) -> None:
        """Take the broker's word on one publication, or on all up to it."""
        outcome = Outcome.CONFIRMED if confirm.accepted else Outcome.REFUSED
        if confirm.multiple:
            # Each number is looked at once in the life of the channel, however many confirms come.
            for number in range(self._oldest, confirm.tag + 1):
                self._close(number, outcome)
            self._oldest = max(self._oldest, confirm.tag + 1)
        else:
            self._close(confirm.tag, outcome)

    def returned(self, returned: Returned) -> None:
        """Note that a publication came back; its confirm will still come."""
        route = self._routes.get((returned.exchange, returned.routing_key), {})
        for number in self._matching(route, returned):
            route.pop(number).returned = True

    def _matching(self, route: dict[int, Entry], returned: Returned) -> list[int]:
        """The numbers of those it may be: one, if at all possible."""
        for number, entry in route.items():
            if entry.properties == returned.properties and entry.body == returned.body:
                return [number]
        meaning = decode(returned.properties)
        for number, entry in route.items():
            if entry.body == returned.body and decode(entry.properties) == meaning:
                return [number]
        return list(route)

    def end(self, outcome: Callable[[Entry], Outcome]) -> None:
        """Close all that is open: the channel has no more to say."""
        entries = list(self._open.values())
        self._open.clear()
        self._routes.clear()
        for entry in entries:
            entry.call.settle(entry.index, Outcome.RETURNED if entry.returned else outcome(entry))

    def _close(self, number: int, outcome: Outcome) -> None:
        entry = self._open.pop(number, None)
        if entry is None:
            return
        if entry.returned:
            outcome = Outcome.RETURNED
        else:
            route = self._routes[entry.route]
            del route[number]
            if not route:
                del self._routes[entry.route]
        entry.call.settle(entry.index, outcome)
