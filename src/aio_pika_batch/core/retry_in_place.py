"""Decides which messages of a failed batch are retried without leaving the consumer.

A message that is put back into a queue is overtaken by later ones. To keep the order of its key,
a failed message stays in the consumer, its retry count is raised in memory, and later messages of
its key wait. Laws:

- A REQUEUE or REQUEUE_IMMEDIATE of the handler is an attempt of that message.
- An exception, a timeout or an early end that leaves several messages undecided is an attempt of
  the first of them only. The others were not attempted, and keep their retry count. (All of them
  have the error of that run. Messages that failed alone, in runs of their own, have other errors.)
- Messages that isolation has left undecided, because one before them failed, were not attempted.
- A message without attempts left is dead-lettered as usual, and its key goes on.
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
    """The same delivery for its next attempt, with a retry count that is one higher.

    Args:
        failed: The delivery before the failure. Its headers can be decoded.
        now: When it failed.
    """

    __slots__ = ("_counted", "first_failed_at")

    def __init__(self, failed: Message, now: datetime) -> None:
        source, route, properties = failed._source, failed._route, failed._properties  # noqa: SLF001  -- of the base class
        tag, redelivered, body = failed.delivery_tag, failed.redelivered, failed.body
        super().__init__(source, tag, redelivered, body, route, properties)
        self._counted = {**failed.headers, source.retry_count_header: failed.retry_count + 1}
        self.first_failed_at = failed.first_failed_at or now

    @property
    def headers(self) -> Headers:
        """The headers, with the raised count."""
        return self._counted


@dataclass(frozen=True, slots=True)
class Attempt:
    """A message to handle again, alone, after `pause` seconds."""

    message: Message
    pause: float


@dataclass(slots=True)
class InPlaceDecision:
    """What to do with the messages of a batch that were not ACKed; each is in one of the lists.

    Attributes:
        final: Outcomes to settle.
        attempts: Messages to handle again, in this order, before all others of their key.
        not_attempted: Messages to handle as if they were new, after the attempts.
    """

    final: list[MessageOutcome] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    not_attempted: list[Message] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RetryInPlace:
    """Decides which messages stay in the consumer.

    Attributes:
        retry: How often a message can be retried.
        backoff: The pauses if no delay is configured. Without a pause, retries would be a busy
            loop.
        delay_steps: The delays that are configured, or that a handler asks for.
    """

    retry: RetryPolicy
    backoff: Backoff
    delay_steps: DelaySteps

    def decide(
        self,
        outcomes: Iterable[MessageOutcome],
        waiting: Iterable[Message] = (),
        *,
        now: datetime,
        jitter: float,
    ) -> InPlaceDecision:
        """Decide about the messages of one batch of one key.

        Args:
            outcomes: Those of the messages that were not ACKed, in any order.
            waiting: The messages that are still undecided, in any order.
            now: The time of day, for `x-first-failed-at`.
            jitter: A random number in [0, 1).
        """
        decision = InPlaceDecision()
        failures: set[int] = set()
        in_order: list[tuple[Message, MessageOutcome | None]] = [
            *((outcome.message, outcome) for outcome in outcomes),
            *((message, None) for message in waiting),
        ]
        in_order.sort(key=lambda each: each[0].delivery_tag)
        for message, outcome in in_order:
            if outcome is None:
                decision.not_attempted.append(message)
            elif not is_retry(outcome.result):
                decision.final.append(outcome)
            elif outcome.cause is Cause.HANDLER:
                self._retry(outcome, decision, now, jitter)
            elif id(outcome.error) in failures:
                decision.not_attempted.append(message)
            else:
                # The first undecided message is the one that failed, if the handler goes through
                # its batch in order. A bulk handler may so blame a wrong first message once, but a
                # message that always fails doesn't use up the attempts of others.
                failures.add(id(outcome.error))
                self._retry(outcome, decision, now, jitter)
        return decision

    def _retry(
        self, outcome: MessageOutcome, decision: InPlaceDecision, now: datetime, jitter: float
    ) -> None:
        message = outcome.message
        # Without readable headers its attempts cannot be counted.
        if not message.has_readable_headers or not self.retry.may_retry(message.retry_count):
            # REQUEUE_IMMEDIATE would make the broker retry it once more. It is counted here like
            # REQUEUE, because the broker, which counts it otherwise, isn't asked.
            is_immediate = outcome.result is MessageResult.REQUEUE_IMMEDIATE
            result = MessageResult.REQUEUE if is_immediate else outcome.result
            decision.final.append(replace(outcome, result=result))
            return
        # A handler that works out of order may have left out messages before this one.
        decision.attempts.extend(Attempt(each, 0.0) for each in decision.not_attempted)
        decision.not_attempted.clear()
        pause = self._pause(outcome.result, message.retry_count, jitter)
        decision.attempts.append(Attempt(Retried(message, now), pause))

    def _pause(self, result: Result, retries: int, jitter: float) -> float:
        if result is MessageResult.REQUEUE_IMMEDIATE:
            return 0.0
        seconds = result.seconds if isinstance(result, Requeue) else None
        level = self.delay_steps.level(seconds, retries)
        if level != NO_DELAY or seconds is not None:
            return level / 1000
        return self.backoff.long_pause(retries + 1, jitter)
