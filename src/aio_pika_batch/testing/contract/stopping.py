"""Clauses about the regular end of a session: cancel and close."""

from __future__ import annotations

import asyncio

from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.errors import SessionClosed
from aio_pika_batch.testing.contract.checks import (
    CheckContext,
    ClauseBroken,
    bodies_of,
    expect,
    expect_error,
    settlement,
)
from aio_pika_batch.testing.contract.clause import ClauseGroup

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
        await ctx.harness.put([b"late"])
        expect([], await reader.take_to_the_end(), "the received messages")
        await ctx.expect_count(1)


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
    async with ctx.transport.session(ctx.subscription()):
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
    async with ctx.transport.session(ctx.subscription()) as session:
        waiting = asyncio.ensure_future(anext(aiter(session)))
        await asyncio.sleep(ctx.quiet)
    with expect_error(SessionClosed, "waiting for messages while the session closes"):
        await asyncio.wait({waiting}, timeout=ctx.patience)
        if not waiting.done():
            waiting.cancel()
            raise ClauseBroken("the receive still waits")
        await waiting
