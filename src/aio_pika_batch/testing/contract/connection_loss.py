"""Clauses about sessions and publishers that lose their connection."""

from __future__ import annotations

import asyncio

from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.topology import Topology
from aio_pika_batch.errors import BrokerUnavailable, SessionLost
from aio_pika_batch.testing.contract.checks import (
    CheckContext,
    ClauseBroken,
    SessionReader,
    bodies_of,
    expect,
    expect_error,
    settlement,
)
from aio_pika_batch.testing.contract.clause import ClauseGroup
from aio_pika_batch.transport import Publisher

GROUP = ClauseGroup()


async def _expect_lost(reader: SessionReader) -> None:
    """Expect that the session is lost, whatever is received before it notices the loss."""
    with expect_error(SessionLost, "receiving after the loss"):
        await reader.take_to_the_end()


@GROUP.clause("a cut connection raises SessionLost from receive, settle and cancel", "can_cut")
async def _cut(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        messages = await reader.take(1)
        await reader.expect_nothing()
        await ctx.harness.cut()
        await _expect_lost(reader)
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
        await _expect_lost(lost)
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
        await _expect_lost(reader)
        with expect_error(SessionLost, "settling after the loss"):
            await reader.session.settle([settlement(Disposition.ACK, messages)])


@GROUP.clause("a publisher that has lost its connection is closed, and stays closed", "can_cut")
async def _publisher_cut(ctx: CheckContext) -> None:
    before = Publication(b"before", routing_key=ctx.queue)
    async with ctx.transport.publisher() as publisher:
        expect([Outcome.CONFIRMED], list(await publisher.publish([before])), "the outcome before")
        expect(True, publisher.is_open, "is_open before")
        await ctx.harness.cut()
        await _expect_closed(ctx, publisher)
        # It reports the loss by its outcomes, raises nothing, and never opens again.
        late = Publication(b"late", routing_key=ctx.queue)
        expect([Outcome.UNKNOWN], list(await publisher.publish([late])), "the outcome after")
        expect(False, publisher.is_open, "is_open after")
    await ctx.expect_messages([b"before"])


@GROUP.clause(
    "the outcome of publications in flight on a lost connection is UNKNOWN", "can_cut", "can_hush"
)
async def _in_flight(ctx: CheckContext) -> None:
    publications = [Publication(b"%d" % n, routing_key=ctx.queue) for n in range(3)]
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
        async with ctx.transport.session(ctx.subscription()):
            pass
    with expect_error(BrokerUnavailable, "opening a publisher"):
        async with ctx.transport.publisher():
            pass
