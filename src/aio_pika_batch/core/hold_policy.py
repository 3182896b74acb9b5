"""Decides how long the consumer holds messages, unsettled: until a retry, or a late confirm.

A failed message is held before its retry is published. It takes up prefetch, so an outage slows the
intake down instead of using up attempts.

If a copy isn't confirmed, its original is held, and the copy is published again after growing
pauses. The broker may have stored a copy whose confirm is missing. A late confirm settles the
original. Only if none can come any more, another copy is published.

Laws:

- A hold ends by itself: none is longer than `longest` seconds. A longer delay goes on after a copy
  that doesn't count as an attempt.
- Messages that fail again and again can't starve the others: while messages succeed, the held ones
  take at most half of the prefetch window; beyond that the one that has been held longest is
  published early, at most one per second for each message above half.
- An original is held for `hold_seconds` at most, and at most `max_held` originals are held at a
  time. After that it is returned to the broker.
- An original that was returned often, or whose copy can't be published at all, is held for
  `longest` instead. One that its queue would drop because of its deliveries is not returned.
- Before an original is returned, it is held for a pause, or for its whole time if that is shorter.
  Otherwise the broker would deliver it again immediately, in a busy loop.
- A copy that may be stored is published again after a much longer pause than one that isn't.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.retry import Backoff

LONGEST_DEFAULT = 30.0
"""The longest delay in seconds if `requeue_delay` isn't set: 1, 2, 4, … up to this."""

LONGEST_HOLD = 600.0
"""Seconds that a message is held at most, and never longer than a third of the consumer timeout."""

SUCCESS_WINDOW = 30.0
"""Seconds for which one ACK means that messages succeed."""

RELEASE_INTERVAL = 1.0
"""Seconds between two retries that are published early, if one more than half are held.

With several above half it is shorter accordingly. Among p messages that always fail, and r early
releases per second, the others wait for about p / r seconds: one per second would be too few.
"""


def longest_hold(consumer_timeout: float) -> float:
    """Return how long a message may be held on a broker with this consumer timeout, in seconds."""
    return min(LONGEST_HOLD, consumer_timeout / 3)


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """How long failed messages are held.

    Attributes:
        by_default: Whether a retry without a delay of its own is held (`requeue_delay` isn't set).
        longest: No hold is longer, in seconds.
        longest_undeliverable: The longest delay of messages that failed for good and can't be
            dead-lettered, in seconds.
    """

    by_default: bool = False
    longest: float = LONGEST_HOLD
    longest_undeliverable: float = 300.0

    def retry_delay(self, retries: int) -> float:
        """The delay in seconds of a message that was retried so often, if none is configured."""
        return min(LONGEST_DEFAULT, 2.0 ** min(retries, 30)) if self.by_default else 0.0

    def undeliverable_delay(self, failures: int) -> float:
        """The delay in seconds of a message that can't be dead-lettered, from 1 s on."""
        return min(self.longest, self.longest_undeliverable, 2.0 ** min(failures, 30))


def early_release_at(
    *, held: int, limit: int, last_success: float, last_release: float, now: float
) -> float | None:
    """Return when the retry that has been held longest is published although it isn't due yet.

    Args:
        held: How many retries are held.
        limit: How many may be held while messages succeed.
        last_success: When a message last succeeded.
        last_release: When a retry was last published early.

    Returns:
        None if none has to be.
    """
    if held <= limit or now - last_success > SUCCESS_WINDOW:
        return None
    return max(now, last_release + RELEASE_INTERVAL / (held - limit))


NEVER = -math.inf
"""The time of something that hasn't happened."""

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
        match pending.outcome:
            case Outcome.UNKNOWN:
                pause = AFTER_UNKNOWN.long_pause(pending.unknown, jitter)
            case Outcome.UNPUBLISHABLE:
                pause = AFTER_UNKNOWN.long_pause(pending.failures, jitter)
            case _:
                pause = self.backoff.long_pause(pending.failures, jitter)
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

    def __len__(self) -> int:
        """The number of routes in doubt."""
        return len(self._doubts)

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
            doubt.next_at = now + AFTER_SILENCE.long_pause(doubt.failures, jitter)

    def _doubt(self, route: Route) -> _Doubt:
        doubt = self._doubts.get(route)
        if doubt is None:
            if len(self._doubts) >= MOST_DOUBTS:
                del self._doubts[next(iter(self._doubts))]
            doubt = self._doubts[route] = _Doubt()
        return doubt
