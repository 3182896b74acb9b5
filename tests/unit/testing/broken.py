# ruff: noqa: D101  -- what is wrong with each is its name
"""Transports that each break one clause of the contract, around a correct one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, ClassVar, TypeAlias

from aio_pika_batch.adapters.memory import MemoryTransport
from aio_pika_batch.adapters.memory.session import (
    MemoryModifyingSession,
    MemoryPublisher,
    MemorySession,
)
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Copy, Outcome, Outgoing, Publication
from aio_pika_batch.core.settlement import Disposition, Modification, Settlement
from aio_pika_batch.core.topology import Exchange, Queue, Topology, UnfulfilledWishes
from aio_pika_batch.errors import (
    BrokerUnavailable,
    SessionClosed,
    SessionLost,
    SettlementError,
    TopologyError,
    TransportError,
)
from aio_pika_batch.transport import Native, NativeRetries, Subscription

Unfulfilled: TypeAlias = Mapping[str, UnfulfilledWishes]


class HonestSession:
    """Passes everything on unchanged."""

    def __init__(self, inner: MemorySession) -> None:
        self.inner = inner

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        return aiter(self.inner)

    async def cancel(self) -> None:
        await self.inner.cancel()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        await self.inner.settle(settlements)

    async def pause(self) -> None:
        await self.inner.pause()

    async def resume(self, prefetch: int) -> None:
        await self.inner.resume(prefetch)

    @property
    def unproven(self) -> int:
        return self.inner.unproven

    async def settled(self) -> None:
        await self.inner.settled()

    async def native(self) -> Native:
        return await self.inner.native()

    async def leave(self) -> None:
        """Called before the session closes."""


class HonestModifyingSession(HonestSession):
    """Passes everything on unchanged, over AMQP 1.0."""

    inner: MemoryModifyingSession

    @property
    def retries(self) -> NativeRetries:
        return self.inner.retries

    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        await self.inner.modify(modifications, settlements)


class HonestPublisher:
    """Passes everything on unchanged."""

    def __init__(self, inner: MemoryPublisher) -> None:
        self.inner = inner

    @property
    def is_open(self) -> bool:
        return self.inner.is_open

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        return await self.inner.publish(publications)

    @property
    def on_late(self) -> Any:
        return self.inner.on_late

    @on_late.setter
    def on_late(self, on_late: Any) -> None:
        self.inner.on_late = on_late


class Honest:
    """A transport that passes everything on unchanged."""

    session_class: ClassVar[type[HonestSession]] = HonestSession
    publisher_class: ClassVar[type[HonestPublisher]] = HonestPublisher

    def __init__(self, inner: MemoryTransport) -> None:
        self.inner = inner

    @property
    def broker_version(self) -> Any:
        return self.inner.broker_version

    async def declare(self, topology: Topology) -> Unfulfilled:
        return await self.inner.declare(topology)

    async def exchange_type(self, exchange: Exchange) -> str | None:
        return await self.inner.exchange_type(exchange)

    async def count(self, queue: str) -> int:
        return await self.inner.count(queue)

    def subscription(self, subscription: Subscription) -> Subscription:
        return subscription

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[HonestSession]:
        async with self.inner.session(self.subscription(subscription)) as inner:
            session = self.session_class(inner)
            try:
                yield session
            finally:
                with suppress(TransportError):
                    await session.leave()

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[HonestPublisher]:
        async with self.inner.publisher() as publisher:
            yield self.publisher_class(publisher)


# --- what is handed out ----------------------------------------------------------------


class ReordersChunks(HonestSession):
    async def __aiter__(self):
        async for chunk in self.inner:
            yield list(reversed(chunk))


class SwapsBodies(HonestSession):
    async def __aiter__(self):
        async for chunk in self.inner:
            for message, body in zip(chunk, [each.body for each in reversed(chunk)], strict=True):
                message.body = body
            yield chunk


class HandsOutTwice(HonestSession):
    async def __aiter__(self):
        async for chunk in self.inner:
            yield chunk
            yield chunk[-1:]


class HandsOutNothing(HonestSession):
    async def __aiter__(self):
        async for chunk in self.inner:
            yield []
            yield chunk


class LosesWhatIsReadWhenCancelled(HonestSession):
    def __aiter__(self):
        return self

    async def __anext__(self):
        if not hasattr(self, "chunks"):
            self.chunks = aiter(self.inner)
        chunk = await anext(self.chunks)
        await asyncio.sleep(0)
        return chunk


class IsAGenerator(HonestSession):
    """A generator ends when it is cancelled."""

    async def __aiter__(self):
        async for chunk in self.inner:
            yield chunk


class LosesEmptyBodies(HonestSession):
    async def __aiter__(self):
        async for chunk in self.inner:
            if kept := [message for message in chunk if message.body]:
                yield kept


class ForgetsItsQueue(HonestSession):
    async def __aiter__(self):
        async for chunk in self.inner:
            source = replace(self.inner._source, queue="?")
            for message in chunk:
                message._source = source
            yield chunk


class ForgetsThatItWasDelivered(HonestSession):
    async def __aiter__(self):
        async for chunk in self.inner:
            for message in chunk:
                message.redelivered = False
            yield chunk


class MissesLaterMessages(HonestSession):
    async def __aiter__(self):
        chunks = aiter(self.inner)
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout(0):
                    chunk = await anext(chunks)
                yield chunk
        await asyncio.Event().wait()


class Pumps(HonestSession):
    async def pump(self, sink: Any) -> None:
        async for chunk in self.inner:
            sink(chunk)


class PumpsTheFirstOfEach(Pumps):
    async def pump(self, sink: Any) -> None:
        await super().pump(lambda chunk: sink(chunk[:1]))


class PumpsForEver(Pumps):
    async def pump(self, sink: Any) -> None:
        await super().pump(sink)
        await asyncio.Event().wait()


class PumpsOn(Pumps):
    async def pump(self, sink: Any) -> None:
        def careless(chunk: Sequence[Message]) -> None:
            with suppress(LookupError):
                sink(chunk)

        await super().pump(careless)


class NativeAgainAndAgain(HonestSession):
    async def native(self) -> Native:
        self.inner._native = None
        return await self.inner.native()


# --- how it ends -----------------------------------------------------------------------


class StopsReadingAtCancel(HonestSession):
    cancelled = False

    async def __aiter__(self):
        async for chunk in self.inner:
            if self.cancelled:
                return
            yield chunk

    async def cancel(self) -> None:
        self.cancelled = True
        await self.inner.cancel()


class LosesTheRestAtCancel(HonestSession):
    """Messages that it has read and not yielded are lost with the consumer."""

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not hasattr(self, "chunks"):
            self.chunks = aiter(self.inner)
            self.rest: list[Message] = []
        if not self.rest:
            self.rest = list(await anext(self.chunks))
        return [self.rest.pop(0)]

    async def cancel(self) -> None:
        await self.inner.cancel()
        if hasattr(self, "rest"):
            self.rest.clear()


class CancelDoesNotEndAReceive(HonestSession):
    async def __aiter__(self):
        async for chunk in self.inner:
            yield chunk
        await asyncio.Event().wait()


class NeverCancels(HonestSession):
    async def cancel(self) -> None:
        self.inner._check()


class CancelsOnce(HonestSession):
    cancelled = False

    async def cancel(self) -> None:
        if self.cancelled:
            raise RuntimeError("cancelled already")
        self.cancelled = True
        await self.inner.cancel()


class SettlesNothingAfterCancel(HonestSession):
    cancelled = False

    async def cancel(self) -> None:
        self.cancelled = True
        await self.inner.cancel()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        if not self.cancelled:
            await self.inner.settle(settlements)


class SettlesFewAfterCancel(HonestSession):
    """The channel of a quorum queue keeps the others, and drops them when it is closed."""

    settled: int | None = None

    async def cancel(self) -> None:
        await self.inner.cancel()
        self.settled = 0

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        if self.settled is not None:
            self.settled += 1
        if self.settled is None or self.settled <= 33:
            await self.inner.settle(settlements)


class SettlesFewInAPause(SettlesFewAfterCancel):
    """The same; and the cancel of a paused session is nothing that a queue would answer."""

    async def cancel(self) -> None:
        await self.inner.cancel()

    async def pause(self) -> None:
        await self.inner.pause()
        self.settled = 0


class NeverProves(HonestSession):
    @property
    def unproven(self) -> int:
        return 1


class AcksOnLeaving(HonestSession):
    async def leave(self) -> None:
        unsettled = self.inner._channel.unsettled
        if unsettled:
            self.inner._channel.ack(unsettled[-1], multiple=True)


class AcksWhatItNeverHandedOut(HonestSession):
    async def leave(self) -> None:
        unsettled = self.inner._channel.unsettled
        if unsettled and not len(self.inner._ledger):
            self.inner._channel.ack(unsettled[-1], multiple=True)


class IsSilentAfterItsEnd(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        with suppress(SessionClosed):
            await self.inner.settle(settlements)


class EndsQuietlyWhenLeft(HonestSession):
    async def __aiter__(self):
        with suppress(SessionClosed):
            async for chunk in self.inner:
                yield chunk


class LeavesWaitersAlone(HonestSession):
    async def __aiter__(self):
        try:
            async for chunk in self.inner:
                yield chunk
        except SessionClosed:
            await asyncio.Event().wait()


# --- pausing ---------------------------------------------------------------------------


class PausesNothing(HonestSession):
    async def pause(self) -> None:
        self.inner._check()


class ResumesAsBefore(HonestSession):
    async def resume(self, prefetch: int) -> None:
        await self.inner.resume(self.inner._subscription.prefetch)


class CountsWhatCameBefore(HonestSession):
    """As a broker does that still knows the consumer by its tag."""

    async def resume(self, prefetch: int) -> None:
        if prefetch == 0 or len(self.inner._ledger) < prefetch:
            await self.inner.resume(prefetch)


class StopsReadingAtPause(HonestSession):
    paused = False

    async def __aiter__(self):
        async for chunk in self.inner:
            if not self.paused:
                yield chunk

    async def pause(self) -> None:
        self.paused = True
        await self.inner.pause()

    async def resume(self, prefetch: int) -> None:
        self.paused = False
        await self.inner.resume(prefetch)


class ResumesTwice(HonestSession):
    async def resume(self, prefetch: int) -> None:
        self.inner._consumer_tag = ""
        await self.inner.resume(prefetch)


class ResumesAfterItsEnd(HonestSession):
    async def resume(self, prefetch: int) -> None:
        self.inner._is_cancelled = False
        await self.inner.resume(prefetch)


class CancelsTheFirstConsumer(HonestSession):
    async def cancel(self) -> None:
        self.inner._consumer_tag = self.inner._subscription.consumer_tag
        await self.inner.cancel()


class PausesSilentlyAfterItsEnd(HonestSession):
    async def pause(self) -> None:
        with suppress(SessionClosed):
            await self.inner.pause()


class ResumesSilentlyAfterALoss(HonestSession):
    async def resume(self, prefetch: int) -> None:
        with suppress(SessionLost):
            await self.inner.resume(prefetch)


# --- modifying -------------------------------------------------------------------------


class ForgetsHeaders(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        await self.inner.modify([replace(each, headers={}) for each in modifications], settlements)


class KeepsTheFirstHeaders(HonestModifyingSession):
    has_modified = False

    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        if self.has_modified:
            modifications = [replace(each, headers={}) for each in modifications]
        self.has_modified = True
        await self.inner.modify(modifications, settlements)


class ModifiesAllAlike(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        await self.inner.modify(
            [replace(modifications[0], tags=each.tags) for each in modifications], settlements
        )


class ForgetsDelays(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        await self.inner.modify([replace(each, until=None) for each in modifications], settlements)


class DropsDelays(ForgetsDelays):
    @property
    def retries(self) -> NativeRetries:
        return replace(self.inner.retries, delays=False)


class HoldsWhatIsDelayed(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        if not any(each.until for each in modifications):
            await self.inner.modify(modifications, settlements)


class TakesAbsoluteDelays(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        now = datetime.now(UTC)
        later = [
            replace(each, until=now + abs(each.until - now) if each.until else None)
            for each in modifications
        ]
        await self.inner.modify(later, settlements)


class RejectsWhatIsDead(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        await self.inner.settle(settlements)
        for each in modifications:
            if each.dead:
                await self.inner.settle([Settlement(Disposition.REJECT, each.tags)])
            else:
                await self.inner.modify([each])


class CountsAllRetries(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        await self.inner.modify([replace(each, failed=True) for each in modifications], settlements)


class WritesAnyHeader(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        try:
            await self.inner.modify(modifications, settlements)
        except SettlementError as error:
            if "header" not in str(error):
                raise
            await self.inner.modify(
                [replace(each, headers={}) for each in modifications], settlements
            )


class ModifiesOneByOne(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        for each in modifications:
            for tag in each.tags:
                await self.inner.modify([replace(each, tags=(tag,))])
        await self.inner.settle(settlements)


class ForgetsWhatIsSettledWithModifications(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        await self.inner.modify(modifications)


class SettlesBeforeItModifies(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        if settlements:
            await self.inner.settle(settlements)
        await self.inner.modify(modifications)


class ReturnsAfterCancel(HonestModifyingSession):
    is_cancelled = False

    async def cancel(self) -> None:
        await self.inner.cancel()
        self.is_cancelled = True

    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        if self.is_cancelled:
            modifications = [replace(each, headers={}) for each in modifications]
        await self.inner.modify(modifications, settlements)


class ModifiesSilentlyAfterItsEnd(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        with suppress(SessionClosed):
            await self.inner.modify(modifications, settlements)


class ModifiesSilentlyAfterALoss(HonestModifyingSession):
    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        with suppress(SessionLost):
            await self.inner.modify(modifications, settlements)


class ConfirmsAtOnce(HonestModifyingSession):
    async def settled(self) -> None:
        if self.inner._channel.close_reason or self.inner._has_ended:
            await self.inner.settled()


class ConfirmsOnlyOnce(HonestSession):
    has_confirmed = False

    async def settled(self) -> None:
        if not self.has_confirmed or self.inner._channel.close_reason or self.inner._has_ended:
            await self.inner.settled()
        self.has_confirmed = True


class ConfirmsAfterALoss(HonestSession):
    async def settled(self) -> None:
        with suppress(SessionLost):
            await self.inner.settled()


class ConfirmsAfterItsEnd(HonestSession):
    async def settled(self) -> None:
        with suppress(SessionClosed):
            await self.inner.settled()


# --- settling --------------------------------------------------------------------------


class SettlesTwiceSilently(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        with suppress(SettlementError):
            await self.inner.settle(settlements)


class SettlesHalfOfWhatItRefuses(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        try:
            await self.inner.settle(settlements)
        except SettlementError:
            for tag in {tag for each in settlements for tag in each.tags}:
                with suppress(SettlementError):
                    await self.inner.settle([Settlement(Disposition.ACK, (tag,))])
            raise


class EndsWhenItRefuses(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        try:
            await self.inner.settle(settlements)
        except SettlementError:
            self.inner._lost_reason = "refused"
            raise


class LosesAnAck(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        self.inner._check()
        await self.inner.settle(
            [
                replace(each, tags=each.tags[1:]) if each.disposition is Disposition.ACK else each
                for each in settlements
            ]
        )


class AcksAllBefore(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        acked = [
            tag for each in settlements if each.disposition is Disposition.ACK for tag in each.tags
        ]
        await self.inner.settle(settlements)
        before = [tag for tag in self.inner._channel.unsettled if tag < max(acked, default=0)]
        if before:
            await self.inner.settle([Settlement(Disposition.ACK, tuple(before))])


class Confuses(HonestSession):
    """Settles with another disposition."""

    what: Disposition
    with_what: Disposition

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        await self.inner.settle(
            [
                replace(each, disposition=self.with_what) if each.disposition is self.what else each
                for each in settlements
            ]
        )


class RejectsByAck(Confuses):
    what, with_what = Disposition.REJECT, Disposition.ACK


class RejectsByRequeue(Confuses):
    what, with_what = Disposition.REJECT, Disposition.REQUEUE


class RequeuesByReturn(Confuses):
    what, with_what = Disposition.REQUEUE, Disposition.RETURN


class ReturnsByRequeue(Confuses):
    what, with_what = Disposition.RETURN, Disposition.REQUEUE


class ReturnsByReject(Confuses):
    what, with_what = Disposition.RETURN, Disposition.REJECT


class SettlesUpToAHundred(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        await self.inner.settle([replace(each, tags=each.tags[:100]) for each in settlements])


class SettlesAllAsTheFirst(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        await self.inner.settle(
            [replace(each, disposition=settlements[0].disposition) for each in settlements]
        )


class GivesBackAtTheEnd(HonestSession):
    """Publishes messages again, as a broker without redelivery would have to."""

    async def __aiter__(self):
        self.bodies: dict[int, bytes] = {}
        async for chunk in self.inner:
            self.bodies |= {message.delivery_tag: message.body for message in chunk}
            yield chunk

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        back = {Disposition.REQUEUE, Disposition.RETURN}
        for each in settlements:
            for tag in each.tags if each.disposition in back else ():
                self.inner._connection._host.put("q", self.bodies[tag])
        await self.inner.settle(
            [
                replace(each, disposition=Disposition.ACK) if each.disposition in back else each
                for each in settlements
            ]
        )


class TakesTagZero(HonestSession):
    """As on the wire, where tag 0 means all messages."""

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        tags = tuple(
            tag
            for each in settlements
            for tag in (each.tags if 0 not in each.tags else self.inner._channel.unsettled)
        )
        await self.inner.settle([replace(each, tags=tags) for each in settlements])


class SettlesTagsOfOtherSessions(HonestSession):
    """Has one ledger for all sessions."""

    books: ClassVar[list[MemorySession]] = []

    def __init__(self, inner: MemorySession) -> None:
        super().__init__(inner)
        self.books.append(inner)

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        for session in [self.inner, *self.books]:
            with suppress(TransportError):
                return await session.settle(settlements)
        return await self.inner.settle(settlements)


class FailsOnNothing(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        if not any(each.tags for each in settlements):
            raise ValueError("nothing to settle")
        await self.inner.settle(settlements)


# --- losses ----------------------------------------------------------------------------


class HidesItsLoss(HonestSession):
    async def __aiter__(self):
        with suppress(SessionLost):
            async for chunk in self.inner:
                yield chunk


class IgnoresTheEndOfItsSubscription(HonestSession):
    async def __aiter__(self):
        try:
            async for chunk in self.inner:
                yield chunk
        except SessionLost as lost:
            if "cancelled" in str(lost):
                await asyncio.Event().wait()
            raise


class SettlesSilentlyAfterALoss(HonestSession):
    async def settle(self, settlements: Sequence[Settlement]) -> None:
        with suppress(SessionLost):
            await self.inner.settle(settlements)


# --- publishing ------------------------------------------------------------------------


class ConfirmsItself(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        self.sending = asyncio.ensure_future(self.inner.publish(publications))
        self.sending.add_done_callback(asyncio.Future.exception)
        await asyncio.sleep(0)
        return [Outcome.CONFIRMED] * len(publications)


class RaisesWhatIsUnknown(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        outcomes = await self.inner.publish(publications)
        if Outcome.UNKNOWN in outcomes:
            raise ConnectionError
        return outcomes


class IsAlwaysOpen(HonestPublisher):
    @property
    def is_open(self) -> bool:
        return True


class RefusesWhatIsTooLarge(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        outcomes = await self.inner.publish(publications)
        unpublishable = Outcome.UNPUBLISHABLE
        return [Outcome.REFUSED if each is unpublishable else each for each in outcomes]


class KeepsAllHeaders(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        whole = [
            replace(each, spare=(), may_omit=False) if isinstance(each, Copy) else each
            for each in publications
        ]
        return await self.inner.publish(whole)


class ForgetsWhatIsLate(HonestPublisher):
    on_late = None


class ReversesOutcomes(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        return list(reversed(await self.inner.publish(publications)))


class PublishesTwice(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        await self.inner.publish(publications[:1])
        return await self.inner.publish(publications)


class PublishesBackwards(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        return (await self.inner.publish(publications[::-1]))[::-1]


class MixesCalls(HonestPublisher):
    """Answers a call with the outcomes of another one."""

    def __init__(self, inner: MemoryPublisher) -> None:
        super().__init__(inner)
        self.heard: list[Outcome] = []

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        self.heard += await self.inner.publish(publications)
        await asyncio.sleep(1)
        count = len(publications)
        taken, self.heard = self.heard[-count:], self.heard[:-count]
        return taken


class ReturnsNoCopy(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        return await self.inner.publish(
            [
                replace(each, mandatory=False) if isinstance(each, Copy) else each
                for each in publications
            ]
        )


class LosesTheLast(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        outcomes = await self.inner.publish(publications[:-1])
        return [*outcomes, Outcome.CONFIRMED][: len(publications)]


class HidesRefusals(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        refused = Outcome.REFUSED
        return [
            Outcome.CONFIRMED if each is refused else each
            for each in await self.inner.publish(publications)
        ]


class NeedsSomething(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        if not publications:
            raise ValueError("nothing to publish")
        return await self.inner.publish(publications)


class NeverConfirms(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        await asyncio.Event().wait()
        return await self.inner.publish(publications)


class ClosesWhenCancelled(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        try:
            return await self.inner.publish(publications)
        except asyncio.CancelledError:
            self.inner._connection.close()
            raise


class PublishesAfterItsEnd(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        try:
            return await self.inner.publish(publications)
        except SessionClosed:
            return [Outcome.UNKNOWN] * len(publications)


class Changes(HonestPublisher):
    """Changes each copy, or each publication."""

    copy: ClassVar[dict[str, Any]] = {}
    publication: ClassVar[dict[str, Any]] = {}

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        return await self.inner.publish(
            [
                replace(each, **(self.copy if isinstance(each, Copy) else self.publication))
                for each in publications
            ]
        )


class DropsNothing(Changes):
    copy: ClassVar = {"drop": frozenset()}


class AddsNothing(Changes):
    copy: ClassVar = {"add": {}}


class NeverExpires(Changes):
    copy: ClassVar = {"keep_expiration": False, "expiration": None}


class InventsAPriority(Changes):
    publication: ClassVar = {"priority": 0}


class CopiesWithoutProperties(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        for each in publications:
            if isinstance(each, Copy):
                each.message.properties.message_id = None
        return await self.inner.publish(publications)


class CopiesAnyUserId(HonestPublisher):
    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        self.inner._connection.user = next(
            (each.properties.user_id for each in publications if each.properties.user_id), "guest"
        )
        return await self.inner.publish(publications)


# --- transports ------------------------------------------------------------------------


class DeliversOneMore(Honest):
    def subscription(self, subscription: Subscription) -> Subscription:
        return replace(subscription, prefetch=subscription.prefetch + 1)


class LimitsWithoutAPrefetch(Honest):
    def subscription(self, subscription: Subscription) -> Subscription:
        return replace(subscription, prefetch=subscription.prefetch or 100)


class NeverAlone(Honest):
    def subscription(self, subscription: Subscription) -> Subscription:
        return replace(subscription, exclusive=False)


class KeepsOwnQueues(Honest):
    def subscription(self, subscription: Subscription) -> Subscription:
        return replace(subscription, own=Topology())

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[HonestSession]:
        queues = tuple(replace(queue, exclusive=False) for queue in subscription.own.queues)
        await self.inner.declare(Topology(queues=queues))
        async with super().session(subscription) as session:
            yield session


class CreatesWhatItChecks(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        queues = tuple(replace(queue, check_only=False) for queue in topology.queues)
        return await self.inner.declare(replace(topology, queues=queues))


class ComparesAlways(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        queues = tuple(replace(queue, existing_first=False) for queue in topology.queues)
        return await self.inner.declare(replace(topology, queues=queues))


class ComparesNever(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        queues = tuple(
            queue if queue.check_only else replace(queue, existing_first=True)
            for queue in topology.queues
        )
        return await self.inner.declare(replace(topology, queues=queues))


class DeclaresNothing(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        return await self.inner.declare(Topology())


class DeclaresSomethingOnly(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        if not topology.queues:
            raise ValueError("nothing to declare")
        return await self.inner.declare(topology)


class IgnoresWishes(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        queues = tuple(replace(queue, wishes={}) for queue in topology.queues)
        return await self.inner.declare(replace(topology, queues=queues))


class ReportsNothing(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        await self.inner.declare(topology)
        return {}


class AcceptsAnyQueueWithWishes(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        try:
            return await self.inner.declare(topology)
        except TopologyError:
            if not any(queue.wishes for queue in topology.queues):
                raise
            return {}


class BelievesWhatItIsTold(Honest):
    async def exchange_type(self, exchange: Exchange) -> str | None:
        found = await self.inner.exchange_type(exchange)
        return None if found is None else exchange.type


class PublishesToCheck(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        report = await self.inner.declare(topology)
        async with self.inner.publisher() as publisher:
            await publisher.publish(
                [
                    Publication(b"", exchange=each.exchange, routing_key=each.routing_key)
                    for each in topology.publishes
                ]
            )
        return report


class ForgetsItsBroker(Honest):
    broker_version = None


class CountsOneMore(Honest):
    async def count(self, queue: str) -> int:
        return 1 + await self.inner.count(queue)


class CreatesWhatItConsumes(Honest):
    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[HonestSession]:
        await self.inner.declare(Topology(queues=(Queue(subscription.queue, existing_first=True),)))
        async with super().session(subscription) as session:
            yield session


class RaisesItsClientsErrors(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        try:
            return await self.inner.declare(topology)
        except TransportError as error:
            raise OSError(str(error)) from error


class DeclaresNothingWithoutConnecting(Honest):
    async def declare(self, topology: Topology) -> Unfulfilled:
        if topology == Topology():
            return {}
        return await self.inner.declare(topology)


class OpensSessionsAnyway(Honest):
    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[Any]:
        try:
            async with super().session(subscription) as session:
                yield session
        except BrokerUnavailable:
            yield object()


class OpensPublishersAnyway(Honest):
    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Any]:
        try:
            async with super().publisher() as publisher:
                yield publisher
        except BrokerUnavailable:
            yield object()


class Bare:
    """A transport with required methods only."""

    def __init__(self, inner: MemoryTransport) -> None:
        self.declare, self.publisher = inner.declare, inner.publisher
        self.inner = inner

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[BareSession]:
        async with self.inner.session(subscription) as session:
            yield BareSession(session)


class BareSession:
    def __init__(self, inner: MemorySession) -> None:
        self.cancel, self.settle = inner.cancel, inner.settle
        self.iterator = inner.__aiter__

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        return self.iterator()


class SwallowsExceptions(Honest):
    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[HonestSession]:
        with suppress(LookupError):
            async with super().session(subscription) as session:
                yield session


def as_transport(wrong: type) -> type[Honest]:
    """Return a transport whose sessions or publishers are of this class, or the class itself."""
    if issubclass(wrong, HonestSession):
        return type(wrong.__name__, (Honest,), {"session_class": wrong})
    if issubclass(wrong, HonestPublisher):
        return type(wrong.__name__, (Honest,), {"publisher_class": wrong})
    assert issubclass(wrong, Honest)
    return wrong
