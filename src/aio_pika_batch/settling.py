"""How does what was decided reach the broker?

Copies first, and an original only once the broker has confirmed its copy; everything else in one
write. An original whose copy is not confirmed at once waits in a room of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from aio_pika_batch.core.holding import HoldPolicy
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.results import Cause, MessageResult, Nack, Requeue, Result, Verdict
from aio_pika_batch.core.routing import Republication, Router
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.trial import Handled
from aio_pika_batch.desk import SettleDesk
from aio_pika_batch.errors import SessionLost, TransportError
from aio_pika_batch.hands import Wait
from aio_pika_batch.logs import KeywordLogger, told
from aio_pika_batch.observer import (
    DeadLettered,
    Observers,
    Requeued,
    Settled,
    SettleFailed,
    StaleResults,
    Step,
)
from aio_pika_batch.outbox import Outbox
from aio_pika_batch.transport import Session
from aio_pika_batch.waiting import WaitingRoom


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
        router: Router,
        hold: HoldPolicy,
        outbox: Outbox,
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
        self._desk = SettleDesk(session, patience)
        self._room = WaitingRoom(
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

    async def settle(self, handled: Handled, arrived: float) -> None:
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
            self._observers.tell(Settled(_counts(handled, done), self._loop.time() - began))
            self._tell_confirmed(confirmed)

    async def _carry_out(
        self, handled: Handled, arrived: float
    ) -> tuple[Sequence[Verdict], Sequence[Republication]]:
        """Settle; returns the verdicts that are done with, and the copies that are confirmed."""
        settlements: list[Settlement] = []
        if handled.acked:
            settlements.append(Settlement(Disposition.ACK, tuple(handled.acked)))
        if handled.returned:
            tags = tuple(message.delivery_tag for message in handled.returned)
            settlements.append(Settlement(Disposition.RETURN, tags))
        republications: Sequence[Republication] = ()
        if handled.verdicts:
            plan = self._router.plan(handled.verdicts, datetime.now(UTC))
            settlements.extend(plan.settlements)
            republications = plan.republications
        confirmed: Sequence[Republication] = ()
        if republications:
            confirmed = await self._settle_once_confirmed(settlements, republications, arrived)
        elif settlements:
            await self._desk.settle(settlements)
        if len(confirmed) == len(republications):
            return handled.verdicts, confirmed
        pending = {each.tag for each in republications} - {each.tag for each in confirmed}
        done = [each for each in handled.verdicts if each.message.delivery_tag not in pending]
        return done, confirmed

    async def _settle_once_confirmed(
        self,
        settlements: list[Settlement],
        republications: Sequence[Republication],
        arrived: float,
    ) -> Sequence[Republication]:
        """Publish the copies, then settle; returns those whose copies are confirmed."""
        if not self._complained and any(each.malformed_count for each in republications):
            self._complained = True
            header = self._router.retry.header
            self._log.warning("a retry count is no number, and is taken as 0", header=header)
        place = self._desk.stand_in_line()
        try:
            outcomes, is_settled = await self._publish_patiently(republications, settlements)
            if is_settled:
                settlements = []
            if self.is_over:
                if settlements:
                    msg = "the session ended while copies were on their way: nothing was settled"
                    raise SessionLost(msg)
                self.count_stale(len(republications))
                return ()
            confirmed = self._confirmed_of(republications, outcomes, arrived)
            if confirmed:
                tags = tuple([each.tag for each in confirmed])
                settlements.append(Settlement(Disposition.ACK, tags))
            if settlements:
                await self._desk.settle(settlements, place)
            return confirmed
        finally:
            self._desk.leave(place)

    async def _publish_patiently(
        self, republications: Sequence[Republication], others: Sequence[Settlement]
    ) -> tuple[Sequence[Outcome], bool]:
        """Publish; what needs no copy is settled without the others if that takes too long.

        Returns:
            What became of the copies; and whether the others have been settled.

        Raises:
            TransportError: The session did not take the others.
        """
        early: list[asyncio.Future[None]] = []
        publishing = self._loop.create_task(self._publish(republications))

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
        republications: Sequence[Republication],
        outcomes: Sequence[Outcome],
        arrived: float,
    ) -> list[Republication]:
        """Those whose copies are confirmed; the others are held."""
        confirmed = []
        for republication, outcome in zip(republications, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                confirmed.append(republication)
            else:
                self._room.admit(republication, arrived=arrived)
        if confirmed:
            self._is_giving_back = False
        return confirmed

    async def _publish(self, republications: Sequence[Republication]) -> Sequence[Outcome]:
        began = self._loop.time()
        outcomes = await self._outbox.publish([each.copy for each in republications])
        failed = len(outcomes) - outcomes.count(Outcome.CONFIRMED)
        if failed:
            self._tell_failed(Step.PUBLISH, failed, None, began)
        return outcomes

    async def _publish_again(self, republications: Sequence[Republication]) -> Sequence[Outcome]:
        try:
            return await self._publish(republications)
        except Exception as error:  # noqa: BLE001  -- held for ever is worse than delivered again
            self._fail(error)
            return [Outcome.UNKNOWN] * len(republications)

    async def _settle_confirmed(self, republications: Sequence[Republication]) -> None:
        began = self._loop.time()
        await self._settle_or_fail(Disposition.ACK, [each.tag for each in republications])
        if self._observers:
            verdicts = [each.verdict for each in republications]
            seconds = self._loop.time() - began
            self._observers.tell(Settled(_counts(Handled(), verdicts), seconds))
            self._tell_confirmed(republications)

    def _tell_failed(
        self, step: Step, count: int, error: BaseException | None, began: float
    ) -> None:
        if self._observers:
            seconds = self._loop.time() - began
            self._observers.tell(SettleFailed(step, count, error, seconds))

    def _tell_confirmed(self, republications: Sequence[Republication]) -> None:
        for republication in republications:
            message = republication.verdict.message
            if republication.reason is None:
                self._observers.tell(Requeued(message, message.retry_count + 1))
            else:
                self._observers.tell(DeadLettered(message, republication.reason))

    async def _give_back(self, republications: Sequence[Republication]) -> None:
        # What is given back comes back; one line will do until a copy is confirmed again.
        tell = self._log.debug if self._is_giving_back else self._log.warning
        tell(
            "copies are not confirmed: their originals go back to the broker",
            messages=len(republications),
        )
        self._is_giving_back = True
        await self._settle_or_fail(Disposition.RETURN, [each.tag for each in republications])

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
            error = SessionLost(f"held originals could not be settled: {told(error)}")
        self._on_failure(error)

    def count_stale(self, count: int) -> None:
        """Note that results came too late."""
        self._log.warning(
            "results came for a session that is gone; the broker delivers these messages again",
            messages=count,
        )
        if self._observers:
            self._observers.tell(StaleResults(count))

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
    handled: Handled, direct: Sequence[Verdict]
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
