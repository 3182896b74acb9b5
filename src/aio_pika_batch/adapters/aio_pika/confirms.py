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
    from collections.abc import Callable, Mapping, Sequence

    from aio_pika_batch.adapters.aio_pika.events import (
        ChannelClosed,
        Confirm,
        ReturnedPublication,
    )
    from aio_pika_batch.core.publication import Outgoing

Route = tuple[bytes, bytes]
Target = tuple[bytes, Route]
"""Where a publication goes: its method frame, and the same as a route."""

_REFUSALS = {ReplyCode.ACCESS_REFUSED, ReplyCode.NOT_FOUND, ReplyCode.PRECONDITION_FAILED}
_TOPIC = re.compile(r"access to topic '(.*)' in exchange '")
_LARGEST_BODY = re.compile(r"configured max size (\d+)")


class PublishCall:
    """One call of `publish`: what it sends, and the outcomes that it waits for.

    The lists have an entry for each publication that is sent.

    Attributes:
        unsent: Where the others were in the call, which can't be encoded.
        late: Gets the index and the outcome of each publication that is answered from now on; None
            as long as the call waits.
    """

    # Lists, and not an object for each publication: a relay publishes thousands at a time.
    __slots__ = (
        "bodies",
        "done",
        "late",
        "missing",
        "outcomes",
        "properties",
        "sent",
        "targets",
        "unsent",
    )

    def __init__(
        self,
        sent: Sequence[Outgoing],
        targets: list[Target],
        properties: list[bytes],
        unsent: list[int],
        done: Callable[[], None],
    ) -> None:
        self.sent = sent
        self.targets = targets
        self.properties = properties
        self.bodies = [each.body for each in sent]
        self.unsent = unsent
        self.missing = len(sent)
        self.outcomes: list[Outcome | None] = [None] * self.missing
        self.done = done
        self.late: Callable[[int, Outcome], None] | None = None

    def results(self) -> list[Outcome]:
        """Return the outcomes of all publications of the call."""
        found = [outcome or Outcome.UNKNOWN for outcome in self.outcomes]
        for index in self.unsent:
            found.insert(index, Outcome.UNPUBLISHABLE)
        return found

    def settle(self, index: int, outcome: Outcome) -> None:
        """Set the outcome of a publication, unless it has one."""
        if self.outcomes[index] is None:
            self.outcomes[index] = outcome
            self.missing -= 1
            if self.late is not None:
                self.late(index, outcome)
            elif not self.missing:
                self.done()

    def settle_range(self, start: int, stop: int, outcome: Outcome) -> None:
        """Set the outcome of consecutive publications, none of which has one."""
        if self.late is None:
            self.outcomes[start:stop] = [outcome] * (stop - start)
            self.missing -= stop - start
            if not self.missing:
                self.done()
        else:
            for index in range(start, stop):
                self.settle(index, outcome)


class SentGroup:
    """Publications of one call that were sent together, and have consecutive numbers.

    Attributes:
        offset: The number of a publication, less its index in the call.
        stop: The number after the last one.
    """

    __slots__ = ("call", "offset", "stop")

    def __init__(self, call: PublishCall, offset: int, stop: int) -> None:
        self.call = call
        self.offset = offset
        self.stop = stop


class ConfirmTracker:
    """The publications of one channel that the broker has not answered."""

    def __init__(self) -> None:
        self._last = 0
        self._oldest = 1
        self._open: dict[int, SentGroup] = {}
        self._returned: set[int] = set()
        # By route, so that a returned publication is compared with few, and without those that are
        # marked as returned. Kept from the first returned publication until nothing is open.
        self._routes: dict[Route, dict[int, SentGroup]] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def track(self, call: PublishCall, start: int, stop: int) -> int:
        """Add publications of a call, by their indexes.

        The broker numbers publications from 1 in the order of sending, and so do we.

        Returns:
            The number of the first one.
        """
        first = self._last + 1
        self._last += stop - start
        added = dict.fromkeys(
            range(first, self._last + 1), SentGroup(call, first - start, self._last + 1)
        )
        self._open.update(added)
        if self._routes is not None:
            self._add_routes(added)
        return first

    def _add_routes(self, added: Mapping[int, SentGroup]) -> None:
        routes = self._routes = self._routes or {}
        for number, group in added.items():
            _, route = group.call.targets[number - group.offset]
            routes.setdefault(route, {})[number] = group

    def settle(self, number: int, outcome: Outcome) -> None:
        """Set the outcome of a publication; `RETURNED` if it was marked as returned."""
        group = self._open.pop(number, None)
        if group is None:
            return
        index = number - group.offset
        if number in self._returned:
            self._returned.remove(number)
            outcome = Outcome.RETURNED
        elif self._routes is not None:
            _, route = group.call.targets[index]
            del self._routes[route][number]
        if not self._open:
            self._routes = None
        group.call.settle(index, outcome)

    def confirm(self, confirm: Confirm) -> None:
        """Settle one publication, or all up to it."""
        outcome = Outcome.CONFIRMED if confirm.accepted else Outcome.REFUSED
        if confirm.multiple:
            # Each number is visited once in the life of the channel, however many confirms come.
            # The broker may name any number, but cannot confirm what was not sent.
            last = min(confirm.tag, self._last)
            if self._routes is None:
                self._settle_range(self._oldest, last + 1, outcome)
            else:
                for number in range(self._oldest, last + 1):
                    self.settle(number, outcome)
            self._oldest = max(self._oldest, last + 1)
        else:
            self.settle(confirm.tag, outcome)

    def _settle_range(self, number: int, end: int, outcome: Outcome) -> None:
        """Settle all that are open from a number on. The common case: nothing was returned."""
        take = self._open.pop
        while number < end:
            group = self._open.get(number)
            if group is None:
                number += 1
                continue
            stop, offset, call = min(group.stop, end), group.offset, group.call
            settled = [each for each in range(number, stop) if take(each, None) is not None]
            if len(settled) == stop - number:
                call.settle_range(number - offset, stop - offset, outcome)
            else:
                for each in settled:
                    call.settle(each - offset, outcome)
            number = stop

    def mark_returned(self, returned: ReturnedPublication) -> None:
        """Mark a publication as returned. Its confirm is still to come."""
        if self._routes is None:
            self._add_routes(self._open)
        routes = self._routes or {}
        route = routes.get((returned.exchange, returned.routing_key), {})
        for number in _matching(route, returned):
            del route[number]
            self._returned.add(number)

    def end(self, outcome: Callable[[Route, bytes], Outcome]) -> None:
        """Settle all open publications: the channel has ended.

        Args:
            outcome: Returns the outcome by route and body.
        """
        publications, self._open = self._open, {}
        returned, self._returned = self._returned, set()
        self._routes = None
        for number, group in publications.items():
            call, index = group.call, number - group.offset
            _, route = call.targets[index]
            is_returned = number in returned
            found = Outcome.RETURNED if is_returned else outcome(route, call.bodies[index])
            call.settle(index, found)


def _matching(route: Mapping[int, SentGroup], returned: ReturnedPublication) -> list[int]:
    """Return the numbers of the publications that it may be: one, if one matches."""
    # First by the bytes, which is cheap and nearly always finds it.
    for number, group in route.items():
        call, index = group.call, number - group.offset
        if call.properties[index] == returned.properties and call.bodies[index] == returned.body:
            return [number]
    # Then by their meaning: some brokers encode the header table again, with sorted keys.
    properties = decode(returned.properties)
    for number, group in route.items():
        call, index = group.call, number - group.offset
        if call.bodies[index] == returned.body and decode(call.properties[index]) == properties:
            return [number]
    return list(route)


def outcome_after_close(closed: ChannelClosed, *, alone: bool) -> Callable[[Route, bytes], Outcome]:
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

    def outcome(route: Route, body: bytes) -> Outcome:
        exchange, key = (each.decode(errors="replace") for each in route)
        # A permission for topics concerns some keys of an exchange, and others may be stored.
        is_named = topic is None or topic[1] == key
        if is_refusal and (
            alone
            or (is_named and f"exchange '{exchange or 'amq.default'}'" in text)
            or (largest is not None and len(body) > largest)
        ):
            return Outcome.REFUSED
        return Outcome.UNKNOWN

    return outcome


def unknown(_route: Route, _body: bytes) -> Outcome:
    """Return `UNKNOWN`: the broker gave no answer."""
    return Outcome.UNKNOWN
