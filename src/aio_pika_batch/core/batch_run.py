"""Decides the outcome of each message of a batch, over one or more runs of the handler.

The i-th result that a handler yields belongs to the i-th message. A handler that works out of order
yields pairs of `(message, result)` instead. One batch can use only one of the two forms.

A message that got a valid result in a run is decided. Messages without a result get the result of
the failure, or are run again: without a message that cannot be decoded, or in halves, to find the
messages that make the handler fail. A handler that writes all its messages in one transaction fails
as a whole, so each half that fails is divided again, until a message fails alone.

Laws:

- A message without a result is never acknowledged.
- An invalid result changes nothing that was decided before it.
- A message is blamed only if it failed in a run of its own.
- k bad messages among n are found in at most 1 + 2k⌈log₂ n⌉ runs.
- After the last bad message that the policy searches for, nothing is run again: the messages that
  are still undecided get the result of the failure that they were last part of.
- A failed run of an atomic batch has acked nothing.
- If the order of a key is kept, nothing is run again before a message that will be retried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import is_
from typing import cast

from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import (
    Cause,
    ExceptionResults,
    MessageOutcome,
    MessageResult,
    Nack,
    Requeue,
    Result,
    describe,
    is_retry,
    result_for,
)
from aio_pika_batch.errors import MessageDecodeError, MissingMessageId, ResultError

_RESULT_TYPES = frozenset({MessageResult, Nack, Requeue})


class ResultCollector:
    """Collects the results that a handler yields for one batch, and refuses invalid ones.

    Attributes:
        given: The list for the handler, which may change it.
    """

    __slots__ = (
        "_by_position",
        "_index",
        "_is_misplaced",
        "_missing",
        "_pairs",
        "_taken",
        "given",
        "messages",
    )

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages
        self.given = list(messages)
        self._is_misplaced = False
        self._by_position: list[Result] = []
        self._missing = len(messages)
        self._pairs: dict[int, Result] = {}
        self._index: dict[int, int] | None = None
        self._taken = 0

    def accept(self, item: object) -> None:
        """Take the next yielded item.

        Raises:
            ResultError: It isn't a result, it is one too many, it is for a message of another batch
                or for the same message again, or it mixes the two forms.
        """
        if self._missing and not self._pairs and type(item) in _RESULT_TYPES:
            # The common case, which occurs once for each message: even `cast` would be felt.
            self._by_position.append(item)  # type: ignore[arg-type]  # it is a Result
            self._missing -= 1
            return
        match item:
            case MessageResult() | Nack() | Requeue():
                self._accept_next(item)
            case (Message() as message, MessageResult() | Nack() | Requeue() as result):
                self._accept_pair(message, result)
            case _:
                raise ResultError(
                    f"{describe(item)} is not a result: yield a MessageResult, Nack(…) or"
                    " Requeue(…) for each message in turn, or (message, result)"
                )

    def accept_all(self, items: Sequence[object]) -> None:
        """Take items that come together. Raises as `accept` does."""
        is_whole = 1 < len(items) == self._missing and not self._pairs
        if is_whole and set(map(type, items)) == {MessageResult}:
            # The common case, without a call for each item.
            self._by_position += cast("Sequence[Result]", items)
            self._missing = 0
        else:
            for item in items:
                self.accept(item)

    def drop_misplaced(self) -> bool:
        """Drop results by position that weren't taken, if the handler has changed its list.

        After `messages.pop()` or `messages.sort()` it is unknown whose result comes next.

        Returns:
            Whether that was so.
        """
        is_changed = len(self.given) != len(self.messages) or not all(
            map(is_, self.messages, self.given)
        )
        if is_changed and self._by_position:
            self._is_misplaced = True
            self._missing += len(self._by_position) - self._taken
            del self._by_position[self._taken :]
        return self._is_misplaced

    def _accept_next(self, result: Result) -> None:
        if self._pairs:
            raise ResultError(
                f"{result!r} was yielded without its message after (message, result):"
                " use one of the two forms for the whole batch"
            )
        if not self._missing:
            count = len(self.messages)
            found = f"result {count + 1}, {result!r}, for a batch of {count}"
            raise ResultError(f"{found}: yield one for each message")
        self._by_position.append(result)
        self._missing -= 1

    def _accept_pair(self, message: Message, result: Result) -> None:
        if self._by_position:
            raise ResultError(
                f"({message!r}, {result!r}) was yielded after a result without its message:"
                " use one of the two forms for the whole batch"
            )
        # By identity: a message of another batch can be equal to one of this batch.
        if self._index is None:
            self._index = {id(each): at for at, each in enumerate(self.messages)}
        at = self._index.get(id(message))
        if at is None:
            msg = f"{message!r} is not in this batch: yield results for the messages of the batch"
            raise ResultError(msg)
        if at in self._pairs:
            found = f"a second result, {result!r}, for {message!r}"
            raise ResultError(
                f"{found}: the first one, {self._pairs[at]!r}, is used; yield one for each message"
            )
        self._pairs[at] = result

    @property
    def count(self) -> int:
        """The number of messages that have a result."""
        return len(self._by_position) or len(self._pairs)

    @property
    def all_acked(self) -> bool:
        """Whether every message got an ACK by position, and none of them has been taken.

        A fast check for the common case.
        """
        return (
            not self._missing
            and not self._taken
            and self._by_position.count(MessageResult.ACK) == len(self.messages)
        )

    def decided(self) -> list[tuple[Message, Result]]:
        """The messages with a result, in the order of the batch."""
        if self._pairs:
            return [(self.messages[at], self._pairs[at]) for at in sorted(self._pairs)]
        return list(zip(self.messages, self._by_position, strict=False))

    def take(self) -> list[tuple[Message, Result]]:
        """The messages that got a result since the last call, in the order of the batch.

        :meth:`decided` still returns them.
        """
        self.drop_misplaced()
        taken, self._taken = self._taken, self.count
        if self._pairs:
            fresh = sorted(islice(self._pairs, taken, None))
            return [(self.messages[at], self._pairs[at]) for at in fresh]
        if not taken:
            return self.decided()
        return list(zip(self.messages[taken:], self._by_position[taken:], strict=False))

    def undecided(self) -> list[Message]:
        """The messages without a result, in the order of the batch."""
        if self._pairs:
            return [each for at, each in enumerate(self.messages) if at not in self._pairs]
        return list(self.messages[len(self._by_position) :])


@dataclass(frozen=True, slots=True)
class Part:
    """Messages that one run left undecided, and the error of that run."""

    messages: Sequence[Message]
    error: BaseException


class Bisection:
    """The parts of a failed batch to run again, in the order of the batch.

    Args:
        limit: How many bad messages to search for. With 0, nothing is divided, and all undecided
            messages of a failed run are blamed.
    """

    __slots__ = ("_left", "_parts")

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._parts: list[Part] = []

    def __len__(self) -> int:
        """The number of runs that are due."""
        return len(self._parts)

    def run_again(self, part: Part) -> None:
        """Run this part next, undivided."""
        if part.messages:
            self._parts.append(part)

    def bisect(self, run: Sequence[Message], rest: Part) -> list[Part]:
        """Divide what a failed run left undecided.

        Args:
            run: The messages of the run.
            rest: Those that it left undecided.

        Returns:
            The parts that are blamed. The other messages of `rest` are run again.
        """
        if not self._left:
            return [rest]
        # Inference could save runs: if one half succeeds, the bad message must be in the other one.
        # But some failures pass (a deadlock, a lost connection), and inference would then blame a
        # good message. For the same reason the last undecided message of a larger run runs alone.
        if len(run) > 1:
            middle = (len(rest.messages) + 1) // 2
            self.run_again(Part(rest.messages[middle:], rest.error))
            self.run_again(Part(rest.messages[:middle], rest.error))
            return []
        self._left -= 1
        return [rest] if self._left else [rest, *self.stop()]

    def next_run(self) -> Sequence[Message]:
        """Take the next part; empty if no run is due."""
        return self._parts.pop().messages if self._parts else ()

    def stop(self) -> list[Part]:
        """Run nothing more, and return the parts that were due."""
        parts, self._parts = self._parts[::-1], []
        return parts


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """The results of messages that a handler left undecided.

    Attributes:
        action: The result if `exceptions` doesn't list the error.
        exceptions: Results by the exception that the handler raised.
        isolate: How many bad messages to search for by running halves; 0 blames all undecided ones.
        is_atomic: Whether a failure voids the ACKs of its run, so that their messages are undecided
            again.
    """

    action: MessageResult
    exceptions: ExceptionResults
    isolate: int = 0
    is_atomic: bool = False

    def result(self, error: BaseException, cause: Cause) -> Result:
        """Return the result of messages that are undecided because of this error."""
        if cause in (Cause.EXCEPTION, Cause.TIMEOUT):
            return result_for(error, self.exceptions) or self.action
        return self.action


@dataclass(slots=True)
class BatchDecisions:
    """Messages that are decided; each is in exactly one of the lists.

    Attributes:
        acked: The delivery tags of the messages that succeeded, in order.
        not_acked: The outcomes of all others.
        returned: The messages that a shutdown left undecided.
        waiting: The messages to handle after those of their key that will be retried in place.
    """

    acked: list[int] = field(default_factory=list)
    not_acked: list[MessageOutcome] = field(default_factory=list)
    returned: list[Message] = field(default_factory=list)
    waiting: list[Message] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of messages."""
        return len(self.acked) + len(self.not_acked) + len(self.returned) + len(self.waiting)

    def add(self, other: BatchDecisions) -> None:
        """Add the decisions about other messages."""
        self.acked += other.acked
        self.not_acked += other.not_acked
        self.returned += other.returned
        self.waiting += other.waiting


class BatchRun(BatchDecisions):
    """One batch, until every message is decided. Messages that :meth:`take` returned are removed.

    Args:
        keeps_failures: Whether messages to retry stay in the consumer, to keep the order of their
            key. Their retries begin when the handler has finished, so `take` leaves them out.

    Attributes:
        is_atomic: Whether a failure voids the ACKs of its run. The policy says so at first.
    """

    __slots__ = ("_bisection", "_committed", "_keeps_failures", "_policy", "is_atomic")

    def __init__(self, policy: FailurePolicy, *, keeps_failures: bool = False) -> None:
        # Not by the dataclass's constructor: one is created for each batch.
        self.acked = []
        self.not_acked = []
        self.returned = []
        self.waiting = []
        self._policy = policy
        self._committed: list[tuple[Sequence[Message], Sequence[Result]]] = []
        self.is_atomic = policy.is_atomic
        self._keeps_failures = keeps_failures
        # Created by the first failure: almost every batch is decided after one run.
        self._bisection: Bisection | None = None

    @property
    def is_over(self) -> bool:
        """Whether no further run is due."""
        return not self._bisection

    def next_run(self) -> Sequence[Message]:
        """The messages to run next; empty if no run is due."""
        return () if self._bisection is None else self._bisection.next_run()

    def take(self, collector: ResultCollector) -> BatchDecisions:
        """Take out what has been decided so far, in this run and in earlier ones."""
        self._add_results(collector.take())
        kept: list[MessageOutcome] = []
        final = self.not_acked
        if self._keeps_failures:
            kept = [each for each in self.not_acked if is_retry(each.result)]
            final = [each for each in self.not_acked if not is_retry(each.result)]
        taken = BatchDecisions(self.acked, final)
        self.acked, self.not_acked = [], kept
        return taken

    def commit(self, messages: Sequence[Message], results: Sequence[Result]) -> None:
        """Take the results of a committed transaction, which a failure of the run can't change.

        They count for the messages that the handler leaves undecided.
        """
        # Copies, because the handler may change its lists. They are read only after a failure.
        self._committed.append((tuple(messages), tuple(results)))

    def record_run(
        self, collector: ResultCollector, error: BaseException | None, cause: Cause
    ) -> bool:
        """Record a run that has ended.

        Args:
            error: The failure; None only if every message of the run has a result.
            cause: Why messages are undecided.

        Returns:
            Whether no message is blamed for a failure yet, because the undecided ones will be run
            again in halves.
        """
        if error is None:
            self._add_results(collector.take())
            is_bisected = False
        else:
            is_bisected = self._record_failure(collector, error, cause)
        self._hold_back()
        return is_bisected

    def _record_failure(
        self, collector: ResultCollector, error: BaseException, cause: Cause
    ) -> bool:
        undecided = self._undecided(collector)
        if cause is Cause.SHUTDOWN:
            self.returned += undecided
            return False
        if self._bisection is None:
            self._bisection = Bisection(self._policy.isolate)
        # The error names the bad messages, so no search is needed. If they already have results, or
        # belong to another batch, this is a failure like others.
        bad = self._named_by(error, undecided)
        if bad:
            if isinstance(error, MessageDecodeError):
                found = _undecodable(undecided, error)
                bad = [message for message, _ in found]
                nack, cause = MessageResult.NACK, Cause.UNDECODABLE
                self.not_acked += [MessageOutcome(each, nack, cause, why) for each, why in found]
            else:
                self._fail(bad, error, cause)
            ids = set(map(id, bad))
            others = [message for message in undecided if id(message) not in ids]
            self._bisection.run_again(Part(others, error))
            return False
        if cause is Cause.EXCEPTION and undecided:
            blamed = self._bisection.bisect(collector.messages, Part(undecided, error))
            for part in blamed:
                self._fail(part.messages, part.error, cause)
            return not blamed
        self._fail(undecided, error, cause)
        return False

    def stop(self, error: BaseException, cause: Cause) -> None:
        """Run nothing more, because the handler was cut off; this decides what is still due."""
        if self._bisection is not None:
            for part in self._bisection.stop():
                if cause is Cause.SHUTDOWN:
                    self.returned += part.messages
                else:
                    # A timeout concerns all messages. A good message should not be dead-lettered
                    # because the exception of another one is mapped to NACK.
                    self._fail(part.messages, error, cause)

    def _hold_back(self) -> None:
        """Run nothing again before a message of the key that will be retried.

        A handler may have yielded REQUEUE before its exception. Without this, the other messages,
        which are run again at once, would overtake that one.
        """
        if (
            self._bisection
            and self._keeps_failures
            and any(is_retry(each.result) for each in self.not_acked)
        ):
            for part in self._bisection.stop():
                self.waiting += part.messages

    @staticmethod
    def _named_by(error: BaseException, undecided: Sequence[Message]) -> Sequence[Message]:
        """Return the messages that an error blames itself."""
        match error:
            case MessageDecodeError():
                ids = {id(error.message)}
            case MissingMessageId():
                ids = set(map(id, error.messages))
            case _:
                return ()
        return [message for message in undecided if id(message) in ids]

    def _undecided(self, collector: ResultCollector) -> Sequence[Message]:
        """Record the results of a failed run, and return the messages without one."""
        decided = collector.take()
        undecided: Sequence[Message] = collector.undecided()
        if self.is_atomic:
            # NACK and REQUEUE claim no effect that a rollback could undo, so they stay.
            decided = [pair for pair in decided if pair[1] is not MessageResult.ACK]
            known = {id(message) for message, _ in decided}
            undecided = [message for message in collector.messages if id(message) not in known]
        if self._committed:
            committed = {
                id(message): result
                for pairs in self._committed
                for message, result in zip(*pairs, strict=True)
            }
            decided += [(each, committed[id(each)]) for each in undecided if id(each) in committed]
            undecided = [each for each in undecided if id(each) not in committed]
        self._add_results(decided)
        return undecided

    def _add_results(self, decided: Sequence[tuple[Message, Result]]) -> None:
        for message, result in decided:
            if result is MessageResult.ACK:
                self.acked.append(message.delivery_tag)
            else:
                self.not_acked.append(MessageOutcome(message, result))

    def _fail(self, messages: Sequence[Message], error: BaseException, cause: Cause) -> None:
        result = self._policy.result(error, cause)
        self.not_acked += [MessageOutcome(message, result, cause, error) for message in messages]


def _undecodable(
    messages: Sequence[Message], error: MessageDecodeError
) -> list[tuple[Message, MessageDecodeError]]:
    """Return the message that can't be decoded, and those that would fail in the same way.

    A run for each of thousands of messages would block the event loop, because every run decodes
    all others again. So messages of the same type and content type, whose bodies aren't valid JSON
    either, are found in one pass. An error that the handler made itself is about its message only.
    """
    [bad] = [message for message in messages if message is error.message]
    if str(_json_error(bad)) != str(error):
        return [(bad, error)]
    kind = _kind(bad)
    undecodable = []
    for message in messages:
        if message is bad:
            undecodable.append((bad, error))
        elif _kind(message) == kind and (why := _json_error(message)) is not None:
            undecodable.append((message, why))
    return undecodable


def _json_error(message: Message) -> MessageDecodeError | None:
    try:
        message.json()
    except MessageDecodeError as error:
        return error
    return None


def _kind(message: Message) -> tuple[str | None, str | None]:
    properties = message.properties
    return properties.content_type, properties.type
