"""Which messages of a batch are tried again where they are, so that their key keeps its order?

Anything that is put back into a queue is overtaken. So a message that failed is kept, its retry
count is raised in memory, and what comes after it waits. Three ways of failing:

- The handler said so, by REQUEUE or REQUEUE_IMMEDIATE: this message failed.
- One run of the handler left several undecided, by an exception, a time-out or an early end: the
  first of them failed, as far as anybody knows; the others were not reached, and cost no attempt.
  (They share the run's error; culprits that stood alone in runs of their own do not.)
- All attempts are spent: the message is dead-lettered as ever, and its key goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime

from aio_pika_batch.core.message import Headers, Message
from aio_pika_batch.core.results import (
    Cause,
    MessageOutcome,
    MessageResult,
    Requeue,
    Result,
    is_retry,
)
from aio_pika_batch.core.retry import NO_DELAY, Backoff, DelaySteps, RetryPolicy


class Retried(Message):
    """A delivery for its next attempt: its retry count is one higher, here in memory.

    Args:
        failed: The same delivery as it was; its headers can be decoded.
        now: When it failed.
    """

    __slots__ = ("_counted", "first_failed_at")

    def __init__(self, failed: Message, now: datetime) -> None:
        source, route, properties = failed._source, failed._route, failed._properties  # noqa: SLF001  -- a message, too
        tag, redelivered, body = failed.delivery_tag, failed.redelivered, failed.body
        super().__init__(source, tag, redelivered, body, route, properties)
        self._counted = {**failed.headers, source.retry_count_header: failed.retry_count + 1}
        self.first_failed_at = failed.first_failed_at or now

    @property
    def headers(self) -> Headers:
        """The headers, and the count."""
        return self._counted


@dataclass(frozen=True, slots=True)
class Attempt:
    """A message to be handled again, alone, once `pause` seconds are over."""

    message: Message
    pause: float


@dataclass(slots=True)
class InPlaceDecision:
    """What becomes of the messages of a batch that were not ACKed; each stands in one list.

    Attributes:
        final: To be carried out.
        attempts: To be handled again, in this order, before anything else of their key.
        unreached: Not tried yet, whatever the handler's end meant for them; after the attempts.
    """

    final: list[MessageOutcome] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    not_attempted: list[Message] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RetryInPlace:
    """Decides which messages are kept.

    Attributes:
        retry: How often a message may be tried again.
        backoff: The pauses before, where the delay_steps has none: at once would be a hot loop.
        delay_steps: The waits that are configured, or that a handler asks for.
    """

    retry: RetryPolicy
    backoff: Backoff
    delay_steps: DelaySteps

    def decide(
        self, outcomes: Iterable[MessageOutcome], *, now: datetime, jitter: float
    ) -> InPlaceDecision:
        """Decide about the messages of one batch of one key.

        Args:
            outcomes: Of those that were not ACKed, in any order.
            now: The time of day, for `x-first-failed-at`.
            jitter: A random number in [0, 1).
        """
        found = InPlaceDecision()
        failures: set[int] = set()
        for outcome in sorted(outcomes, key=lambda each: each.message.delivery_tag):
            if not is_retry(outcome.result):
                found.final.append(outcome)
            elif outcome.cause is Cause.HANDLER:
                self._again(outcome, found, now, jitter)
            elif id(outcome.error) in failures:
                found.not_attempted.append(outcome.message)
            else:
                failures.add(id(outcome.error))
                self._again(outcome, found, now, jitter)
        return found

    def _again(
        self, outcome: MessageOutcome, found: InPlaceDecision, now: datetime, jitter: float
    ) -> None:
        message = outcome.message
        # Without headers nobody can count its attempts.
        if not message.has_readable_headers or not self.retry.may_retry(message.retry_count):
            # No broker shall try again what is spent here.
            is_immediate = outcome.result is MessageResult.REQUEUE_IMMEDIATE
            result = MessageResult.REQUEUE if is_immediate else outcome.result
            found.final.append(replace(outcome, result=result))
            return
        # A handler that works out of order may have passed over some that come before.
        found.attempts.extend(Attempt(each, 0.0) for each in found.not_attempted)
        found.not_attempted.clear()
        pause = self._pause(outcome.result, message.retry_count, jitter)
        found.attempts.append(Attempt(Retried(message, now), pause))

    def _pause(self, result: Result, retries: int, jitter: float) -> float:
        if result is MessageResult.REQUEUE_IMMEDIATE:
            return 0.0
        level = self.delay_steps.level(result, retries)
        if level != NO_DELAY or (isinstance(result, Requeue) and result.seconds is not None):
            return level / 1000
        # At least half of the longest pause: full jitter may come out at nothing.
        return self.backoff.pause(retries + 1, 0.5 + jitter / 2)
