"""Clauses about settlements and their refusal, and about sessions that pause their deliveries."""

from __future__ import annotations

from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.errors import SessionClosed, SessionLost, SettlementError
from aio_pika_batch.testing.contract.checks import (
    CheckContext,
    ClauseBroken,
    ClauseGroup,
    bodies_of,
    expect,
    expect_error,
    expect_rising_tags,
    settlement,
)
from aio_pika_batch.transport import AdjustableSession, Session

GROUP = ClauseGroup()

_TO_QUEUE = (Disposition.REQUEUE, Disposition.RETURN)


@GROUP.clause("an acked message does not come back after the session")
async def _acked(ctx: CheckContext) -> None:
    await ctx.put(10)
    async with ctx.read() as reader:
        await reader.settle(Disposition.ACK, await reader.take(10))
    await ctx.expect_messages([])


@GROUP.clause("an ack settles its own tags only, and no earlier ones")
async def _own_tags(ctx: CheckContext) -> None:
    await ctx.put(10)
    async with ctx.read() as reader:
        messages = await reader.take(10)
        await reader.settle(Disposition.ACK, messages[1::2])
    await ctx.expect_messages(bodies_of(messages[0::2]))


@GROUP.clause("hundreds of acks that cannot be combined are not lost when the session closes")
async def _many_acks(ctx: CheckContext) -> None:
    await ctx.put(500)
    async with ctx.read() as reader:
        first, *others = await reader.take(500)
        await reader.settle(Disposition.ACK, others)
    await ctx.expect_messages([first.body])


@GROUP.clause("a rejected message is removed from its queue")
async def _rejected(ctx: CheckContext) -> None:
    await ctx.put(3)
    async with ctx.read() as reader:
        await reader.settle(Disposition.REJECT, await reader.take(3))
        await reader.expect_nothing()
    await ctx.expect_messages([])


@GROUP.clause("a rejected message is dead-lettered, and an acked one is not", "dead_letters")
async def _dead_lettered(ctx: CheckContext) -> None:
    await ctx.put(4)
    async with ctx.read() as reader:
        messages = await reader.take(4)
        await reader.session.settle(
            [
                settlement(Disposition.REJECT, messages[:2]),
                settlement(Disposition.ACK, messages[2:]),
            ]
        )
    await ctx.expect_messages(bodies_of(messages[:2]), ctx.harness.dead_letters)


@GROUP.clause("requeued and returned messages are delivered again")
async def _again(ctx: CheckContext) -> None:
    for disposition in _TO_QUEUE:
        bodies = await ctx.put(3)
        async with ctx.read() as reader:
            messages = await reader.take(3)
            await reader.settle(disposition, messages)
            again = await reader.take(3)
            expect(bodies, sorted(bodies_of(again)), f"the messages after {disposition.name}")
            old = {message.delivery_tag for message in messages}
            expect(set(), old & {each.delivery_tag for each in again}, "reused tags")
            await reader.settle(Disposition.ACK, again)
        await ctx.expect_messages([])


@GROUP.clause("a message that is delivered again is marked as redelivered", "marks_redelivered")
async def _redelivered(ctx: CheckContext) -> None:
    await ctx.put(2)
    async with ctx.read() as reader:
        for disposition in _TO_QUEUE:
            await reader.settle(disposition, await reader.take(2))
        again = await reader.take(2)
        expect([True, True], [message.redelivered for message in again], "whether they are marked")
    async with ctx.read() as reader:
        marks = [message.redelivered for message in await reader.take(2)]
        expect([True, True], marks, "whether they are marked in the next session")


@GROUP.clause("requeued and returned messages are delivered again before new ones", "keeps_place")
async def _keeps_place(ctx: CheckContext) -> None:
    await ctx.put(3)
    async with ctx.read(prefetch=1) as reader:
        for disposition in _TO_QUEUE:
            [message] = await reader.take(1)
            expect(b"0", message.body, f"the message before {disposition.name}")
            await reader.settle(disposition, [message])
        expect([b"0"], bodies_of(await reader.take(1)), "the last message")


@GROUP.clause("a requeued message counts its deliveries", "counts_deliveries")
async def _counted(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        for count in range(3):
            [message] = await reader.take(1)
            expect(count, message.delivery_count or 0, "delivery_count")
            await reader.settle(Disposition.REQUEUE, [message])


@GROUP.clause("a returned message does not count as delivered", "spares_returns")
async def _spared(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        for _ in range(3):
            [message] = await reader.take(1)
            expect(0, message.delivery_count or 0, "delivery_count")
            await reader.settle(Disposition.RETURN, [message])


@GROUP.clause("each message of a mixed call is settled with its own disposition")
async def _mixed(ctx: CheckContext) -> None:
    bodies = await ctx.put(60)
    async with ctx.read() as reader:
        messages = await reader.take(60)
        # Every fifth message stays unsettled.
        of = {each: messages[start::5] for start, each in enumerate(Disposition)}
        await reader.session.settle([settlement(each, those) for each, those in of.items()])
        back = bodies_of([*of[Disposition.REQUEUE], *of[Disposition.RETURN]])
        again = await reader.take(len(back))
        expect(sorted(back), sorted(bodies_of(again)), "the messages that came again")
        await reader.settle(Disposition.ACK, again)
    if ctx.features.dead_letters:
        await ctx.expect_messages(bodies_of(of[Disposition.REJECT]), ctx.harness.dead_letters)
    gone = {*back, *bodies_of(of[Disposition.ACK]), *bodies_of(of[Disposition.REJECT])}
    await ctx.expect_messages(set(bodies) - gone)


@GROUP.clause("messages can be settled after cancel")
async def _after_cancel(ctx: CheckContext) -> None:
    await ctx.put(4)
    async with ctx.read() as reader:
        messages = await reader.take(4)
        await reader.session.cancel()
        await reader.session.settle(
            [
                settlement(Disposition.RETURN, messages[:1]),
                settlement(Disposition.ACK, messages[1:]),
            ]
        )
        await ctx.expect_count(1)
    await ctx.expect_messages(bodies_of(messages[:1]))


@GROUP.clause("settling nothing is allowed")
async def _nothing(ctx: CheckContext) -> None:
    bodies = await ctx.put(1)
    async with ctx.read() as reader:
        await reader.take(1)
        await reader.session.settle([])
        await reader.settle(Disposition.ACK, [])
    await ctx.expect_messages(bodies)


# --- settlements that are refused -----------------------------------------------------
#
# A broker that gets a tag twice closes the channel, or settles another message. So the
# session that delivers a tag must know whether it is settled.


@GROUP.clause("a tag that is already settled is refused, together with the rest of the call")
async def _twice(ctx: CheckContext) -> None:
    for disposition in Disposition:
        await ctx.put(2)
        async with ctx.read() as reader:
            first, second = await reader.take(2)
            await reader.settle(Disposition.ACK, [first])
            with expect_error(SettlementError, f"{disposition.name} of a settled tag"):
                await reader.settle(disposition, [second, first])
        # Nothing was sent: the other message was still unsettled when the session closed.
        await ctx.expect_messages([second.body])


@GROUP.clause("a tag that occurs twice in one call is refused, and nothing is sent")
async def _twice_at_once(ctx: CheckContext) -> None:
    await ctx.put(2)
    async with ctx.read() as reader:
        first, second = messages = await reader.take(2)
        with expect_error(SettlementError, "a tag twice in one settlement"):
            await reader.settle(Disposition.ACK, [first, second, first])
        with expect_error(SettlementError, "a tag in two settlements"):
            await reader.session.settle(
                [settlement(Disposition.ACK, messages), settlement(Disposition.REJECT, [second])]
            )
    await ctx.expect_messages([first.body, second.body])


@GROUP.clause("a tag that was never delivered is refused, and nothing is sent")
async def _never_delivered(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        [message] = await reader.take(1)
        tag = message.delivery_tag
        for wrong in (0, tag + 1, tag + 1000):
            with expect_error(SettlementError, f"tag {wrong}, when {tag} is the only one"):
                await reader.session.settle([Settlement(Disposition.ACK, (tag, wrong))])
    await ctx.expect_messages([message.body])


@GROUP.clause("a tag of another session is refused")
async def _other_session(ctx: CheckContext) -> None:
    await ctx.put(3)
    async with ctx.read(consumer_tag="one") as one:
        theirs = await one.take(3)
        async with ctx.read(consumer_tag="two") as two:
            with expect_error(SettlementError, "a tag of another session"):
                await two.settle(Disposition.ACK, theirs)
            await one.settle(Disposition.ACK, theirs[:1])
    await ctx.expect_messages([message.body for message in theirs[1:]])


@GROUP.clause("a session still works after it has refused a settlement")
async def _goes_on(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        messages = await reader.take(1)
        with expect_error(SettlementError, "tag 0"):
            await reader.session.settle([Settlement(Disposition.REJECT, (0,))])
        await reader.settle(Disposition.ACK, messages)
        await ctx.harness.put([b"next"])
        await reader.settle(Disposition.ACK, await reader.take(1))
    await ctx.expect_messages([])


# --- pauses ---------------------------------------------------------------------------


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
        expect_rising_tags((*before, after, last))
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
async def _pause_again(ctx: CheckContext) -> None:
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
async def _cancel_paused(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _adjustable(reader.session)
        await session.pause()
        await reader.expect_nothing()
        await reader.session.cancel()
        await session.resume(1)
        await ctx.expect_nothing_new(reader)


@GROUP.clause("cancel ends a resumed session", "adjusts")
async def _cancel_resumed(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _adjustable(reader.session)
        await session.pause()
        await session.resume(1)
        await reader.session.cancel()
        await ctx.expect_nothing_new(reader)


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
async def _pause_closed(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _adjustable(reader.session)
    with expect_error(SessionClosed, "pausing after the close"):
        await session.pause()
    with expect_error(SessionClosed, "resuming after the close"):
        await session.resume(1)


@GROUP.clause("a lost session raises SessionLost from pause and resume", "adjusts", "can_cut")
async def _pause_lost(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _adjustable(reader.session)
        await reader.expect_nothing()
        await ctx.harness.cut()
        await reader.expect_lost()
        with expect_error(SessionLost, "pausing after the loss"):
            await session.pause()
        with expect_error(SessionLost, "resuming after the loss"):
            await session.resume(1)
