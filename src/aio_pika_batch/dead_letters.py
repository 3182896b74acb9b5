"""Looks at, replays and deletes the messages of a dead-letter queue.

Law: a dead letter leaves its queue only once the broker has confirmed its copy, or when you delete
it. However a replay ends, each message is in the dead-letter queue or at its original destination.
It is in both only if a confirmation or an acknowledgement was lost.

:func:`look`, :func:`replay` and :func:`purge` do what the commands of `aio-pika-batch dlq` do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

from aio_pika_batch.core.dead_letter import (
    EVERY,
    DeathInfo,
    Filter,
    NotReplayable,
    OriginalRoute,
    death_info,
    replay_copy,
)
from aio_pika_batch.core.message import RETRY_COUNT_HEADER, Message
from aio_pika_batch.core.publication import Copy, Outcome, describe_outcome
from aio_pika_batch.core.topology import Exchange, PublishCheck, Topology
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.queue_browser import Limit, QueueBrowser, browse
from aio_pika_batch.transport import Publisher, Transport

__all__ = [
    "EVERY",
    "DeathInfo",
    "Filter",
    "Letter",
    "Looked",
    "OriginalRoute",
    "Report",
    "look",
    "purge",
    "replay",
]


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter.

    Attributes:
        message: The message. It can't be settled any more, since its session is over.
        death: Why, when and from where it was dead-lettered.
        number: Its position among those that were read, from 1.
    """

    message: Message
    death: DeathInfo
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """The result of :func:`look`.

    Attributes:
        ready: Number of dead letters in the queue; None if the transport can't count them.
        letters: Those that were read and match, oldest first.
        seen: Number of those that were read.
        reasons: Number of those that were read, by reason.
        oldest: When the first of those that were read was dead-lettered, if any says so.
        newest: When the last of those that were read was dead-lettered, if any says so.
        ended: Why fewer were read than asked for; None if there were no more.
    """

    queue: str
    ready: int | None
    letters: Sequence[Letter]
    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    oldest: datetime | None = None
    newest: datetime | None = None
    ended: str | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """The result of :func:`replay` and :func:`purge`, complete or so far.

    Attributes:
        ready: Number of dead letters at the start; None if the transport can't count them.
        seen: Number of dead letters read.
        done: Number replayed or deleted; in a dry run, that would be.
        kept: Number left in the queue because they don't match.
        failed: Number left in the queue although they match, by what prevents it.
        reasons: Number of dead letters read, by reason.
        ended: Why it ended early; None if it didn't.
    """

    queue: str
    ready: int | None = None
    seen: int = 0
    done: int = 0
    kept: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    ended: str | None = None


Progress: TypeAlias = Callable[[Report], None]


async def look(
    transport: Transport,
    queue: str,
    *,
    most: int | None = 100,
    where: Filter = EVERY,
    limit: int | None = None,
    keep: bool = True,
    delivery_limit: Limit = "ask",
    retry_count_header: str = RETRY_COUNT_HEADER,
    stop: asyncio.Event | None = None,
    on_progress: Callable[[Looked], None] | None = None,
) -> Looked:
    """Read the oldest dead letters and leave them in the queue.

    Reading counts as a delivery in a quorum queue, and a queue with a delivery limit drops a
    message that was delivered too often. So reading stops at a message with only five deliveries
    left, and :attr:`Looked.ended` says so.

    Args:
        most: Maximum number to read; None reads all, and keeps only those that match.
        where: Which dead letters to return.
        limit: Maximum number to return; reading ends there.
        keep: False returns no dead letters, only numbers and times: those of a large queue don't
            fit into memory.
        delivery_limit: Delivery limit of the queue; None for none. `"ask"` asks the broker, and
            uses RabbitMQ's default if in doubt.
        stop: Set this event to end early.
        on_progress: Called after each step, with the result so far.

    Raises:
        TransportError: The queue doesn't exist, or the broker is unreachable.
    """
    letters: list[Letter] = []
    reasons: Counter[str] = Counter()
    moments: list[datetime] = []

    def is_full() -> bool:
        return reasons.total() == most or len(letters) == limit

    def looked() -> Looked:
        return Looked(
            queue=queue,
            ready=browser.ready,
            letters=letters,
            seen=reasons.total(),
            reasons=reasons,
            oldest=min(moments, default=None),
            newest=max(moments, default=None),
            ended=browser.ended,
        )

    async with browse(
        transport,
        queue,
        most=most,
        limit=delivery_limit,
        retry_count_header=retry_count_header,
        stop=stop,
    ) as browser:
        while not is_full() and (chunk := await browser.next_chunk()):
            for message in chunk:
                if is_full() or not browser.can_return(message):
                    break
                death = death_info(message, retry_count_header)
                reasons[death.reason] += 1
                if (died := death.died_at) is not None:
                    died = died if died.tzinfo else died.replace(tzinfo=UTC)
                    moments = [min([died, *moments]), max([died, *moments])]
                if keep and where.matches(message, death, datetime.now(UTC)):
                    letters.append(Letter(message, death, reasons.total()))
            if on_progress is not None:
                on_progress(looked())
    return looked()


async def replay(
    transport: Transport,
    queue: str,
    *,
    where: Filter = EVERY,
    limit: int | None = None,
    scan: int | None = None,
    to_queue: bool = False,
    dry_run: bool = False,
    delivery_limit: Limit = "ask",
    retry_count_header: str = RETRY_COUNT_HEADER,
    stop: asyncio.Event | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Publish dead letters to their original exchange and routing key, with retries reset.

    Each copy is mandatory, and confirmed before its dead letter is acknowledged. Dead letters that
    don't match, or whose copies fail, are held until the end and then put back, in order as far as
    the broker allows. Those that arrive meanwhile are left alone.

    Args:
        where: Which dead letters.
        limit: Maximum number to replay.
        scan: Maximum number held at a time; None for no limit. If more than that stay in the
            queue, it ends early.
        to_queue: Publish only to the queue that each message was dead-lettered from, not to every
            queue bound to its exchange.
        dry_run: Only count them. Reading counts as a delivery.
        delivery_limit: As for :func:`look`.
        retry_count_header: The header that counts retries; it is removed.
        stop: Set this event to end early; copies in progress are finished.
        on_progress: Called after each step.

    Raises:
        TransportError: The queue doesn't exist, or the connection was lost. No message is lost.
    """
    report = Report(queue=queue)
    async with (
        browse(
            transport,
            queue,
            most=scan,
            limit=delivery_limit,
            retry_count_header=retry_count_header,
            stop=stop,
        ) as browser,
        AsyncExitStack() as stack,
    ):
        publisher = _CopyPublisher(transport, browser, report, stack)
        selector = _Selector(browser, report, where, limit, retry_count_header, returns_all=dry_run)
        while (selected := await selector.next_chunk()) is not None:
            copies: list[Copy] = []
            for letter in selected:
                # Decided one by one: a letter that can't be replayed doesn't stop the others.
                decision = replay_copy(
                    letter.message,
                    letter.death,
                    to_queue=to_queue,
                    retry_count_header=retry_count_header,
                )
                match decision:
                    case NotReplayable(reason):
                        selector.fail(letter.message, reason)
                    case Copy():
                        copies.append(decision)
            if dry_run:
                report.done += len(copies)
            else:
                for copy, reason in await publisher.publish(copies):
                    selector.fail(copy.message, reason)
            if on_progress is not None:
                on_progress(report)
    report.ended = browser.ended
    return report


async def purge(
    transport: Transport,
    queue: str,
    *,
    where: Filter = EVERY,
    limit: int | None = None,
    scan: int | None = None,
    dry_run: bool = False,
    delivery_limit: Limit = "ask",
    retry_count_header: str = RETRY_COUNT_HEADER,
    stop: asyncio.Event | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Delete dead letters. The arguments and errors are those of :func:`replay`."""
    report = Report(queue=queue)
    async with browse(
        transport,
        queue,
        most=scan,
        limit=delivery_limit,
        retry_count_header=retry_count_header,
        stop=stop,
    ) as browser:
        selector = _Selector(browser, report, where, limit, retry_count_header, returns_all=dry_run)
        while (selected := await selector.next_chunk()) is not None:
            if not dry_run:
                await browser.done([letter.message for letter in selected])
            report.done += len(selected)
            if on_progress is not None:
                on_progress(report)
    report.ended = browser.ended
    return report


class _Selector:
    """Selects the dead letters that match, and counts the others."""

    def __init__(
        self,
        browser: QueueBrowser,
        report: Report,
        where: Filter,
        limit: int | None,
        retry_count_header: str,
        *,
        returns_all: bool,
    ) -> None:
        self._browser = browser
        self._report = report
        self._where = where
        self._limit = limit
        self._header = retry_count_header
        self._returns_all = returns_all
        self._rest: Sequence[Message] = []

    async def next_chunk(self) -> list[Letter] | None:
        """Return the next dead letters that match, possibly none of them; None at the end."""
        report = self._report
        report.ready = self._browser.ready
        if self._limit is not None and report.done >= self._limit:
            return None
        chunk, self._rest = self._rest or await self._browser.next_chunk(), []
        return self._select(chunk) if chunk else None

    def fail(self, message: Message, reason: str) -> None:
        """Count a dead letter that matches but stays in the queue."""
        self._report.failed[reason] += 1
        # It goes back to the queue. If its delivery limit is near, the replay ends here.
        self._browser.can_return(message)

    def _select(self, messages: Sequence[Message]) -> list[Letter]:
        report = self._report
        now = datetime.now(UTC)
        selected: list[Letter] = []
        for at, message in enumerate(messages):
            if self._limit is not None and report.done + len(selected) >= self._limit:
                # Some of the selected may fail. Then the limit allows more of the rest.
                self._rest = messages[at:]
                break
            report.seen += 1
            death = death_info(message, self._header)
            report.reasons[death.reason] += 1
            matches = self._where.matches(message, death, now)
            stays = self._returns_all or not matches
            if stays and not self._browser.can_return(message):
                break
            if matches:
                selected.append(Letter(message, death))
            else:
                report.kept += 1
        return selected


class _CopyPublisher:
    """Publishes copies, and removes the dead letters whose copies are confirmed."""

    def __init__(
        self, transport: Transport, browser: QueueBrowser, report: Report, stack: AsyncExitStack
    ) -> None:
        self._transport = transport
        self._browser = browser
        self._report = report
        self._stack = stack
        self._publisher: Publisher | None = None
        self._refused: dict[str, str | None] = {}

    async def publish(self, copies: Sequence[Copy]) -> list[tuple[Copy, str]]:
        """Publish copies; return those that failed, with the reason."""
        failed: list[tuple[Copy, str]] = []
        ready: list[Copy] = []
        for copy in copies:
            reason = await self._why_refused(copy)
            if reason is None:
                ready.append(copy)
            else:
                failed.append((copy, reason))
        if not ready:
            return failed
        # Only now: a dry run, or one without matches, needs no second connection.
        if self._publisher is None:
            self._publisher = await self._stack.enter_async_context(self._transport.publisher())
        outcomes = await self._publisher.publish(ready)
        arrived: list[Message] = []
        for copy, outcome in zip(ready, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                arrived.append(copy.message)
            else:
                failed.append((copy, describe_outcome(outcome, copy)))
        # After the confirms, and only these: see the law at the top.
        await self._browser.done(arrived)
        self._report.done += len(arrived)
        # Every later copy would be unconfirmed as well, and perhaps published twice.
        if doubtful := outcomes.count(Outcome.UNKNOWN):
            self._browser.end(f"unconfirmed copies: {doubtful}; these may be in both queues")
        elif not self._publisher.is_open:
            is_refusal = Outcome.REFUSED in outcomes
            what = "the broker refused a copy, and the channel" if is_refusal else "the connection"
            self._browser.end(f"{what} for publishing was lost")
        return failed

    async def _why_refused(self, copy: Copy) -> str | None:
        """Return why an exchange can't be published to; None if it can."""
        # Publishing to a missing exchange, or without permission, would close the channel, and the
        # outcome of all copies in progress would be unknown.
        name = copy.exchange
        if name not in self._refused:
            self._refused[name] = None
            # The default exchange always exists, and can't be declared.
            exchanges = (Exchange(name, check_only=True),) if name else ()
            check = PublishCheck(name, copy.routing_key)
            try:
                await self._transport.declare(Topology(exchanges=exchanges, publishes=(check,)))
            except TopologyError as error:
                self._refused[name] = str(error)
        return self._refused[name]
