"""Matches the broker's confirms and returned publications with what was published on a channel.

Pure: answers in, outcomes out. A returned publication carries no number. It comes before its own
confirm, but others may come between them, and some brokers sort its headers. So it is matched by
its route, its body and its properties. If nothing matches, every publication on that route counts
as returned, which may make duplicates but never loses a message.

Laws:

- Each publication has one outcome, and only the broker's confirm makes it `CONFIRMED`.
- Confirms may come in any order, and `multiple` concerns only the publications that are still open.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.properties import decode
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.refusals import ReplyCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aio_pika_batch.adapters.aio_pika.events import (
        ChannelClosed,
        Confirm,
        ReturnedPublication,
    )

Route = tuple[bytes, bytes]

_REFUSALS = {ReplyCode.ACCESS_REFUSED, ReplyCode.NOT_FOUND, ReplyCode.PRECONDITION_FAILED}
_TOPIC = re.compile(r"access to topic '(.*)' in exchange '")
_LARGEST_BODY = re.compile(r"configured max size (\d+)")


class PublishCall:
    """One call of `publish`, and the outcomes that it waits for.

    Attributes:
        late: Gets the index and the outcome of each publication that is answered from now on; None
            as long as the call waits.
    """

    __slots__ = ("done", "late", "missing", "outcomes")

    def __init__(self, size: int, done: Callable[[], None]) -> None:
        self.outcomes: list[Outcome | None] = [None] * size
        self.missing = size
        self.done = done
        self.late: Callable[[int, Outcome], None] | None = None

    def settle(self, index: int, outcome: Outcome) -> None:
        """Set the outcome of a publication, unless it has one."""
        if self.outcomes[index] is None:
            self.outcomes[index] = outcome
            self.missing -= 1
            if self.late is not None:
                self.late(index, outcome)
            elif not self.missing:
                self.done()


class InFlight:
    """One publication that the broker has not answered.

    Attributes:
        method: Its method frame, for the fast wire.
    """

    __slots__ = ("body", "call", "index", "method", "properties", "returned", "route")

    def __init__(  # noqa: PLR0917  -- positional: one is created for every publication
        self,
        call: PublishCall,
        index: int,
        route: Route,
        properties: bytes,
        body: bytes,
        method: bytes = b"",
    ) -> None:
        self.call = call
        self.index = index
        self.route = route
        self.properties = properties
        self.body = body
        self.method = method
        self.returned = False


class ConfirmTracker:
    """The publications of one channel that the broker has not answered."""

    def __init__(self) -> None:
        self._last = 0
        self._oldest = 1
        self._open: dict[int, InFlight] = {}
        # By route, so that a returned publication is compared with few, and without those that are
        # marked as returned. Kept from the first returned publication until nothing is open.
        self._routes: dict[Route, dict[int, InFlight]] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def track(self, publications: Sequence[InFlight]) -> int:
        """Add publications. The broker numbers them from 1 in the order of sending, and so do we.

        Returns:
            The number of the first one.
        """
        first = self._last + 1
        self._last += len(publications)
        self._open.update(zip(range(first, self._last + 1), publications, strict=True))
        if self._routes is not None:
            for number, publication in enumerate(publications, first):
                self._routes.setdefault(publication.route, {})[number] = publication
        return first

    def settle(self, number: int, outcome: Outcome) -> None:
        """Set the outcome of a publication; `RETURNED` if it was marked as returned."""
        publication = self._open.pop(number, None)
        if publication is None:
            return
        if publication.returned:
            outcome = Outcome.RETURNED
        elif self._routes is not None:
            del self._routes[publication.route][number]
        if not self._open:
            self._routes = None
        publication.call.settle(publication.index, outcome)

    def confirm(self, confirm: Confirm) -> None:
        """Settle one publication, or all up to it."""
        outcome = Outcome.CONFIRMED if confirm.accepted else Outcome.REFUSED
        if confirm.multiple:
            # Each number is visited once in the life of the channel, however many confirms come.
            # The broker may name any number, but cannot confirm what was not sent.
            last = min(confirm.tag, self._last)
            numbers = range(self._oldest, last + 1)
            if self._routes is None:
                # The common case, once for each publication: nothing was returned.
                take = self._open.pop
                for number in numbers:
                    publication = take(number, None)
                    if publication is not None:
                        publication.call.settle(publication.index, outcome)
            else:
                for number in numbers:
                    self.settle(number, outcome)
            self._oldest = max(self._oldest, last + 1)
        else:
            self.settle(confirm.tag, outcome)

    def mark_returned(self, returned: ReturnedPublication) -> None:
        """Mark a publication as returned. Its confirm is still to come."""
        if self._routes is None:
            self._routes = {}
            for number, publication in self._open.items():
                self._routes.setdefault(publication.route, {})[number] = publication
        route = self._routes.get((returned.exchange, returned.routing_key), {})
        for number in _matching(route, returned):
            route.pop(number).returned = True

    def end(self, outcome: Callable[[InFlight], Outcome]) -> None:
        """Settle all open publications: the channel has ended."""
        publications = list(self._open.values())
        self._open.clear()
        self._routes = None
        for each in publications:
            each.call.settle(each.index, Outcome.RETURNED if each.returned else outcome(each))


def _matching(route: dict[int, InFlight], returned: ReturnedPublication) -> list[int]:
    """Return the numbers of the publications that it may be: one, if one matches."""
    # First by the bytes, which is cheap and nearly always finds it.
    for number, publication in route.items():
        if publication.properties == returned.properties and publication.body == returned.body:
            return [number]
    # Then by their meaning: some brokers encode the header table again, with sorted keys.
    properties = decode(returned.properties)
    for number, publication in route.items():
        if publication.body == returned.body and decode(publication.properties) == properties:
            return [number]
    return list(route)


def outcome_after_close(closed: ChannelClosed, *, alone: bool) -> Callable[[InFlight], Outcome]:
    """Return a function that tells `REFUSED` from `UNKNOWN` after the broker closed a channel.

    Only the publication that caused it was refused. The broker may have stored others before it.

    Args:
        closed: The broker's reason.
        alone: Whether only one publication was in flight.
    """
    code, text = closed
    # Any other code, an internal error for example, says nothing about a publication.
    is_refusal = code in _REFUSALS
    found = _LARGEST_BODY.search(text)
    largest = int(found[1]) if found else None
    topic = _TOPIC.search(text)

    def outcome(publication: InFlight) -> Outcome:
        exchange, key = (each.decode(errors="replace") for each in publication.route)
        # A permission for topics concerns some keys of an exchange, and others may be stored.
        is_named = topic is None or topic[1] == key
        if is_refusal and (
            alone
            or (is_named and f"exchange '{exchange or 'amq.default'}'" in text)
            or (largest is not None and len(publication.body) > largest)
        ):
            return Outcome.REFUSED
        return Outcome.UNKNOWN

    return outcome


def unknown(_: InFlight) -> Outcome:
    """Return `UNKNOWN`: the broker gave no answer."""
    return Outcome.UNKNOWN
