"""What is decided about each message of a batch, run after run?

A run is one call of the handler. What it validly yielded is decided; what it left undecided gets
the result of its failure, or is run again: without a message that cannot be decoded, or in halves,
where culprits are to be isolated. Where a batch is atomic, a run that failed has acked nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import (
    Cause,
    ExceptionResults,
    MessageOutcome,
    MessageResult,
    Result,
    ResultCollector,
    is_retry,
    result_for,
)
from aio_pika_batch.errors import MessageDecodeError


@dataclass(frozen=True, slots=True)
class Part:
    """Messages that were in one run, and what that run failed of."""

    messages: Sequence[Message]
    error: BaseException


class Isolation:
    """What is to be run again, in the order of the batch.

    Args:
        limit: How many culprits are looked for. With 0 nothing is divided: who was in a run that
            failed is condemned.
    """

    __slots__ = ("_left", "_parts")

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._parts: list[Part] = []

    def __len__(self) -> int:
        """How many runs are due."""
        return len(self._parts)

    def again(self, part: Part) -> None:
        """Run these again next, undivided."""
        if part.messages:
            self._parts.append(part)

    def failed(self, run: Sequence[Message], rest: Part) -> list[Part]:
        """Decide what a failure means.

        Args:
            run: The messages of the run that failed.
            rest: Those that it left undecided.

        Returns:
            Who is condemned; everybody else of `rest` is run again.
        """
        if not self._left:
            return [rest]
        if len(run) > 1:
            # One that is left over of many has not failed alone yet; the others were in the same
            # transaction, say.
            middle = (len(rest.messages) + 1) // 2
            self.again(Part(rest.messages[middle:], rest.error))
            self.again(Part(rest.messages[:middle], rest.error))
            return []
        self._left -= 1
        return [rest] if self._left else [rest, *self.stop()]

    def next_run(self) -> Sequence[Message]:
        """Take the next part; empty if none is due."""
        return self._parts.pop().messages if self._parts else ()

    def stop(self) -> list[Part]:
        """Run nothing more; returns what was due."""
        parts, self._parts = self._parts[::-1], []
        return parts


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What becomes of messages that a handler left undecided.

    Attributes:
        action: For whatever `exceptions` does not list.
        exceptions: By the exception that left the handler.
        isolate: How many culprits are looked for by running halves; 0 condemns all undecided.
        is_atomic: Whether a failure voids the ACKs of its run, so that they are undecided again.
    """

    action: MessageResult
    exceptions: ExceptionResults
    isolate: int = 0
    is_atomic: bool = False


@dataclass(slots=True)
class BatchDecisions:
    """Messages, judged: each stands in exactly one of the three lists.

    Attributes:
        acked: The delivery tags of those that went well, in order.
        not_acked: All that were decided otherwise.
        returned: Those that a shutdown left undecided.
    """

    acked: list[int] = field(default_factory=list)
    not_acked: list[MessageOutcome] = field(default_factory=list)
    returned: list[Message] = field(default_factory=list)

    def __len__(self) -> int:
        """How many messages there are."""
        return len(self.acked) + len(self.not_acked) + len(self.returned)

    def add(self, other: BatchDecisions) -> None:
        """Take in what was decided about other messages."""
        self.acked += other.acked
        self.not_acked += other.not_acked
        self.returned += other.returned


class BatchRun(BatchDecisions):
    """One batch, until every message is decided. What is taken out meanwhile is not in it again.

    Args:
        keeps_failures: Whether what is to be tried again is not taken out meanwhile: it is tried
            again in place, and not before the handler is done.
    """

    __slots__ = ("_isolation", "_keeps_failures", "_policy")

    def __init__(self, policy: FailurePolicy, *, keeps_failures: bool = False) -> None:
        super().__init__()
        self._policy = policy
        self._keeps_failures = keeps_failures
        # Nearly every batch is done after one run.
        self._isolation: Isolation | None = None

    @property
    def is_over(self) -> bool:
        """Whether no further run is due."""
        return not self._isolation

    def next_run(self) -> Sequence[Message]:
        """The messages to run next; empty if none are."""
        return () if self._isolation is None else self._isolation.next_run()

    def take(self, collector: ResultCollector) -> BatchDecisions:
        """Hand out what is decided so far, in this run and in those before it."""
        self._note(collector.take())
        kept: list[MessageOutcome] = []
        final = self.not_acked
        if self._keeps_failures:
            kept = [each for each in self.not_acked if is_retry(each.result)]
            final = [each for each in self.not_acked if not is_retry(each.result)]
        taken = BatchDecisions(self.acked, final)
        self.acked, self.not_acked = [], kept
        return taken

    def record_run(
        self, collector: ResultCollector, error: BaseException | None, cause: Cause
    ) -> bool:
        """Enter a run that is over.

        Args:
            error: What went wrong; None only if every message of the run has its result.
            cause: On whose account are the undecided.

        Returns:
            Whether its failure is nobody's yet: what it left undecided is run again in halves.
        """
        if error is None:
            self._note(collector.take())
            return False
        undecided = self._undecided(collector)
        if cause is Cause.SHUTDOWN:
            self.returned += undecided
            return False
        if self._isolation is None:
            self._isolation = Isolation(self._policy.isolate)
        if isinstance(error, MessageDecodeError):
            others = [message for message in undecided if message is not error.message]
            if len(others) < len(undecided):
                [culprit] = [message for message in undecided if message is error.message]
                self.not_acked.append(
                    MessageOutcome(culprit, MessageResult.NACK, Cause.UNDECODABLE, error)
                )
                self._isolation.again(Part(others, error))
                return False
        if cause is Cause.EXCEPTION and undecided:
            condemned = self._isolation.failed(collector.messages, Part(undecided, error))
            for part in condemned:
                self._condemn(part.messages, part.error, cause)
            return not condemned
        self._condemn(undecided, error, cause)
        return False

    def stop(self, error: BaseException, cause: Cause) -> None:
        """Run nothing more: the handler was cut off, and whatever is still due shares its fate."""
        if self._isolation is not None:
            for part in self._isolation.stop():
                if cause is Cause.SHUTDOWN:
                    self.returned += part.messages
                else:
                    self._condemn(part.messages, error, cause)

    def _undecided(self, collector: ResultCollector) -> Sequence[Message]:
        """What a run that failed has not decided; the rest is entered."""
        decided = collector.take()
        if not self._policy.is_atomic:
            self._note(decided)
            return collector.undecided()
        stays = [pair for pair in decided if pair[1] is not MessageResult.ACK]
        self._note(stays)
        known = {id(message) for message, _ in stays}
        return [message for message in collector.messages if id(message) not in known]

    def _note(self, decided: Sequence[tuple[Message, Result]]) -> None:
        for message, result in decided:
            if result is MessageResult.ACK:
                self.acked.append(message.delivery_tag)
            else:
                self.not_acked.append(MessageOutcome(message, result))

    def _condemn(self, messages: Sequence[Message], error: BaseException, cause: Cause) -> None:
        result = self._policy.action
        if cause in (Cause.EXCEPTION, Cause.TIMEOUT):
            result = result_for(error, self._policy.exceptions) or result
        self.not_acked += [MessageOutcome(message, result, cause, error) for message in messages]
