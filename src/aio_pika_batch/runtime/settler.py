"""How does what was decided reach the broker?

Copies first, and an original only once the broker has confirmed its copy; everything else in one
write. An original whose copy is not confirmed at once waits in a room of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue, Result
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.settlement_plan import PendingCopy, SettlementPlanner
from aio_pika_batch.core.unconfirmed_policy import UnconfirmedPolicy
from aio_pika_batch.errors import SessionLost, TransportError
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.observer import (
    DeadLettered,
    Observers,
    Requeued,
    Settled,
    SettleFailed,
    StaleResults,
    Step,
)
from aio_pika_batch.runtime.handler_slots import Wait
from aio_pika_batch.runtime.publishing import ReconnectingPublisher
from aio_pika_batch.runtime.settlement_queue import SettlementQueue
from aio_pika_batch.runtime.unconfirmed import UnconfirmedCopies
from aio_pika_batch.transport import Session


class Settler:
    """Settles what one session delivered.

    Args:
        patience: Seconds that a settlement waits for confirmations, at most.
        on_failure: Told when the session cannot go on.
        on_room: Called when messages have left the waiting room.

    Attributes:
        is_over: Whether the session is gone, and results come too late.
    """

    def __init__(
        self,
        session: Session,
        *,
        router: SettlementPlanner,
        hold: UnconfirmedPolicy,
        outbox: ReconnectingPublisher,
        patience: float,
        on_failure: Callable[[TransportError], None],
        on_room: Callable[[], None],
        observers: Observers,
        log: KeywordLogger,
    ) -> None:
        self._router = router
        self._outbox = outbox
        self._on_failure = on_failure
        self._on_room = on_room
        self._observers = observers
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._patience = patience
        self._desk = SettlementQueue(session, patience)
        self._room = UnconfirmedCopies(
            hold,
            publish=self._publish_again,
            confirmed=self._settle_confirmed,
            give_back=self._give_back,
        )
        self._complained = False
        self._is_giving_back = False
        self.is_over = False

    @property
    def held(self) -> int:
        """Originals that wait for a confirmation that did not come at once."""
        return len(self._room)

    @property
    def since(self) -> float | None:
        """When the longest held original arrived, in loop time; None if none is held."""
        return self._room.since

    async def settle(self, handled: BatchDecisions, arrived: float) -> None:
        """Do what was decided about some messages.

        Args:
            arrived: When the oldest of them was delivered, in loop time.

        Raises:
            TransportError: The session cannot take it; what is unsettled will be delivered again.
        """
        began = self._loop.time()
        try:
            done, confirmed = await self._carry_out(handled, arrived)
        except TransportError as error:
            self._tell_failed(Step.SETTLE, len(handled), error, began)
            raise
        if self._observers:
            self._observers.emit(Settled(_counts(handled, done), self._loop.time() - began))
            self._tell_confirmed(confirmed)

    async def _carry_out(
        self, handled: BatchDecisions, arrived: float
    ) -> tuple[Sequence[MessageOutcome], Sequence[PendingCopy]]:
        """Settle; returns the verdicts that are done with, and the copies that are confirmed."""
        settlements: list[Settlement] = []
        if handled.acked:
            settlements.append(Settlement(Disposition.ACK, tuple(handled.acked)))
        if handled.returned:
            tags = tuple(message.delivery_tag for message in handled.returned)
            settlements.append(Settlement(Disposition.RETURN, tags))
        copies: Sequence[PendingCopy] = ()
        if handled.not_acked:
            plan = self._router.plan(handled.not_acked, datetime.now(UTC))
            settlements.extend(plan.settlements)
            copies = plan.copies
        confirmed: Sequence[PendingCopy] = ()
        if copies:
            confirmed = await self._settle_once_confirmed(settlements, copies, arrived)
        elif settlements:
            await self._desk.settle(settlements)
        if len(confirmed) == len(copies):
            return handled.not_acked, confirmed
        pending = {each.tag for each in copies} - {each.tag for each in confirmed}
        done = [each for each in handled.not_acked if each.message.delivery_tag not in pending]
        return done, confirmed

    async def _settle_once_confirmed(
        self,
        settlements: list[Settlement],
        copies: Sequence[PendingCopy],
        arrived: float,
    ) -> Sequence[PendingCopy]:
        """Publish the copies, then settle; returns those whose copies are confirmed."""
        if not self._complained and any(each.malformed_count for each in copies):
            self._complained = True
            header = self._router.retry.header
            self._log.warning("a retry count is no number, and is taken as 0", header=header)
        place = self._desk.reserve()
        try:
            outcomes, is_settled = await self._publish_patiently(copies, settlements)
            if is_settled:
                settlements = []
            if self.is_over:
                if settlements:
                    msg = "the session ended while copies were on their way: nothing was settled"
                    raise SessionLost(msg)
                self.count_stale(len(copies))
                return ()
            confirmed = self._confirmed_of(copies, outcomes, arrived)
            if confirmed:
                tags = tuple([each.tag for each in confirmed])
                settlements.append(Settlement(Disposition.ACK, tags))
            if settlements:
                await self._desk.settle(settlements, place)
            return confirmed
        finally:
            self._desk.leave(place)

    async def _publish_patiently(
        self, copies: Sequence[PendingCopy], others: Sequence[Settlement]
    ) -> tuple[Sequence[Outcome], bool]:
        """Publish; what needs no copy is settled without the others if that takes too long.

        Returns:
            What became of the copies; and whether the others have been settled.

        Raises:
            TransportError: The session did not take the others.
        """
        early: list[asyncio.Future[None]] = []
        publishing = self._loop.create_task(self._publish(copies))

        def give_up(settled: asyncio.Future[None]) -> None:
            if not settled.cancelled() and settled.exception() is not None:
                publishing.cancel()

        def lose_patience() -> None:
            early.append(self._desk.settle_at_once(others))
            early[0].add_done_callback(give_up)

        timer = self._loop.call_later(self._patience, lose_patience) if others else None
        try:
            outcomes = await publishing
        except asyncio.CancelledError:
            for settled in early:
                if settled.done():
                    settled.result()  # raises: a session that takes nothing waits for no copies
            raise
        finally:
            if timer is not None:
                timer.cancel()
        for settled in early:
            await settled
        return outcomes, bool(early)

    def _confirmed_of(
        self,
        copies: Sequence[PendingCopy],
        outcomes: Sequence[Outcome],
        arrived: float,
    ) -> list[PendingCopy]:
        """Those whose copies are confirmed; the others are held."""
        confirmed = []
        for republication, outcome in zip(copies, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                confirmed.append(republication)
            else:
                self._room.add(republication, arrived=arrived)
        if confirmed:
            self._is_giving_back = False
        return confirmed

    async def _publish(self, copies: Sequence[PendingCopy]) -> Sequence[Outcome]:
        began = self._loop.time()
        outcomes = await self._outbox.publish([each.copy for each in copies])
        failed = len(outcomes) - outcomes.count(Outcome.CONFIRMED)
        if failed:
            self._tell_failed(Step.PUBLISH, failed, None, began)
        return outcomes

    async def _publish_again(self, copies: Sequence[PendingCopy]) -> Sequence[Outcome]:
        try:
            return await self._publish(copies)
        except Exception as error:  # noqa: BLE001  -- held for ever is worse than delivered again
            self._fail(error)
            return [Outcome.UNKNOWN] * len(copies)

    async def _settle_confirmed(self, copies: Sequence[PendingCopy]) -> None:
        began = self._loop.time()
        await self._settle_or_fail(Disposition.ACK, [each.tag for each in copies])
        if self._observers:
            verdicts = [each.outcome for each in copies]
            seconds = self._loop.time() - began
            self._observers.emit(Settled(_counts(BatchDecisions(), verdicts), seconds))
            self._tell_confirmed(copies)

    def _tell_failed(
        self, step: Step, count: int, error: BaseException | None, began: float
    ) -> None:
        if self._observers:
            seconds = self._loop.time() - began
            self._observers.emit(SettleFailed(step, count, error, seconds))

    def _tell_confirmed(self, copies: Sequence[PendingCopy]) -> None:
        for republication in copies:
            message = republication.outcome.message
            if republication.reason is None:
                self._observers.emit(Requeued(message, message.retry_count + 1))
            else:
                self._observers.emit(DeadLettered(message, republication.reason))

    async def _give_back(self, copies: Sequence[PendingCopy]) -> None:
        # What is given back comes back; one line will do until a copy is confirmed again.
        tell = self._log.debug if self._is_giving_back else self._log.warning
        tell(
            "copies are not confirmed: their originals go back to the broker",
            messages=len(copies),
        )
        self._is_giving_back = True
        await self._settle_or_fail(Disposition.RETURN, [each.tag for each in copies])

    async def _settle_or_fail(self, disposition: Disposition, tags: Sequence[int]) -> None:
        began = self._loop.time()
        try:
            await self._desk.settle([Settlement(disposition, tuple(tags))])
        except Exception as error:  # noqa: BLE001  -- unsettled for ever is worse than delivered again
            self._tell_failed(Step.SETTLE, len(tags), error, began)
            self._fail(error)
        self._on_room()

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, TransportError):
            self._log.exception("held originals could not be settled")
            error = SessionLost(f"held originals could not be settled: {format_error(error)}")
        self._on_failure(error)

    def count_stale(self, count: int) -> None:
        """Note that results came too late."""
        self._log.warning(
            "results came for a session that is gone; the broker delivers these messages again",
            messages=count,
        )
        if self._observers:
            self._observers.emit(StaleResults(count))

    async def close(self, unstarted: Sequence[Message], wait: Wait) -> None:
        """Let the attempts under way come to their end, and return what is left over."""
        held = await self._room.close(wait)
        tags = [message.delivery_tag for message in unstarted] + [each.tag for each in held]
        if tags:
            await self._settle_or_fail(Disposition.RETURN, tags)

    async def abort(self) -> None:
        """Stop at once: the session is gone."""
        self.is_over = True
        await self._room.abort()


def _counts(
    handled: BatchDecisions, direct: Sequence[MessageOutcome]
) -> Counter[tuple[MessageResult | None, Cause]]:
    counts: Counter[tuple[MessageResult | None, Cause]] = Counter(
        (_plain(each.result), each.cause) for each in direct
    )
    if handled.acked:
        counts[MessageResult.ACK, Cause.HANDLER] = len(handled.acked)
    if handled.returned:
        counts[None, Cause.SHUTDOWN] = len(handled.returned)
    return counts


def _plain(result: Result) -> MessageResult:
    match result:
        case Nack():
            return MessageResult.NACK
        case Requeue():
            return MessageResult.REQUEUE
        case MessageResult():
            return result
