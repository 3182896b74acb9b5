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
    from collections.abc import Callable, Sequence

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
        # By route, so that a return need not be held against all of them, and without those that
        # have been returned already. Kept from the first return on, until nothing is open.
        self._routes: dict[Route, dict[int, Entry]] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, entries: Sequence[Entry]) -> int:
        """Note publications; the channel numbers them from 1, as we do.

        Returns:
            The number of the first of them.
        """
        first = self._last + 1
        self._last += len(entries)
        self._open.update(zip(range(first, self._last + 1), entries, strict=True))
        if self._routes is not None:
            for number, entry in enumerate(entries, first):
                self._routes.setdefault(entry.route, {})[number] = entry
        return first

    def close(self, number: int, outcome: Outcome) -> None:
        """End a publication whose outcome is known; a return weighs more."""
        entry = self._open.pop(number, None)
        if entry is None:
            return
        if entry.returned:
            outcome = Outcome.RETURNED
        elif self._routes is not None:
            del self._routes[entry.route][number]
        if not self._open:
            self._routes = None
        entry.call.settle(entry.index, outcome)

    def confirm(self, confirm: Confirm) -> None:
        """Take the broker's word on one publication, or on all up to it."""
        outcome = Outcome.CONFIRMED if confirm.accepted else Outcome.REFUSED
        if confirm.multiple:
            # Each number is looked at once in the life of the channel, however many confirms come.
            # It cannot speak of what was not sent, whatever number it names.
            last = min(confirm.tag, self._last)
            for number in range(self._oldest, last + 1):
                self.close(number, outcome)
            self._oldest = max(self._oldest, last + 1)
        else:
            self.close(confirm.tag, outcome)

    def returned(self, returned: Returned) -> None:
        """Note that a publication came back; its confirm will still come."""
        if self._routes is None:
            self._routes = {}
            for number, entry in self._open.items():
                self._routes.setdefault(entry.route, {})[number] = entry
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
        self._routes = None
        for entry in entries:
            entry.call.settle(entry.index, Outcome.RETURNED if entry.returned else outcome(entry))
