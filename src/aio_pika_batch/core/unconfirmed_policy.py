"""Decides what to do with an original whose copy is not confirmed.

The consumer holds the original unsettled, and publishes its copy again after growing pauses. The
broker may have stored a copy whose confirm is missing. A late confirm settles the original. Only if
none can come any more, another copy is published.

Laws:

- An original is held for `hold_seconds` at most, and at most `max_held` originals are held at a
  time. After that it is returned to the broker.
- An original that was returned often, or whose copy can't be published at all, is held for
  `longest` instead. One that its queue would drop because of its deliveries is not returned.
- Before an original is returned, it is held for a pause, or for its whole time if that is shorter.
  Otherwise the broker would deliver it again immediately, in a busy loop.
- A copy that may be stored is published again after a much longer pause than one that isn't.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

from aio_pika_batch.core.hold_policy import LONGEST_HOLD
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.retry import Backoff

AFTER_UNKNOWN = Backoff(30.0, 120.0)
"""Pauses before a copy is published again that may be stored, or can't be encoded."""

AFTER_SILENCE = Backoff(1.0, 30.0)
"""Pauses between single copies to a route from which no answer came."""

CHEAP_RETURNS = 2
"""How often an original is returned without hesitation: each return may count as a delivery."""

MOST_DOUBTS = 1000
"""How many routes are remembered that are in doubt: a routing key may be unique."""


@dataclass(frozen=True, slots=True)
class Pending:
    """An original whose copy is not confirmed.

    Attributes:
        since: When its copy first failed.
        failures: How often its copy has failed, at least once.
        unknown: How often it was unknown whether its copy is stored.
        outcome: That of the last attempt.
        deliveries: How often the original was delivered before; None if its queue doesn't count.
    """

    since: float
    failures: int
    unknown: int = 0
    outcome: Outcome = Outcome.REFUSED
    deliveries: int | None = None

    def after(self, outcome: Outcome) -> Pending:
        """The same original after another failed attempt."""
        return replace(
            self,
            failures=self.failures + 1,
            unknown=self.unknown + (outcome is Outcome.UNKNOWN),
            outcome=outcome,
        )


@dataclass(frozen=True, slots=True)
class Republish:
    """Publish the copy again at `at`."""

    at: float


@dataclass(frozen=True, slots=True)
class Return:
    """Return the original to the broker at `at`."""

    at: float


@dataclass(frozen=True, slots=True)
class UnconfirmedPolicy:
    """Decides how long an original is held.

    Attributes:
        hold_seconds: The maximum time since the first failure.
        max_held: The maximum number of originals at a time.
        backoff: The pauses between attempts that were refused or returned.
        longest: The maximum time for an original that should not be returned.
        delivery_limit: The number of deliveries after which the queue drops a message; None if it
            has no limit. A queue that doesn't count deliveries has none, either.
    """

    hold_seconds: float
    max_held: int
    backoff: Backoff
    longest: float = LONGEST_HOLD
    delivery_limit: int | None = None

    def is_kept(self, pending: Pending) -> bool:
        """Whether an original is held for longer than `hold_seconds`."""
        return pending.outcome is Outcome.UNPUBLISHABLE or (
            (pending.deliveries or 0) >= CHEAP_RETURNS
        )

    def next_step(
        self, pending: Pending, *, now: float, jitter: float, held: int
    ) -> Republish | Return:
        """Decide what to do after a failed attempt.

        Args:
            now: Seconds, by the clock of `Pending.since`.
            jitter: A random number in [0, 1).
            held: The number of originals that are held now, including this one.
        """
        # At least half of the longest pause, because full jitter can be almost 0: a busy loop.
        half = 0.5 + jitter / 2
        match pending.outcome:
            case Outcome.UNKNOWN:
                pause = AFTER_UNKNOWN.pause(pending.unknown, half)
            case Outcome.UNPUBLISHABLE:
                pause = AFTER_UNKNOWN.pause(pending.failures, half)
            case _:
                pause = self.backoff.pause(pending.failures, half)
        at = now + pause
        if not may_return(pending.deliveries, self.delivery_limit):
            return Republish(at)
        is_kept = self.is_kept(pending)
        seconds = max(self.hold_seconds, self.longest) if is_kept else self.hold_seconds
        end = max(now, pending.since + seconds)
        if (held > self.max_held and not is_kept) or at >= end:
            return Return(min(at, end))
        return Republish(at)


def may_return(deliveries: int | None, limit: int | None) -> bool:
    """Whether a queue keeps a message that is returned, and one more time after that.

    Args:
        deliveries: How often the message was delivered before; None if the queue doesn't count.
        limit: The queue's delivery limit; None if it has none.
    """
    return deliveries is None or limit is None or deliveries + 1 < limit


Route: TypeAlias = tuple[str, str]
"""An exchange and a routing key."""


@dataclass(slots=True)
class _Doubt:
    """A route from which an answer is missing.

    `listening` is the number of its copies that may still be confirmed.
    """

    failures: int = 0
    listening: int = 0
    is_trying: bool = False
    next_at: float = 0.0


@dataclass(slots=True)
class DoubtfulRoutes:
    """Decides which copies are sent, where earlier ones were not answered.

    Laws:

    - As long as a copy may still be confirmed, no other copy is sent to its route.
    - After that, one copy at a time is sent there, with growing pauses, until one is answered.
    """

    _doubts: dict[Route, _Doubt] = field(default_factory=dict)

    def admit(self, route: Route, now: float) -> bool:
        """Whether a copy may be sent. If so, tell what happens to it by another method."""
        doubt = self._doubts.get(route)
        if doubt is None:
            return True
        if doubt.listening or doubt.is_trying or now < doubt.next_at:
            return False
        doubt.is_trying = True
        return True

    def clear(self, route: Route) -> None:
        """The broker has answered: the route is in order."""
        self._doubts.pop(route, None)

    def release(self, route: Route) -> None:
        """A copy that was admitted was not sent."""
        doubt = self._doubts.get(route)
        if doubt is not None:
            doubt.is_trying = False

    def listen(self, route: Route) -> None:
        """A copy wasn't confirmed in time, but still may be."""
        doubt = self._doubt(route)
        doubt.is_trying = False
        doubt.listening += 1

    def fail(self, route: Route, *, now: float, jitter: float, was_listening: bool = False) -> None:
        """A copy can't be confirmed any more, or its refusal has closed the channel.

        Args:
            jitter: A random number in [0, 1).
            was_listening: Whether it is one for which `listen` was called.
        """
        doubt = self._doubt(route)
        doubt.is_trying = False
        doubt.listening = max(0, doubt.listening - was_listening)
        if now >= doubt.next_at:  # all that a lost connection leaves in doubt are one failure
            doubt.failures += 1
            doubt.next_at = now + AFTER_SILENCE.pause(doubt.failures, 0.5 + jitter / 2)

    def _doubt(self, route: Route) -> _Doubt:
        doubt = self._doubts.get(route)
        if doubt is None:
            if len(self._doubts) >= MOST_DOUBTS:
                del self._doubts[next(iter(self._doubts))]
            doubt = self._doubts[route] = _Doubt()
        return doubt
