"""Clauses about messages that are modified in their queue, and about confirmed settlements."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from aio_pika_batch.core.message import FieldValue, Message
from aio_pika_batch.core.settlement import Disposition, Modification
from aio_pika_batch.errors import SessionClosed, SessionLost, SettlementError
from aio_pika_batch.testing.contract.checks import (
    CheckContext,
    ClauseBroken,
    ClauseGroup,
    SessionReader,
    bodies_of,
    expect,
    expect_error,
    settlement,
)
from aio_pika_batch.transport import ConfirmingSession, ModifyingSession, Session

GROUP = ClauseGroup()

_EARLY = 0.02
"""Seconds that a delay may be too short, because two clocks are compared."""


def _modifying(session: Session) -> ModifyingSession:
    if not isinstance(session, ModifyingSession):
        raise ClauseBroken("the session has no method modify")
    return session


def _confirming(session: Session) -> ConfirmingSession:
    if not isinstance(session, ConfirmingSession):
        raise ClauseBroken("the session has no method settled")
    return session


def _modification(messages: Iterable[Message], **how: Any) -> Modification:  # noqa: ANN401  -- Modification's own
    return Modification(tuple(message.delivery_tag for message in messages), **how)


async def _modify(reader: SessionReader, messages: Iterable[Message], **how: object) -> None:
    await _modifying(reader.session).modify([_modification(messages, **how)])


def _shown(message: Message, headers: dict[str, FieldValue]) -> dict[str, FieldValue]:
    return {name: message.headers.get(name) for name in headers}


@GROUP.clause(
    "a modified message comes back once, with headers that replace earlier ones", "retries"
)
async def _headers(ctx: CheckContext) -> None:
    await ctx.put(2)
    first: dict[str, FieldValue] = {"x-count": 1, "x-text": "grün", "x-flag": True, "x-empty": ""}
    second: dict[str, FieldValue] = {"x-count": -(2**63), "x-text": "rot"}
    async with ctx.read() as reader:
        await _modify(reader, await reader.take(2), headers=first)
        for message in await reader.take(2):
            expect(True, message.redelivered, "whether it is marked as redelivered")
            expect(first, _shown(message, first), "the headers")
        await reader.expect_nothing()
        await _modify(reader, reader.messages[2:], headers=second)
        for message in await reader.take(2):
            expect({**first, **second}, _shown(message, first), "the headers after the second time")
        await reader.settle(Disposition.ACK, reader.messages[4:])
    await ctx.expect_messages([])


@GROUP.clause("each modification of one call changes its own messages", "retries")
async def _several(ctx: CheckContext) -> None:
    await ctx.put(40)
    async with ctx.read() as reader:
        messages = await reader.take(40)
        changes = [_modification(messages[at::4], headers={"x-no": at}) for at in range(3)]
        await _modifying(reader.session).modify(changes)
        again = await reader.take(30)
        of = {body: at for at in range(3) for body in bodies_of(messages[at::4])}
        expect(of, {each.body: each.headers.get("x-no") for each in again}, "headers by body")
        await reader.settle(Disposition.ACK, again)
    await ctx.expect_messages(bodies_of(messages[3::4]))


@GROUP.clause("what is settled together with modifications is settled, all or none", "retries")
async def _settled_together(ctx: CheckContext) -> None:
    sent = await ctx.put(4)
    async with ctx.read() as reader:
        messages = await reader.take(4)
        acks = settlement(Disposition.ACK, messages[2:])
        unknown = Modification((messages[0].delivery_tag, messages[3].delivery_tag + 1))
        with expect_error(SettlementError, "modifying an unknown tag"):
            await _modifying(reader.session).modify([unknown], [acks])
    await ctx.expect_messages(sent)
    await ctx.put(4)
    async with ctx.read() as reader:
        messages = await reader.take(4)
        acks = settlement(Disposition.ACK, messages[2:])
        await _modifying(reader.session).modify([_modification(messages[:2])], [acks])
        again = await reader.take(2)
        expect(sorted(bodies_of(messages[:2])), sorted(bodies_of(again)), "what comes back")
        await reader.settle(Disposition.ACK, again)
    await ctx.expect_messages([])


@GROUP.clause(
    "a delayed message comes back when it is due, and others don't wait for it", "retries", "delays"
)
async def _delayed(ctx: CheckContext) -> None:
    loop = asyncio.get_running_loop()
    await ctx.put(1)
    async with ctx.read(prefetch=1) as reader:
        messages = await reader.take(1)
        until = datetime.now(UTC) + timedelta(seconds=3 * ctx.quiet + 0.5)
        await _modify(reader, messages, until=until, headers={"x-count": 1})
        # Only now: in virtual time, both clocks can't be compared over an interval.
        due = loop.time() + (until - datetime.now(UTC)).total_seconds()
        await ctx.harness.put([b"other"])
        # The delayed one doesn't count for the prefetch.
        [other] = await reader.take(1)
        expect(b"other", other.body, "the message that came first")
        await reader.settle(Disposition.ACK, [other])
        await reader.expect_nothing()
        [message] = await reader.take(1)
        expect(True, loop.time() >= due - _EARLY, "whether it came when it was due, or later")
        expect(1, message.headers.get("x-count"), "its header")
        await reader.settle(Disposition.ACK, [message])
    await ctx.expect_messages([])


@GROUP.clause("a delayed message stays in its queue after the session", "retries", "delays")
async def _delayed_after_the_end(ctx: CheckContext) -> None:
    bodies = await ctx.put(3)
    async with ctx.read() as reader:
        messages = await reader.take(3)
        until = datetime.now(UTC) + timedelta(seconds=3 * ctx.quiet + 0.5)
        await _modify(reader, messages, until=until)
    await ctx.expect_count(0)
    await ctx.expect_messages(bodies)


@GROUP.clause("a time in the past delays nothing", "retries", "delays")
async def _past(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        until = datetime.now(UTC) - timedelta(seconds=10)
        await _modify(reader, await reader.take(1), until=until)
        await reader.take(1)


@GROUP.clause(
    "a dead message goes to the dead-letter exchange with its headers", "retries", "dead_letters"
)
async def _dead(ctx: CheckContext) -> None:
    await ctx.put(2)
    dead_letters = ctx.harness.dead_letters
    async with ctx.read() as reader:
        messages = await reader.take(2)
        await _modify(reader, messages[:1], failed=False, dead=True, headers={"x-why": "because"})
    await ctx.expect_messages(bodies_of(messages[1:]))
    await ctx.expect_count(1, dead_letters)
    async with ctx.read(queue=dead_letters) as reader:
        [message] = await reader.take(1)
        expect((b"0", "because"), (message.body, message.headers.get("x-why")), "the dead letter")


@GROUP.clause(
    "a message that comes back with failed=False is counted only if it is claimed",
    "retries",
    "counts_deliveries",
)
async def _counted(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        uncounted = _modifying(reader.session).retries.uncounted
        expected = 0
        for failed in (False, True, False, True):
            [message] = await reader.take(1)
            expect(expected, message.delivery_count or 0, "delivery_count")
            await _modify(reader, [message], failed=failed)
            expected += failed or not uncounted


@GROUP.clause("a header that not everyone can read is refused, and nothing is sent", "retries")
async def _unreadable(ctx: CheckContext) -> None:
    await ctx.put(2)
    wrong: list[dict[str, object]] = [
        {"x-number": 0.5},
        {"x-nothing": None},
        {"x-large": 2**63},
        {"x-bytes": b"bytes"},
        {"x-list": [1]},
        {"count": 1},
    ]
    async with ctx.read() as reader:
        first, second = messages = await reader.take(2)
        for headers in wrong:
            with expect_error(SettlementError, f"the headers {headers}"):
                await _modifying(reader.session).modify(
                    [_modification([first]), _modification([second], headers=headers)]
                )
        await reader.expect_nothing()
        await reader.settle(Disposition.ACK, messages)
    await ctx.expect_messages([])


@GROUP.clause(
    "modifying a tag that is settled or unknown is refused, and nothing is sent", "retries"
)
async def _refused(ctx: CheckContext) -> None:
    await ctx.put(3)
    async with ctx.read() as reader:
        first, second, third = await reader.take(3)
        session = _modifying(reader.session)
        await reader.settle(Disposition.ACK, [first])
        unknown = third.delivery_tag + 1
        for tags in ((second.delivery_tag, first.delivery_tag), (second.delivery_tag, unknown)):
            with expect_error(SettlementError, f"modifying the tags {tags}"):
                await session.modify([Modification(tags)])
        with expect_error(SettlementError, "modifying a tag twice at once"):
            await session.modify([_modification([second]), _modification([second])])
        await reader.expect_nothing()
        await session.modify([_modification([second])])
        with expect_error(SettlementError, "settling a modified tag"):
            await reader.settle(Disposition.ACK, [third, second])
        await reader.settle(Disposition.ACK, [third, *await reader.take(1)])
    await ctx.expect_messages([])


@GROUP.clause("a delay is refused if the queue can't delay messages", "retries")
async def _undelayed(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        [message] = await reader.take(1)
        if not ctx.features.delays:
            with expect_error(SettlementError, "delaying a message"):
                await _modify(reader, [message], until=datetime.now(UTC) + timedelta(seconds=60))
            await reader.expect_nothing()
        await reader.settle(Disposition.ACK, [message])
    await ctx.expect_messages([])


@GROUP.clause("messages can be modified after cancel", "retries")
async def _after_cancel(ctx: CheckContext) -> None:
    bodies = await ctx.put(200)
    async with ctx.read() as reader:
        messages = await reader.take(200)
        await reader.session.cancel()
        await reader.take_to_the_end()
        for message in messages:
            await _modify(reader, [message], headers={"x-count": 1})
    await ctx.expect_count(200)
    async with ctx.read() as reader:
        again = await reader.take(200)
        expect({1}, {each.headers.get("x-count") for each in again}, "the headers")
        expect(sorted(bodies), sorted(bodies_of(again)), "the messages")


@GROUP.clause("a closed session raises SessionClosed from modify", "retries")
async def _closed(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        [message] = await reader.take(1)
    with expect_error(SessionClosed, "modifying after the close"):
        await _modify(reader, [message])


@GROUP.clause("a lost session raises SessionLost from modify", "retries", "can_cut")
async def _lost(ctx: CheckContext) -> None:
    bodies = await ctx.put(1)
    async with ctx.read() as reader:
        [message] = await reader.take(1)
        await ctx.harness.cut()
        await reader.expect_lost()
        with expect_error(SessionLost, "modifying after the loss"):
            await _modify(reader, [message], dead=True)
    await ctx.expect_messages(bodies)


@GROUP.clause(
    "what was settled before settled returned doesn't come back, even if the connection is cut",
    "confirms_settlements",
    "can_cut",
)
async def _confirmed(ctx: CheckContext) -> None:
    await ctx.put(201)
    async with ctx.read() as reader:
        first, *others = await reader.take(201)
        await reader.session.cancel()
        await reader.take_to_the_end()
        # One by one, and not all of them: otherwise one frame could settle all.
        for some in (others[100:], others[:100]):
            for message in reversed(some):
                await reader.settle(Disposition.ACK, [message])
            await _confirming(reader.session).settled()
        await ctx.harness.cut()
    await ctx.expect_messages([first.body])


@GROUP.clause("a lost session raises SessionLost from settled", "confirms_settlements", "can_cut")
async def _confirmed_after_a_loss(ctx: CheckContext) -> None:
    await ctx.put(1)
    async with ctx.read() as reader:
        session = _confirming(reader.session)
        await reader.take(1)
        await reader.session.cancel()
        await ctx.harness.cut()
        with expect_error(SessionLost, "waiting after the loss"):
            # A connection that was cut may look like an open one for a moment.
            async with asyncio.timeout(ctx.patience):
                while True:
                    await session.settled()
                    await asyncio.sleep(0.01)


@GROUP.clause("a closed session raises SessionClosed from settled", "confirms_settlements")
async def _confirmed_after_the_close(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        session = _confirming(reader.session)
        await reader.session.cancel()
    with expect_error(SessionClosed, "waiting after the close"):
        await session.settled()
