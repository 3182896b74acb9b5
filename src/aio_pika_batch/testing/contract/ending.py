"""Clauses about the end of sessions and publishers: cancel, close, and a lost connection."""

from __future__ import annotations

import asyncio

from aio_pika_batch.core.publication import Outcome, Outgoing
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.topology import Topology
from aio_pika_batch.errors import BrokerUnavailable, SessionClosed, SessionLost
from aio_pika_batch.testing.contract.checks import (
    CheckContext,
    ClauseBroken,
    ClauseGroup,
    bodies_of,
    expect,
    expect_error,
    settlement,
)
from aio_pika_batch.transport import ListeningPublisher, ProvingSession, Publisher

GROUP = ClauseGroup()


@GROUP.clause("after cancel, iteration yields what was delivered before, and then ends")
async def _cancel(ctx: CheckContext) -> None:
    bodies = await ctx.put(200)
    async with ctx.read(prefetch=50) as reader:
        first = await reader.chunk()
        expect(True, bool(first), "that a message came before")
        await reader.session.cancel()
        await reader.take_to_the_end()
        received = reader.messages
        expect(True, len(received) <= 50, "that prefetch was respected")
        await reader.settle(Disposition.ACK, received)
        # Before the close: that would return lost messages to the queue, and so hide the loss.
        await ctx.expect_count(200 - len(received))
    await ctx.expect_messages(set(bodies) - set(bodies_of(received)))


@GROUP.clause("messages that arrived before cancel are still received", "prefetches")
async def _cancel_at_once(ctx: CheckContext) -> None:
    await ctx.put(20)
    async with ctx.read() as reader:
        await ctx.expect_count(0)
        await reader.session.cancel()
        expect(20, len(await reader.take_to_the_end()), "messages received after cancel")


@GROUP.clause("after cancel, no new message is delivered")
async def _nothing_new(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        await reader.session.cancel()
        await ctx.expect_nothing_new(reader)


@GROUP.clause("cancel may be called again, and concurrently")
async def _cancel_again(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        messages = await reader.take(1)
        session = reader.session
        await asyncio.gather(session.cancel(), session.cancel())
        await session.cancel()
        expect([], await reader.take_to_the_end(), "the received messages")
        await session.cancel()
        await reader.settle(Disposition.ACK, messages)
    await ctx.expect_messages([])


@GROUP.clause("cancel ends a waiting receive")
async def _cancel_wakes_receive(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        await reader.expect_nothing()
        await reader.session.cancel()
        expect([], await reader.take_to_the_end(), "the received messages")


@GROUP.clause("hundreds of messages that are settled one by one after cancel do not come back")
async def _settle_singly(ctx: CheckContext) -> None:
    await ctx.put(200)
    async with ctx.read() as reader:
        messages = await reader.take(200)
        await reader.session.cancel()
        # From the last to the first, so that none of them can be joined with others.
        for number, message in enumerate(reversed(messages)):
            await reader.settle((Disposition.ACK, Disposition.REJECT)[number % 2], [message])
    await ctx.expect_messages([])


@GROUP.clause("no settlement is unproven after a regular close", "proves")
async def _proven(ctx: CheckContext) -> None:
    await ctx.put(100)
    async with ctx.read() as reader:
        session: object = reader.session
        messages = await reader.take(100)
        for message in messages[:50]:
            await reader.settle(Disposition.ACK, [message])
        await reader.session.cancel()
        for message in messages[50:]:
            await reader.settle(Disposition.ACK, [message])
    unproven = session.unproven if isinstance(session, ProvingSession) else None
    expect(0, unproven, "settlements that are unproven")


@GROUP.clause("unsettled messages go back to the queue when the session closes")
async def _close(ctx: CheckContext) -> None:
    bodies = await ctx.put(5)
    async with ctx.read() as reader:
        messages = await reader.take(5)
        await reader.settle(Disposition.ACK, [messages[0], messages[3]])
    acked = {messages[0].body, messages[3].body}
    await ctx.expect_messages(set(bodies) - acked)


@GROUP.clause("prefetched messages that were never received go back, too", "prefetches")
async def _close_unread(ctx: CheckContext) -> None:
    bodies = await ctx.put(5)
    async with ctx.session():
        await ctx.expect_count(0)
    await ctx.expect_messages(bodies)


@GROUP.clause("an exception passes through the session unchanged, and unsettled messages go back")
async def _close_by_exception(ctx: CheckContext) -> None:
    bodies = await ctx.put(2)

    async def fail() -> None:
        async with ctx.read() as reader:
            await reader.take(2)
            raise LookupError("raised by the check")

    with expect_error(LookupError, "closing the session by an exception"):
        await fail()
    await ctx.expect_messages(bodies)


@GROUP.clause("a closed session raises SessionClosed, and settles nothing")
async def _closed(ctx: CheckContext) -> None:
    bodies = await ctx.put(1)
    async with ctx.read() as reader:
        messages = await reader.take(1)
        session = reader.session
    with expect_error(SessionClosed, "settling after the close"):
        await session.settle([settlement(Disposition.ACK, messages)])
    with expect_error(SessionClosed, "cancelling after the close"):
        await session.cancel()
    with expect_error(SessionClosed, "receiving after the close"):
        await reader.chunk()
    await ctx.expect_messages(bodies)


@GROUP.clause("a receive that waits while the session closes raises SessionClosed")
async def _close_wakes_receive(ctx: CheckContext) -> None:
    async with ctx.session() as session:
        waiting = asyncio.ensure_future(anext(aiter(session)))
        await asyncio.sleep(ctx.quiet)
    with expect_error(SessionClosed, "waiting for messages while the session closes"):
        await asyncio.wait({waiting}, timeout=ctx.patience)
        if not waiting.done():
            waiting.cancel()
            raise ClauseBroken("the receive still waits")
        await waiting


# --- a lost connection ----------------------------------------------------------------


@GROUP.clause("a cut connection raises SessionLost from receive, settle and cancel", "can_cut")
async def _cut(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        messages = await reader.take(1)
        await reader.expect_nothing()
        await ctx.harness.cut()
        await reader.expect_lost()
        for disposition in Disposition:
            with expect_error(SessionLost, f"{disposition.name} after the loss"):
                await reader.settle(disposition, messages)
        with expect_error(SessionLost, "cancelling after the loss"):
            await reader.session.cancel()


@GROUP.clause(
    "messages of a lost session are delivered again, and only the next session can settle them",
    "can_cut",
)
async def _next_session(ctx: CheckContext) -> None:
    bodies = await ctx.put(3)
    async with ctx.read() as lost:
        messages = await lost.take(3)
        await lost.settle(Disposition.ACK, messages[:1])
        await ctx.expect_count(0)
        await ctx.harness.cut()
        await lost.expect_lost()
        async with ctx.read() as reader:
            again = await reader.take(2)
            expect(bodies[1:], sorted(bodies_of(again)), "the messages that came again")
            with expect_error(SessionLost, "settling in the lost session"):
                await lost.settle(Disposition.ACK, messages[1:])
            await reader.settle(Disposition.ACK, again[:1])
    await ctx.expect_messages([again[1].body])


@GROUP.clause("a subscription that the broker ends raises SessionLost", "can_end_subscriptions")
async def _subscription_ended(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        messages = await reader.take(1)
        await reader.expect_nothing()
        await ctx.harness.end_subscriptions()
        await reader.expect_lost()
        with expect_error(SessionLost, "settling after the loss"):
            await reader.session.settle([settlement(Disposition.ACK, messages)])


@GROUP.clause("a publisher that has lost its connection is closed, and stays closed", "can_cut")
async def _publisher_cut(ctx: CheckContext) -> None:
    before = ctx.to_queue(b"before")
    async with ctx.transport.publisher() as publisher:
        expect([Outcome.CONFIRMED], list(await publisher.publish([before])), "the outcome before")
        expect(True, publisher.is_open, "is_open before")
        await ctx.harness.cut()
        await _expect_closed(ctx, publisher)
        # It reports the loss by its outcomes, raises nothing, and never opens again.
        late = ctx.to_queue(b"late")
        expect([Outcome.UNKNOWN], list(await publisher.publish([late])), "the outcome after")
        expect(False, publisher.is_open, "is_open after")
    await ctx.expect_messages([b"before"])


@GROUP.clause(
    "the outcome of publications in flight on a lost connection is UNKNOWN", "can_cut", "can_hush"
)
async def _in_flight(ctx: CheckContext) -> None:
    publications = [ctx.to_queue(b"%d" % n) for n in range(3)]
    async with ctx.transport.publisher() as publisher:
        await ctx.harness.hush()
        publishing = asyncio.ensure_future(publisher.publish(publications))
        await asyncio.sleep(ctx.quiet)
        expect(False, publishing.done(), "whether publish was done before the broker answered")
        await ctx.harness.cut()
        async with asyncio.timeout(ctx.patience):
            outcomes = list(await publishing)
        expect([Outcome.UNKNOWN] * 3, outcomes, "the outcomes")
        await _expect_closed(ctx, publisher)


@GROUP.clause(
    "a publisher that listens stays open after its time limit, and reports late outcomes",
    "listens",
    "can_cut",
    "can_hush",
)
async def _late(ctx: CheckContext) -> None:
    publication = ctx.to_queue(b"0")
    late: list[tuple[Outgoing, Outcome]] = []
    async with ctx.transport.publisher() as publisher:
        if not isinstance(publisher, ListeningPublisher):
            raise ClauseBroken("on_late: expected as an attribute of the publisher")
        publisher.on_late = lambda *each: late.append(each)
        await ctx.harness.hush()
        outcomes = list(await publisher.publish([publication]))
        expect([Outcome.UNKNOWN], outcomes, "the outcomes after the time limit")
        expect(True, publisher.is_open, "is_open after the time limit")
        expect([], late, "the late outcomes before the connection is lost")
        await ctx.harness.cut()
        await _expect_closed(ctx, publisher)
        await asyncio.sleep(ctx.quiet)
        expect([(publication, Outcome.UNKNOWN)], late, "the late outcomes")


async def _expect_closed(ctx: CheckContext, publisher: Publisher) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ctx.patience
    while publisher.is_open:
        if loop.time() > deadline:
            raise ClauseBroken("is_open: expected to become False, and it did not")
        await asyncio.sleep(0.02)


@GROUP.clause("an unreachable broker raises BrokerUnavailable", "can_lock_out")
async def _unreachable(ctx: CheckContext) -> None:
    await ctx.harness.lock_out()
    with expect_error(BrokerUnavailable, "declaring"):
        await ctx.transport.declare(ctx.existing)
    with expect_error(BrokerUnavailable, "declaring nothing"):
        await ctx.transport.declare(Topology())
    with expect_error(BrokerUnavailable, "opening a session"):
        async with ctx.session():
            pass
    with expect_error(BrokerUnavailable, "opening a publisher"):
        async with ctx.transport.publisher():
            pass
