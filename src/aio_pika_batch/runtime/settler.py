"""Settles what one session delivered: copies first, their originals once these are confirmed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import cast

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Copy, Outcome
from aio_pika_batch.core.quarantine import OwnRequeues
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue, Result
from aio_pika_batch.core.retry import DeadLetterReason
from aio_pika_batch.core.settlement import (
    NO_NATIVE_RETRIES,
    Disposition,
    Modification,
    Settlement,
    join_modifications,
)
from aio_pika_batch.core.settlement_plan import CopyKind, PendingCopy, SettlementPlan
from aio_pika_batch.errors import SessionLost, TransportError
from aio_pika_batch.logs import BurstLog, KeywordLogger, format_error
from aio_pika_batch.observer import (
    DeadLettered,
    Discarded,
    Observers,
    Requeued,
    Settled,
    SettleFailed,
    StaleResults,
    Step,
)
from aio_pika_batch.runtime.held_messages import HeldMessages
from aio_pika_batch.runtime.publishing import CopyPublishers
from aio_pika_batch.runtime.settlement_queue import PATIENCE, SettlementQueue
from aio_pika_batch.runtime.shutdown import Wait
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.transport import ModifyingSession, Session


class Settler:
    """Carries out decisions about the messages of one session.

    Args:
        on_failure: Called with the reason if the session can't go on.
        on_settled_late: Called when held messages have been settled.
        own: Notes which messages handlers requeue at once; None if the queue doesn't count that.

    Attributes:
        held: The messages that wait for their retry, or for a late confirm.
        planner: Plans for what this session can do.
        is_over: Whether the session is gone, so that results come too late.
    """

    def __init__(
        self,
        session: Session,
        config: WorkerConfig,
        publishers: CopyPublishers,
        *,
        on_failure: Callable[[TransportError], None],
        on_settled_late: Callable[[], None],
        own: OwnRequeues | None,
        observers: Observers,
        log: KeywordLogger,
    ) -> None:
        self._session = session
        self._modify_session = session if isinstance(session, ModifyingSession) else None
        native = self._modify_session.retries if self._modify_session else NO_NATIVE_RETRIES
        self.planner = config.planner.natively(native)
        self._publishers = publishers
        self._on_failure = on_failure
        self._on_settled_late = on_settled_late
        self._own = own
        self._observers = observers
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._queue = SettlementQueue(session, config.pace.patience if config.pace else PATIENCE)
        self.held = HeldMessages(
            config.unconfirmed,
            publish=self._publish_again,
            on_confirmed=self._settle_confirmed,
            give_back=self._give_back,
            on_end=self._fail,
        )
        self._holding = BurstLog(self._log_holding)
        self._undeliverable = BurstLog(self._log_undeliverable)
        self._looping = BurstLog(self._log_looping)
        self._discarding = BurstLog(self._log_discarding)
        self._dead_lettering = BurstLog(self._log_dead_lettering)
        self._unpublishable = BurstLog(self._log_unpublishable)
        self._has_warned_of_count = False
        self._is_giving_back = False
        self.is_over = False

    async def settle(self, decisions: BatchDecisions, arrived: float) -> None:
        """Carry out decisions.

        Args:
            arrived: When the oldest of the messages was delivered, in loop time.

        Raises:
            TransportError: The session can't settle; the broker delivers what is unsettled again.
        """
        began = self._loop.time()
        try:
            done, confirmed = await self._carry_out(decisions, arrived)
        except TransportError as error:
            self._emit_failed(Step.SETTLE, len(decisions), error, began)
            raise
        if Settled in self._observers.wanted:
            self._observers.emit(Settled(_counts(decisions, done), self._loop.time() - began))
        self._emit_confirmed(confirmed)

    async def _carry_out(
        self, decisions: BatchDecisions, arrived: float
    ) -> tuple[Sequence[MessageOutcome], Sequence[PendingCopy]]:
        """Settle; return the outcomes that are carried out, and the copies that are confirmed."""
        settlements: list[Settlement] = []
        if decisions.acked:
            settlements.append(Settlement(Disposition.ACK, tuple(decisions.acked)))
            self.held.last_success = self._loop.time()
            if self.held.retries:
                self.held.decide_again()
        if decisions.returned:
            returns = self.planner.plan_returns(decisions.returned, datetime.now(UTC), self._own)
            await self._carry_out_returns(returns)
        outcomes = decisions.not_acked
        if not outcomes:
            if settlements:
                # Almost always the queue is empty, and there is nothing to order.
                queue = self._queue if self._queue.tickets else self._session
                await queue.settle(settlements)
            return outcomes, ()
        plan = self.planner.plan(
            outcomes, datetime.now(UTC), wait_queues=self._publishers.retries.can_delay
        )
        settlements.extend(plan.settlements)
        self._note_requeued(outcomes, plan)
        if plan.discarded:
            self._on_discarded(plan.discarded)
        copies = self._hold_retries(plan.copies, arrived) if plan.copies else []
        confirmed = await self._carry_out_due(settlements, copies, arrived)
        if len(confirmed) == len(plan.copies):
            return outcomes, confirmed
        pending = {each.tag for each in plan.copies} - {each.tag for each in confirmed}
        done = [each for each in outcomes if each.message.delivery_tag not in pending]
        return done, confirmed

    async def _carry_out_due(
        self, settlements: Sequence[Settlement], due: Sequence[PendingCopy], arrived: float
    ) -> Sequence[PendingCopy]:
        """Settle, modify and publish; return what is modified or confirmed."""
        native: Sequence[PendingCopy] = ()
        if self._modify_session is not None:
            native = [each for each in due if each.is_native]
        if native:
            # In one write, unless the others have to wait for the copies of another batch.
            is_joined = len(native) == len(due) and not self._queue.tickets
            await self._modify(native, settlements if is_joined else ())
            if is_joined:
                return native
            due = [each for each in due if not each.is_native]
        if due:
            return [*native, *await self._publish_apart(settlements, due, arrived)]
        if settlements:
            await self._queue.settle(settlements)
        return native

    async def replace_by_copies(
        self, messages: Sequence[Message], *, holds_copies: bool
    ) -> list[Message]:
        """Replace messages that have no result by copies, which the broker counts from 0.

        Args:
            holds_copies: Whether messages whose copies fail are held.

        Returns:
            The messages that must be handled instead, because their copies aren't confirmed.
        """
        plan = self.planner.plan_returns(
            messages, datetime.now(UTC), self._own, replace_all=not holds_copies
        )
        if holds_copies:
            await self._carry_out_returns(plan)
            return []
        outcomes = await self._publish(plan.copies)
        pairs = list(zip(messages, outcomes, strict=True))
        replaced = [message for message, outcome in pairs if outcome is Outcome.CONFIRMED]
        if replaced:
            tags = tuple(message.delivery_tag for message in replaced)
            await self._queue.settle([Settlement(Disposition.ACK, tags)])
        self._forget(replaced)
        return [message for message, outcome in pairs if outcome is not Outcome.CONFIRMED]

    def _forget_replaced(self, copies: Iterable[PendingCopy]) -> None:
        fresh = CopyKind.FRESH_COUNT
        self._forget(each.outcome.message for each in copies if each.kind is fresh)

    def _forget(self, replaced: Iterable[Message]) -> None:
        """Forget what was known of messages whose copies the broker counts from 0."""
        if self._own is not None:
            for message in replaced:
                self._own.forget(message)

    async def _carry_out_returns(self, plan: SettlementPlan) -> None:
        if plan.settlements:
            await self._queue.settle(plan.settlements)
        if plan.copies:
            await self._publish_and_settle((), plan.copies, self._loop.time())

    def _note_requeued(self, outcomes: Sequence[MessageOutcome], plan: SettlementPlan) -> None:
        if self._own is None:
            return
        requeued = [each for each in plan.settlements if each.disposition is Disposition.REQUEUE]
        tags = {tag for each in requeued for tag in each.tags}
        for outcome in outcomes if tags else ():
            if outcome.message.delivery_tag in tags:
                self._own.note(outcome.message)

    def hold(self, copy: PendingCopy, arrived: float) -> None:
        """Hold a message whose delay isn't over yet."""
        self._hold_retries([copy], arrived)

    def _hold_retries(self, copies: Sequence[PendingCopy], arrived: float) -> list[PendingCopy]:
        """Hold the messages whose retries aren't due yet; return the copies of the others."""
        # Lists in place of generators, which cost a call for each message.
        if not self._has_warned_of_count and True in [each.malformed_count for each in copies]:
            self._has_warned_of_count = True
            header = self.planner.retry.header
            self._log.warning("a retry count is not a number: it counts as 0", header=header)
        due = [each for each in copies if not each.hold]
        if len(due) < len(copies):
            held = [each for each in copies if each.hold]
            for each in held:
                self.held.add_retry(each, arrived=arrived)
            if looping := sum(each.is_loop for each in held):
                self._looping.note(looping)
            if retries := sum(not (each.is_undeliverable or each.is_loop) for each in held):
                self._holding.note(retries)
        if undeliverable := sum([each.is_undeliverable for each in copies]):
            self._undeliverable.note(undeliverable)
        return due

    def _log_holding(self, count: int) -> None:
        if not self.held.messages:
            # The line comes a minute later, when all of them have been retried.
            return
        self._log.warning(
            "messages failed: the consumer holds them until their retry",
            messages=count,
            held=len(self.held.messages),
        )

    def _log_undeliverable(self, count: int) -> None:
        self._log.error(
            "messages failed for good, but no dead-letter destination is known: they are retried;"
            " set dead_letter_queue",
            messages=count,
            held=len(self.held.messages),
        )

    def _log_looping(self, count: int) -> None:
        self._log.warning(
            "messages are dead-lettered again and again: their dead letters may come back, a loop",
            messages=count,
            held=len(self.held.messages),
        )

    def _log_discarding(self, count: int) -> None:
        self._log.warning(
            "messages are rejected without a dead-letter destination: the broker discards them"
            " unless a policy dead-letters them",
            messages=count,
        )

    def _log_dead_lettering(self, count: int) -> None:
        self._log.warning("messages failed for good and were dead-lettered", messages=count)

    def _log_unpublishable(self, count: int) -> None:
        self._log.error(
            "copies can't be encoded, even without their largest headers: their messages are held",
            messages=count,
            held=len(self.held.messages),
        )

    def _on_discarded(self, outcomes: Sequence[MessageOutcome]) -> None:
        self._discarding.note(len(outcomes))
        if self._observers.present:
            messages = [each.message for each in outcomes]
            self._observers.emit(Discarded(messages))

    async def _publish_apart(
        self, settlements: Sequence[Settlement], copies: Sequence[PendingCopy], arrived: float
    ) -> Sequence[PendingCopy]:
        """Publish and settle; a queue that is silent delays only the copies that go there."""
        lanes: dict[object, list[PendingCopy]] = {}
        for copy in copies:
            lanes.setdefault(copy.lane, []).append(copy)
        if len(lanes) == 1:
            return await self._publish_and_settle(settlements, copies, arrived)
        first, *others = lanes.values()
        results = await asyncio.gather(
            *(self._publish_and_settle((), each, arrived) for each in others),
            self._publish_and_settle(settlements, first, arrived),
            return_exceptions=True,
        )
        confirmed: set[int] = set()
        for result in results:
            if isinstance(result, BaseException):
                raise result
            confirmed.update(each.tag for each in result)
        return [each for each in copies if each.tag in confirmed]

    async def _publish_and_settle(
        self, settlements: Sequence[Settlement], copies: Sequence[PendingCopy], arrived: float
    ) -> Sequence[PendingCopy]:
        """Publish the copies, then settle; return those that were confirmed.

        Settlements that need no copy wait behind the copies in the queue, as long as its patience
        lasts: then one frame can settle the whole batch.
        """
        ticket = self._queue.reserve()
        others = self._queue.enqueue(settlements) if settlements else None
        try:
            outcomes = await self._publish_beside(copies, others)
            if self.is_over:
                self.count_stale(len(copies))
                return ()
            confirmed = self._hold_unconfirmed(copies, outcomes, arrived)
            if confirmed:
                self._forget_replaced(confirmed)
                tags = tuple([each.tag for each in confirmed])
                await self._queue.settle([Settlement(Disposition.ACK, tags)], ticket)
        finally:
            self._queue.release(ticket)
        if others is not None:
            await others
        return confirmed

    async def _publish_beside(
        self, copies: Sequence[PendingCopy], others: asyncio.Future[None] | None
    ) -> Sequence[Outcome]:
        """Publish, unless the settlement of the other messages fails meanwhile.

        Raises:
            TransportError: It failed: the session can't settle the originals either.
        """
        if others is None:
            return await self._publish(copies)
        publishing = self._loop.create_task(self._publish(copies))

        def stop_publishing(settled: asyncio.Future[None]) -> None:
            if not settled.cancelled() and settled.exception() is not None:
                publishing.cancel()

        others.add_done_callback(stop_publishing)
        try:
            return await publishing
        except asyncio.CancelledError:
            if others.done():
                others.result()
            raise

    def _hold_unconfirmed(
        self, copies: Sequence[PendingCopy], outcomes: Sequence[Outcome], arrived: float
    ) -> Sequence[PendingCopy]:
        """Return the confirmed copies; hold the originals of the others."""
        if outcomes.count(Outcome.CONFIRMED) == len(copies):
            self._is_giving_back = False
            return copies
        confirmed = []
        for copy, outcome in zip(copies, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                confirmed.append(copy)
                continue
            # If its wait queue has turned out to be missing, it waits here.
            can_delay = self._publishers.retries.can_delay
            held = copy if can_delay else self.planner.held_instead(copy)
            if held is copy:
                self.held.add_unconfirmed(copy, outcome, arrived=arrived)
            else:
                self.hold(held, arrived)
        if confirmed:
            self._is_giving_back = False
        return confirmed

    async def _modify(
        self, changes: Sequence[PendingCopy], settlements: Sequence[Settlement] = ()
    ) -> None:
        """Modify messages instead of publishing copies of them, and settle others."""
        if self._modify_session is not None:
            pairs = [(cast("Modification", each.copy), each.tag) for each in changes]
            if self._own is not None:
                for (modification, _), each in zip(pairs, changes, strict=True):
                    self._own.note_retry(each.outcome.message, modification.headers)
            await self._modify_session.modify(join_modifications(pairs), settlements)

    async def _publish(self, copies: Sequence[PendingCopy]) -> Sequence[Outcome]:
        """Publish copies of one lane, or modify their originals."""
        if copies[0].is_native:
            await self._modify(copies)
            return [Outcome.CONFIRMED] * len(copies)
        began = self._loop.time()

        def on_late(index: int, outcome: Outcome) -> None:
            copies[index].late = outcome
            self.held.note_late()

        publisher = self._publishers.of(copies[0].kind)
        # Of one lane, and not native, so that each is a copy. A cast for each would cost a call.
        outgoing: list[Copy] = [each.copy for each in copies]  # type: ignore[misc]
        outcomes = list(await publisher.publish(outgoing, on_late))
        if Outcome.UNPUBLISHABLE in outcomes:
            for index, outcome in enumerate(outcomes):
                if outcome is Outcome.UNPUBLISHABLE:
                    outcomes[index] = self._on_unpublishable(copies[index])
        failed = len(outcomes) - outcomes.count(Outcome.CONFIRMED)
        if failed:
            self._emit_failed(Step.PUBLISH, failed, None, began)
        return outcomes

    def _on_unpublishable(self, copy: PendingCopy) -> Outcome:
        """Turn a retry into a dead letter, which is published next; hold any other original."""
        instead = self.planner.instead_of(copy, datetime.now(UTC))
        if instead is None:
            self._unpublishable.note(1)
            return Outcome.UNPUBLISHABLE
        copy.become(instead)
        return Outcome.UNSENT

    async def _publish_again(self, copies: Sequence[PendingCopy]) -> Sequence[Outcome]:
        try:
            return await self._publish(copies)
        except Exception as error:  # noqa: BLE001  -- otherwise they would be held until the end
            self._fail(error)
            return [Outcome.UNKNOWN] * len(copies)

    async def _settle_confirmed(self, copies: Sequence[PendingCopy]) -> None:
        began = self._loop.time()
        self._forget_replaced(copies)
        if tags := [each.tag for each in copies if not each.is_native]:
            await self._settle_or_fail(Disposition.ACK, tags)
        else:
            self._on_settled_late()
        if self._observers.present:
            outcomes = [each.outcome for each in copies if each.kind is not CopyKind.FRESH_COUNT]
            seconds = self._loop.time() - began
            self._observers.emit(Settled(_counts(BatchDecisions(), outcomes), seconds))
        self._emit_confirmed(copies)

    def _emit_failed(
        self, step: Step, count: int, error: BaseException | None, began: float
    ) -> None:
        self._observers.emit(SettleFailed(step, count, error, self._loop.time() - began))

    def _emit_confirmed(self, copies: Sequence[PendingCopy]) -> None:
        asked_for = (None, DeadLetterReason.REJECTED)
        failed = sum([each.reason not in asked_for for each in copies])
        if failed:
            self._dead_lettering.note(failed)
        wanted = self._observers.wanted
        for copy in copies if Requeued in wanted or DeadLettered in wanted else ():
            message = copy.outcome.message
            if copy.kind is CopyKind.FRESH_COUNT:
                continue
            if copy.reason is None:
                self._observers.emit(Requeued(message, message.retry_count + 1))
            else:
                self._observers.emit(DeadLettered(message, copy.reason))

    async def _give_back(self, copies: Sequence[PendingCopy]) -> None:
        # Returned messages come back and fail again: one line until a copy is confirmed.
        log = self._log.debug if self._is_giving_back else self._log.warning
        log(
            "copies are not confirmed: their originals go back to the broker",
            messages=len(copies),
        )
        self._is_giving_back = True
        await self._settle_or_fail(Disposition.RETURN, [each.tag for each in copies])

    async def _settle_or_fail(self, disposition: Disposition, tags: Sequence[int]) -> None:
        began = self._loop.time()
        try:
            await self._queue.settle([Settlement(disposition, tuple(tags))])
        except Exception as error:  # noqa: BLE001  -- otherwise they would stay unsettled
            self._emit_failed(Step.SETTLE, len(tags), error, began)
            self._fail(error)
        self._on_settled_late()

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, TransportError):
            self._log.error("held originals could not be settled", exc_info=error)
            error = SessionLost(f"held originals could not be settled: {format_error(error)}")
        self._on_failure(error)

    def count_stale(self, count: int) -> None:
        """Report results that come too late."""
        self._log.warning(
            "results came for a session that is gone; the broker delivers these messages again",
            messages=count,
        )
        self._observers.emit(StaleResults(count))

    async def close(self, unstarted: Sequence[Message], wait: Wait) -> None:
        """Let running attempts finish, and return what is left to the broker."""
        held = await self.held.close(wait)
        # Without the rest of their delay, but counted: what is only returned has no attempt less.
        native = [each for each in held if each.is_native]
        if native and Outcome.CONFIRMED in await self._publish_again(native):
            await self._settle_confirmed(native)
        returned = [each.outcome.message for each in held if not each.is_native]
        messages = [*unstarted, *returned]
        plan = self.planner.plan_returns(messages, datetime.now(UTC), self._own)
        replaced: set[int] = set()
        if plan.copies:
            publishing = self._loop.create_task(self._publish_again(plan.copies))
            await wait({publishing})
            if publishing.done():
                pairs = zip(plan.copies, publishing.result(), strict=True)
                replaced = {each.tag for each, outcome in pairs if outcome is Outcome.CONFIRMED}
            else:
                publishing.cancel()
        self._forget(each for each in messages if each.delivery_tag in replaced)
        if replaced:
            await self._settle_or_fail(Disposition.ACK, sorted(replaced))
        if left := [tag for each in messages if (tag := each.delivery_tag) not in replaced]:
            await self._settle_or_fail(Disposition.RETURN, left)

    async def abort(self) -> None:
        """Stop at once: the session is gone."""
        self.is_over = True
        self._queue.abort()
        for log in (
            self._holding,
            self._undeliverable,
            self._looping,
            self._discarding,
            self._dead_lettering,
            self._unpublishable,
        ):
            log.flush()
        await self.held.abort()


def _counts(
    decisions: BatchDecisions, direct: Sequence[MessageOutcome]
) -> Counter[tuple[MessageResult | None, Cause]]:
    counts: Counter[tuple[MessageResult | None, Cause]] = Counter(
        (_plain(each.result), each.cause) for each in direct
    )
    if decisions.acked:
        counts[MessageResult.ACK, Cause.HANDLER] = len(decisions.acked)
    if decisions.returned:
        counts[None, Cause.SHUTDOWN] = len(decisions.returned)
    return counts


def _plain(result: Result) -> MessageResult:
    match result:
        case Nack():
            return MessageResult.NACK
        case Requeue():
            return MessageResult.REQUEUE
        case MessageResult():
            return result
