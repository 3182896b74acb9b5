"""Clauses about sessions that pause their deliveries, and resume them with another prefetch."""

from __future__ import annotations

from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.errors import SessionClosed, SessionLost
from aio_pika_batch.testing.contract.checks import (
    CheckContext,
    ClauseBroken,
    ClauseGroup,
    bodies_of,
    expect,
    expect_error,
)
from aio_pika_batch.transport import AdjustableSession, Session

GROUP = ClauseGroup()


def _adjustable(session: Session) -> AdjustableSession:
    if not isinstance(session, AdjustableSession):
        raise ClauseBroken("the session has no methods pause and resume")
    return session


@GROUP.clause("a paused session delivers nothing, and resumes with another prefetch", "adjusts")
async def _pause_and_resume(ctx: CheckContext) -> None:
    await ctx.put(10)
    async with ctx.read(prefetch=3) as reader:
        session = _adjustable(reader.session)
        messages = await reader.take(3)
        await session.pause()
        await reader.settle(Disposition.ACK, messages)
        await reader.expect_nothing()
        await ctx.expect_count(7)
        await session.resume(2)
        messages = await reader.take(2)
        await reader.expect_nothing()
        await reader.settle(Disposition.ACK, messages[:1])
        await reader.take(1)
        await reader.expect_nothing()
        await session.pause()
        await session.resume(0)
        await reader.take(4)


@GROUP.clause(
    "what was delivered before a pause can be settled, and doesn't count for the next prefetch",
    "adjusts",
)
async def _before_the_pause(ctx: CheckContext) -> None:
    bodies = await ctx.put(6)
    async with ctx.read(prefetch=3) as reader:
        session = _adjustable(reader.session)
        before = await reader.take(3)
        await session.pause()
        await session.resume(1)
        [after] = await reader.take(1)
        await reader.expect_nothing()
        await reader.settle(Disposition.ACK, before)
        await reader.expect_nothing()
        await reader.settle(Disposition.ACK, [after])
        [last] = await reader.take(1)
        tags = [message.delivery_tag for message in (*before, after, last)]
        expect(sorted(set(tags)), tags, "the tags")
    settled = set(bodies_of((*before, after)))
    await ctx.expect_messages(set(bodies) - settled)


@GROUP.clause("messages that arrived before a pause are still received", "adjusts", "prefetches")
async def _arrived_before(ctx: CheckContext) -> None:
    await ctx.put(20)
    async with ctx.read() as reader:
        await ctx.expect_count(0)
        await _adjustable(reader.session).pause()
        await reader.take(20)


@GROUP.clause(
    "pausing again changes nothing, and neither does resuming what isn't paused", "adjusts"
)
async def _again(ctx: CheckContext) -> None:
    await ctx.put(3)
    async with ctx.read(prefetch=1) as reader:
        session = _adjustable(reader.session)
        await session.resume(2)
        await reader.take(1)
        await reader.expect_nothing()
        await session.pause()
        await session.pause()
        await session.resume(1)
        await session.resume(1)
        await reader.take(1)
        await reader.expect_nothing()


@GROUP.clause("cancel ends a paused session, which can't be resumed then", "adjusts")
async def _cancelled(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _adjustable(reader.session)
        await session.pause()
        await reader.expect_nothing()
        await reader.session.cancel()
        await session.resume(1)
        await ctx.harness.put([b"late"])
        expect([], await reader.take_to_the_end(), "the received messages")
        await ctx.expect_count(1)


@GROUP.clause("cancel ends a resumed session", "adjusts")
async def _cancel_resumed(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _adjustable(reader.session)
        await session.pause()
        await session.resume(1)
        await reader.session.cancel()
        await ctx.harness.put([b"late"])
        expect([], await reader.take_to_the_end(), "the received messages")
        await ctx.expect_count(1)


@GROUP.clause("what is settled during a pause does not come back after the close", "adjusts")
async def _settled_in_pause(ctx: CheckContext) -> None:
    bodies = await ctx.put(201)
    async with ctx.read(prefetch=200) as reader:
        session = _adjustable(reader.session)
        messages = await reader.take(200)
        await session.pause()
        for message in reversed(messages):
            await reader.settle(Disposition.ACK, [message])
        await reader.session.cancel()
        await reader.take_to_the_end()
    await ctx.expect_messages(set(bodies) - set(bodies_of(messages)))


@GROUP.clause("a closed session raises SessionClosed from pause and resume", "adjusts")
async def _closed(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _adjustable(reader.session)
    with expect_error(SessionClosed, "pausing after the close"):
        await session.pause()
    with expect_error(SessionClosed, "resuming after the close"):
        await session.resume(1)


@GROUP.clause("a lost session raises SessionLost from pause and resume", "adjusts", "can_cut")
async def _lost(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _adjustable(reader.session)
        await reader.expect_nothing()
        await ctx.harness.cut()
        with expect_error(SessionLost, "receiving after the loss"):
            await reader.take_to_the_end()
        with expect_error(SessionLost, "pausing after the loss"):
            await session.pause()
        with expect_error(SessionLost, "resuming after the loss"):
            await session.resume(1)
