"""Publishes on behalf of a whole consumer: reconnects, and declares delay queues when needed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from aio_pika_batch.core.hold_policy import NEVER, DoubtfulRoutes, Route
from aio_pika_batch.core.publication import Copy, Outcome, Outgoing
from aio_pika_batch.core.retry import NO_DELAY, DelayedCopy
from aio_pika_batch.core.settlement_plan import CopyKind
from aio_pika_batch.core.topology import Topology, wait_queue
from aio_pika_batch.core.topology_options import TopologyOptions
from aio_pika_batch.errors import AccessRefused, PublishError, TopologyError, TransportError
from aio_pika_batch.logs import BurstLog, KeywordLogger, format_error
from aio_pika_batch.runtime.shutdown import wait_until
from aio_pika_batch.transport import ListeningPublisher, Publisher, Transport

LISTEN = 60.0
"""Seconds after `publish_timeout` for which a copy may still be confirmed.

Most stalls, such as the election of a queue's leader, are shorter. Only then another copy is sent.
"""

OnLate: TypeAlias = Callable[[int, Outcome], None]


class ReconnectingPublisher:
    """Has one connection for publishing at a time, opened on first use.

    Args:
        log: Gets a line when a publisher can't be opened.

    Attributes:
        is_closed: Whether `close` was called.
    """

    def __init__(self, transport: Transport, log: KeywordLogger) -> None:
        self._transport = transport
        self._log = log
        self._opening = asyncio.Lock()
        self._current: tuple[AbstractAsyncContextManager[Publisher], Publisher] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.is_closed = False
        self._has_complained = False

    async def _connect(self) -> Publisher | None:
        try:
            return await self._open()
        except TransportError as error:
            if not self._has_complained:
                self._has_complained = True
                self._log.warning("no connection for publishing", error=error)
            return None

    async def _open(self) -> Publisher:
        async with self._opening:
            if self._current is not None:
                publisher = self._current[1]
                if publisher.is_open:
                    return publisher
                self._replace(publisher)
            self._refuse_if_closed()
            context = self._transport.publisher()
            publisher = await context.__aenter__()
            try:
                self._refuse_if_closed()
            except TransportError:
                await self._close(context)
                raise
            self._current = context, publisher
            self._has_complained = False
            return publisher

    def _refuse_if_closed(self) -> None:
        if self.is_closed:
            raise TransportError("the publisher is closed: nothing can be published any more")

    def _replace(self, publisher: Publisher) -> None:
        if self._current is not None and self._current[1] is publisher:
            context = self._current[0]
            self._current = None
            task = asyncio.get_running_loop().create_task(self._close(context))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, context: AbstractAsyncContextManager[Publisher]) -> None:
        try:
            await context.__aexit__(None, None, None)
        except TransportError as error:
            self._log.debug("a publisher did not close cleanly", error=error)

    async def close(self, deadline: float) -> None:
        """Close the connection, and wait for those that are closing, until the deadline."""
        self.is_closed = True
        if self._current is not None:
            self._replace(self._current[1])
        await wait_until(self._closing, deadline)
        for task in self._closing:
            task.cancel()


class SharedPublisher(ReconnectingPublisher):
    """Publishes what users publish. Single publications of one turn of the loop share a write."""

    def __init__(self, transport: Transport, log: KeywordLogger) -> None:
        super().__init__(transport, log)
        self._waiting: list[tuple[Outgoing, asyncio.Future[Outcome]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Open the connection now, and raise an error if that fails."""
        await self._open()

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish; without a connection all outcomes are `Outcome.UNSENT`.

        A connection that has left anything unconfirmed is replaced.
        """
        publisher = await self._connect()
        if publisher is None:
            return [Outcome.UNSENT] * len(publications)
        outcomes = await publisher.publish(publications)
        if Outcome.UNKNOWN in outcomes or not publisher.is_open:
            self._replace(publisher)
        return outcomes

    async def publish_one(self, publication: Outgoing) -> Outcome:
        """Publish a message, together with others of this turn of the event loop.

        Raises:
            PublishError: It can't be encoded.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            # In a task of its own: a caller that is cancelled must not cancel the others'.
            task = loop.create_task(self._publish_waiting())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        answer: asyncio.Future[Outcome] = loop.create_future()
        self._waiting.append((publication, answer))
        return await answer

    async def _publish_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        await self._publish_together(waiting)

    async def _publish_together(
        self, waiting: Sequence[tuple[Outgoing, asyncio.Future[Outcome]]]
    ) -> None:
        outcomes: Sequence[Outcome | None] = ()
        error: BaseException | None = None
        try:
            outcomes = await self.publish([publication for publication, _ in waiting])
        except asyncio.CancelledError:
            outcomes = [None] * len(waiting)
        except PublishError as raised:
            if len(waiting) > 1:
                # Nothing was sent, because of one that can't be encoded.
                for each in waiting:
                    await self._publish_together([each])
                return
            error = raised
        except BaseException as raised:  # noqa: BLE001  -- passed on to those who wait
            error = raised
        for at, (_, answer) in enumerate(waiting):
            if answer.done():
                continue
            if error is not None:
                answer.set_exception(error)
            elif (outcome := outcomes[at]) is None:
                answer.cancel()
            else:
                answer.set_result(outcome)

    async def finish(self, deadline: float) -> None:
        """Wait for single publications that are on their way, until the deadline."""
        await wait_until(self._sending, deadline)


@dataclass(frozen=True, slots=True)
class _Unanswered:
    """A copy that may still be confirmed, and what to call then."""

    # The copy is kept because it is found by its identity.
    copy: Outgoing
    on_late: Callable[[Outcome], None]
    publisher: Publisher
    since: float
    timer: asyncio.TimerHandle


class CopyPublisher(ReconnectingPublisher):
    """Publishes the copies of one kind, without multiplying them while a queue is silent.

    A copy without a confirm may be stored. As long as its confirm may still come, neither that copy
    nor another one is sent to the same exchange and routing key: see `DoubtfulRoutes`.

    Attributes:
        on_undelivered: Called with each copy that the broker has returned or refused.
    """

    def __init__(self, transport: Transport, log: KeywordLogger) -> None:
        super().__init__(transport, log)
        self._loop = asyncio.get_running_loop()
        self._doubts = DoubtfulRoutes()
        self._unanswered: dict[int, _Unanswered] = {}
        self._answered_at = NEVER
        self._silent = BurstLog(self._log_silent)
        self.on_undelivered: Callable[[Copy, Outcome], None] = lambda *_: None

    async def publish(self, publications: Sequence[Outgoing], on_late: OnLate) -> Sequence[Outcome]:
        """Publish; what isn't sent because of an unanswered copy is `Outcome.UNSENT`.

        Args:
            on_late: Gets the index and the outcome of a copy whose outcome was unknown, once it is
                certain. If it stays `Outcome.UNKNOWN`, no confirm can come any more.
        """
        sent: Sequence[int] = range(len(publications))
        if self._doubts or self._unanswered:
            now = self._loop.time()
            sent = [
                index
                for index, copy in enumerate(publications)
                if id(copy) not in self._unanswered and self._doubts.admit(_route(copy), now)
            ]
        outcomes = [Outcome.UNSENT] * len(publications)
        if not sent:
            return outcomes
        answers: Sequence[Outcome] = outcomes
        publisher = None
        try:
            publisher = await self._connect()
            if publisher is not None:
                if isinstance(publisher, ListeningPublisher):
                    publisher.on_late = self._on_late
                answers = await publisher.publish([publications[index] for index in sent])
        finally:
            if self._doubts or answers.count(Outcome.CONFIRMED) < len(publications):
                # Also after an error or a cancellation: another attempt may be made then.
                for index, answer in zip(sent, answers, strict=False):
                    outcomes[index] = answer
                    self._note(publications[index], answer, publisher, partial(on_late, index))
            else:
                # The common case, without a look at each copy.
                self._answered_at = self._loop.time()
                outcomes = list(answers)
        if publisher is not None and not publisher.is_open:
            self._replace(publisher)
        return outcomes

    def _note(
        self,
        copy: Outgoing,
        outcome: Outcome,
        publisher: Publisher | None,
        on_late: Callable[[Outcome], None],
    ) -> None:
        route = _route(copy)
        if outcome in (Outcome.RETURNED, Outcome.REFUSED) and isinstance(copy, Copy):
            self.on_undelivered(copy, outcome)
        match outcome:
            case Outcome.UNSENT | Outcome.UNPUBLISHABLE:
                self._doubts.release(route)
            case Outcome.UNKNOWN if publisher is not None:
                if publisher.is_open and isinstance(publisher, ListeningPublisher):
                    self._listen(copy, publisher, on_late)
                else:
                    self._fail(route)
                    self._replace(publisher)
            case Outcome.REFUSED if publisher is not None and not publisher.is_open:
                # The refusal has closed the channel, with everything else in flight on it.
                self._fail(route)
            case _:
                self._answered_at = self._loop.time()
                self._doubts.clear(route)

    def _fail(self, route: Route, *, was_listening: bool = False) -> None:
        # Jitter spreads load; it needn't be unpredictable.
        jitter = random.random()
        self._doubts.fail(route, now=self._loop.time(), jitter=jitter, was_listening=was_listening)

    def _listen(
        self, copy: Outgoing, publisher: Publisher, on_late: Callable[[Outcome], None]
    ) -> None:
        self._silent.note(1)
        self._doubts.listen(_route(copy))
        timer = self._loop.call_later(LISTEN, self._give_up, id(copy))
        now = self._loop.time()
        self._unanswered[id(copy)] = _Unanswered(copy, on_late, publisher, now, timer)

    def _log_silent(self, count: int) -> None:
        self._log.warning(
            "copies are not confirmed in time: a late confirm counts for some time",
            messages=count,
            seconds=LISTEN,
        )

    def _on_late(self, copy: Outgoing, outcome: Outcome) -> None:
        unanswered = self._unanswered.pop(id(copy), None)
        if outcome is not Outcome.UNKNOWN:
            self._answered_at = self._loop.time()
            self._doubts.clear(_route(copy))
        if unanswered is None:
            return
        unanswered.timer.cancel()
        if outcome is Outcome.UNKNOWN:
            self._fail(_route(copy), was_listening=True)
        unanswered.on_late(outcome)

    def _give_up(self, key: int) -> None:
        unanswered = self._unanswered.pop(key)
        self._fail(_route(unanswered.copy), was_listening=True)
        if self._answered_at <= unanswered.since:
            # Not only this queue is silent but the connection.
            self._replace(unanswered.publisher)
        unanswered.on_late(Outcome.UNKNOWN)

    async def close(self, deadline: float) -> None:
        """Listen no longer, and close the connection."""
        for unanswered in self._unanswered.values():
            unanswered.timer.cancel()
        self._unanswered.clear()
        self._silent.flush()
        await super().close(deadline)


@dataclass(frozen=True, slots=True)
class CopyPublishers:
    """The publishers of a consumer's copies.

    They have a connection each, so that a queue that doesn't confirm delays and repeats only the
    copies of one kind.
    """

    retries: DelayedPublisher
    dead_letters: CopyPublisher

    def of(self, kind: CopyKind) -> CopyPublisher:
        """Return the publisher for copies of this kind."""
        return self.dead_letters if kind is CopyKind.DEAD_LETTER else self.retries

    async def close(self, deadline: float) -> None:
        """Close both connections."""
        await asyncio.gather(self.retries.close(deadline), self.dead_letters.close(deadline))


class DelayedPublisher(CopyPublisher):
    """Publishes retries, some of which wait in a delay queue.

    Delay queues that are certainly needed are declared with the topology, others before the first
    copy goes there, and again if the broker doesn't have them any more. If a delay queue can't be
    used, its copies count as returned, and the consumer holds their originals instead: they are
    never retried too early.

    Args:
        log: Gets a line when delay queues can't be used.
        options: Describes the delay queues, and which of them are certainly needed.

    Attributes:
        can_delay: Whether delay queues can be used, as far as is known.
    """

    def __init__(self, transport: Transport, log: KeywordLogger, options: TopologyOptions) -> None:
        super().__init__(transport, log)
        self._options = options
        self._declared: set[int] = set()
        self._declaring: dict[int, asyncio.Task[bool]] = {}
        self._complaints: dict[int, str] = {}
        self.can_delay = True

    async def declare_delay_queues(self) -> None:
        """Declare the delay queues that are certainly needed.

        Raises:
            BrokerUnavailable: The broker doesn't answer.
        """
        levels = self._options.wait_levels
        if not levels or not self.can_delay:
            return
        queues = tuple(wait_queue(self._options, level) for level in levels)
        try:
            await self._transport.declare(Topology(queues=queues))
        except (AccessRefused, TopologyError) as error:
            self._hold_from_now_on(error)
        else:
            self._declared.update(levels)

    def _hold_from_now_on(self, error: TransportError) -> None:
        if self.can_delay:
            self.can_delay = False
            self._log.warning(
                "delay queues can't be used: the consumer holds delayed retries instead",
                error=format_error(error),
            )

    async def publish(self, publications: Sequence[Outgoing], on_late: OnLate) -> Sequence[Outcome]:
        """Publish; delay queues that are needed are declared first."""
        levels = {each.level for each in publications if isinstance(each, DelayedCopy)}
        if not levels:
            return await super().publish(publications, on_late)
        missing = {level for level in levels if not await self._is_declared(level)}
        ready = [index for index, each in enumerate(publications) if _level(each) not in missing]
        outcomes = [Outcome.RETURNED] * len(publications)
        if ready:
            answers = await super().publish(
                [publications[index] for index in ready],
                lambda index, outcome: on_late(ready[index], outcome),
            )
            for index, answer in zip(ready, answers, strict=True):
                outcomes[index] = answer
        for each, outcome in zip(publications, outcomes, strict=True):
            if outcome is Outcome.RETURNED:
                # It was deleted or never existed: the next attempt declares it.
                self._declared.discard(_level(each))
        return outcomes

    async def _is_declared(self, level: int) -> bool:
        """Declare a delay queue if needed; batches that need it at the same time share a try."""
        if level in self._declared:
            return True
        declaring = self._declaring.get(level)
        if declaring is None:
            declaring = asyncio.get_running_loop().create_task(self._declare(level))
            self._declaring[level] = declaring
            declaring.add_done_callback(lambda _: self._declaring.pop(level))
        await asyncio.wait({declaring})
        return not declaring.cancelled() and declaring.result()

    async def _declare(self, level: int) -> bool:
        try:
            await self._transport.declare(Topology(queues=(wait_queue(self._options, level),)))
        except (AccessRefused, TopologyError) as error:
            self._hold_from_now_on(error)
            return False
        except TransportError as error:
            text = format_error(error)
            is_repeated = text == self._complaints.get(level)
            log = self._log.debug if is_repeated else self._log.error
            log(
                "a delay queue can't be declared for now: its retries are held",
                delay=level / 1000,
                error=text,
            )
            self._complaints[level] = text
            return False
        self._complaints.pop(level, None)
        self._declared.add(level)
        return True

    async def close(self, deadline: float) -> None:
        """Declare nothing more, and close the connection."""
        declaring = set(self._declaring.values())
        for task in declaring:
            task.cancel()
        await wait_until(declaring, deadline)
        await super().close(deadline)


def _route(publication: Outgoing) -> Route:
    return publication.exchange, publication.routing_key


def _level(publication: Outgoing) -> int:
    return publication.level if isinstance(publication, DelayedCopy) else NO_DELAY
