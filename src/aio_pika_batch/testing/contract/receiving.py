"""Clauses about queues, and the messages that a session delivers from them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aio_pika_batch.core.message import FieldValue, Message
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.topology import (
    Exchange,
    PublishCheck,
    Queue,
    Topology,
    UnfulfilledWishes,
)
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.testing.contract.checks import (
    CONSUMER_TAG,
    CheckContext,
    ClauseBroken,
    ClauseGroup,
    bodies_of,
    expect,
    expect_error,
    expect_rising_tags,
    settlement,
)
from aio_pika_batch.transport import (
    AdjustableSession,
    ConfirmingSession,
    CountingTransport,
    InspectingTransport,
    ModifyingSession,
    NativeSession,
    ProvingSession,
    PumpingSession,
    Session,
    VersionedTransport,
)

GROUP = ClauseGroup()

_MOST_TURNS = 6
"""A receive is cancelled after up to this many turns of the event loop."""


@GROUP.clause("every message is delivered once")
async def _once(ctx: CheckContext) -> None:
    bodies = await ctx.put(50)
    async with ctx.read() as reader:
        messages = await reader.take(50)
        expect(sorted(bodies), sorted(bodies_of(messages)), "the received messages")
        await reader.expect_nothing()
        await reader.settle(Disposition.ACK, messages)


@GROUP.clause("messages are delivered in the order of their queue", "keeps_order")
async def _in_order(ctx: CheckContext) -> None:
    bodies = await ctx.put(50)
    async with ctx.read() as reader:
        expect(bodies, bodies_of(await reader.take(50)), "the received messages")


@GROUP.clause("chunks are never empty, and their delivery tags increase")
async def _tags_rise(ctx: CheckContext) -> None:
    await ctx.put(30)
    async with ctx.read(prefetch=10) as reader:
        for _ in range(3):
            await reader.settle(Disposition.ACK, await reader.take(10))
        expect(True, all(reader.chunks), "that no chunk is empty")
        expect_rising_tags(reader.messages)
        expect(True, reader.messages[0].delivery_tag > 0, "that tags are positive")


@GROUP.clause("a new message has its queue and consumer tag, and is not marked as redelivered")
async def _new_message(ctx: CheckContext) -> None:
    await ctx.harness.put([b"body"])
    async with ctx.read() as reader:
        [message] = await reader.take(1)
        expect(b"body", message.body, "the body")
        expect(ctx.queue, message.queue, "the queue")
        expect(CONSUMER_TAG, message.consumer_tag, "the consumer tag")
        expect(False, message.redelivered, "whether it is redelivered")
        expect(0, message.retry_count, "the retry count")


@GROUP.clause("a body of any size arrives unchanged, even an empty one")
async def _any_size(ctx: CheckContext) -> None:
    bodies = [b"", bytes(range(256)), bytes(300_000)]
    await ctx.harness.put(bodies)
    async with ctx.read() as reader:
        found = bodies_of(await reader.take(len(bodies)))
        expect(list(map(len, sorted(bodies))), list(map(len, sorted(found))), "the bodies' sizes")
        expect(True, sorted(bodies) == sorted(found), "that the bodies are the same")


@GROUP.clause("a message that comes later wakes a waiting receive")
async def _wakes_receive(ctx: CheckContext) -> None:
    async with ctx.read() as reader:
        await reader.expect_nothing()
        await ctx.harness.put([b"late"])
        expect([b"late"], bodies_of(await reader.take(1)), "the messages that came")


@GROUP.clause("a session has at most prefetch unsettled messages")
async def _prefetch(ctx: CheckContext) -> None:
    await ctx.put(10)
    async with ctx.read(prefetch=3) as reader:
        messages = await reader.take(3)
        await reader.expect_nothing()
        await ctx.expect_count(7)
        await reader.settle(Disposition.ACK, messages[:1])
        await reader.take(1)
        await reader.expect_nothing()


@GROUP.clause("a prefetch of 0 means no limit")
async def _no_limit(ctx: CheckContext) -> None:
    await ctx.put(300)
    async with ctx.read(prefetch=0) as reader:
        await reader.take(300)


@GROUP.clause("cancelling a receive loses no message")
async def _cancelled_receive(ctx: CheckContext) -> None:
    expected: list[bytes] = []
    found: list[bytes] = []
    async with ctx.session() as session:
        chunks = aiter(session)
        # Cancel before a message comes, while it comes, and after it has come.
        for turns in range(_MOST_TURNS):
            receiving = asyncio.ensure_future(anext(chunks, None))
            await asyncio.sleep(0)
            body = b"%d" % turns
            expected.append(body)
            await ctx.harness.put([body])
            for _ in range(turns):
                await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.wait({receiving})
            if not receiving.cancelled():
                found.extend(bodies_of(_chunk(receiving.result())))
        try:
            async with asyncio.timeout(ctx.patience):
                while len(found) < len(expected):
                    found.extend(bodies_of(_chunk(await anext(chunks, None))))
        except TimeoutError:
            raise ClauseBroken(f"of {expected!r} only {found!r} came") from None
        expect(expected, sorted(found), "the messages that came")


def _chunk(chunk: Sequence[Message] | None) -> Sequence[Message]:
    if chunk is None:
        raise ClauseBroken("the iteration has ended")
    return chunk


@GROUP.clause("a session has exactly the abilities that the features claim")
async def _as_claimed(ctx: CheckContext) -> None:
    async with ctx.session() as session:
        for claimed, protocol, what in (
            (ctx.features.pumps, PumpingSession, "it can pump"),
            (ctx.features.adjusts, AdjustableSession, "it can be paused"),
            (ctx.features.proves, ProvingSession, "it knows what is unproven"),
            (ctx.features.retries, ModifyingSession, "it can modify messages"),
            (ctx.features.confirms_settlements, ConfirmingSession, "it confirms settlements"),
            (ctx.features.has_native, NativeSession, "it has native objects"),
        ):
            expect(claimed, isinstance(session, protocol), f"whether {what}")
        if isinstance(session, ModifyingSession):
            expect(ctx.features.delays, session.retries.delays, "whether it can delay messages")


@GROUP.clause("pumping delivers the same messages as iterating, and ends after cancel", "pumps")
async def _pumps(ctx: CheckContext) -> None:
    bodies = await ctx.put(50)
    seen: list[Message] = []
    async with ctx.session() as session:
        pumping = asyncio.create_task(_pumping(session).pump(seen.extend))
        await ctx.expect_count(0)
        expect(bodies, sorted(bodies_of(seen), key=int), "the pumped messages")
        expect_rising_tags(seen)
        await ctx.harness.put([b"later"])
        await ctx.expect_count(0)
        expect(b"later", seen[-1].body, "the message that came while it pumped")
        await session.cancel()
        async with asyncio.timeout(ctx.patience):
            await pumping
        await session.settle([settlement(Disposition.ACK, seen)])
    await ctx.expect_messages([])


@GROUP.clause("pump raises what its sink raises, and does not call the sink again", "pumps")
async def _sink_fails(ctx: CheckContext) -> None:
    calls = 0

    def sink(_: Sequence[Message]) -> None:
        nonlocal calls
        calls += 1
        raise LookupError("the sink is broken")

    async with ctx.session() as session:
        await ctx.harness.put([b"1"])
        pumping = _pumping(session)
        with expect_error(LookupError, "pumping into a sink that fails"):
            async with asyncio.timeout(ctx.patience):
                await pumping.pump(sink)
        await ctx.harness.put([b"2"])
        await asyncio.sleep(ctx.quiet)
        expect(1, calls, "how often the sink was called")
    await ctx.expect_messages([b"1", b"2"])


def _pumping(session: Session) -> PumpingSession:
    if not isinstance(session, PumpingSession):
        raise ClauseBroken("the session has no method pump")
    return session


@GROUP.clause("native objects are opened once", "has_native")
async def _native(ctx: CheckContext) -> None:
    async with ctx.session() as session:
        if not isinstance(session, NativeSession):
            raise ClauseBroken("the session has no method native")
        first, second = await session.native(), await session.native()
        expect(True, first.channel is second.channel, "that there is one channel")


# --- queues ---------------------------------------------------------------------------


def _topology(ctx: CheckContext, **more: Any) -> Topology:  # noqa: ANN401  -- Queue's own
    return Topology(queues=(Queue(ctx.harness.fresh, **more),))


@GROUP.clause("declaring nothing is allowed")
async def _nothing(ctx: CheckContext) -> None:
    await ctx.transport.declare(Topology())


@GROUP.clause("a declared queue exists, and declaring it again changes nothing", "declares")
async def _declared(ctx: CheckContext) -> None:
    for _ in range(2):
        await ctx.transport.declare(_topology(ctx))
        expect(0, await ctx.harness.count(ctx.harness.fresh), "messages in the new queue")


@GROUP.clause("check_only creates nothing, and accepts an existing queue", "declares")
async def _check_only(ctx: CheckContext) -> None:
    with expect_error(TopologyError, "checking for a missing queue"):
        await ctx.transport.declare(_topology(ctx, check_only=True))
    expect(None, await ctx.harness.count(ctx.harness.fresh), "messages in the checked queue")
    await ctx.transport.declare(ctx.existing)


@GROUP.clause("existing_first accepts an existing queue as it is", "declares", "compares")
async def _existing_first(ctx: CheckContext) -> None:
    await ctx.transport.declare(_topology(ctx, arguments={"x-max-length": 5}))
    await ctx.transport.declare(_topology(ctx, existing_first=True))


@GROUP.clause(
    "declaring an existing queue with other arguments raises TopologyError", "declares", "compares"
)
async def _different_arguments(ctx: CheckContext) -> None:
    await ctx.transport.declare(_topology(ctx))
    with expect_error(TopologyError, "declaring a queue with other arguments"):
        await ctx.transport.declare(_topology(ctx, arguments={"x-max-length": 5}))


@GROUP.clause("consuming from a missing queue raises TopologyError")
async def _missing(ctx: CheckContext) -> None:
    with expect_error(TopologyError, "consuming from a missing queue"):
        async with ctx.session(queue=ctx.harness.fresh):
            pass


@GROUP.clause("an exclusive consumer's queue refuses a second session", "exclusive_consumers")
async def _exclusive_consumer(ctx: CheckContext) -> None:
    async with ctx.session(exclusive=True):
        with expect_error(TopologyError, "consuming beside an exclusive consumer"):
            async with ctx.session():
                pass


@GROUP.clause("an exclusive queue is deleted when its session closes", "exclusive_queues")
async def _exclusive_queue(ctx: CheckContext) -> None:
    fresh = ctx.harness.fresh
    own = _topology(ctx, exclusive=True)
    for _ in range(2):
        async with ctx.read(queue=fresh, own=own) as reader:
            await reader.settle(Disposition.ACK, [])
            with expect_error(TopologyError, "consuming another session's own queue"):
                async with ctx.session(queue=fresh):
                    pass
        await ctx.expect_count(None, fresh)


@GROUP.clause("the broker's version is known after a declaration", "tells_version")
async def _version(ctx: CheckContext) -> None:
    transport = ctx.transport
    if not isinstance(transport, VersionedTransport):
        raise ClauseBroken("the transport has no broker_version")
    await transport.declare(ctx.existing)
    expect(True, bool(transport.broker_version), "whether there is a version")


@GROUP.clause(
    "count counts ready messages, and raises TopologyError for a missing queue", "counts_ready"
)
async def _count(ctx: CheckContext) -> None:
    transport = ctx.transport
    if not isinstance(transport, CountingTransport):
        raise ClauseBroken("the transport has no method count")
    with expect_error(TopologyError, "counting in a missing queue"):
        await transport.count(ctx.harness.fresh)
    await ctx.put(3)
    await ctx.expect_count(3)
    expect(3, await transport.count(ctx.queue), "the count of messages")


_WISHES = {"x-max-length": 5, "x-message-ttl": 60_000}


async def _unfulfilled(ctx: CheckContext, queue: Queue) -> UnfulfilledWishes:
    found = await ctx.transport.declare(Topology(queues=(queue,))) or {}
    return found.get(queue.name, UnfulfilledWishes())


@GROUP.clause("a new queue gets the arguments of its wishes", "inspects")
async def _wishes(ctx: CheckContext) -> None:
    wanted = Queue(ctx.harness.fresh, wishes=_WISHES)
    for _ in range(2):
        found = await _unfulfilled(ctx, wanted)
        expect(UnfulfilledWishes(), found, "what the queue was declared without")
    with expect_error(TopologyError, "declaring the queue without its wishes"):
        await ctx.transport.declare(_topology(ctx))


@GROUP.clause("an existing queue is accepted without wishes, and they are reported", "inspects")
async def _unfulfilled_wishes(ctx: CheckContext) -> None:
    cases: list[tuple[dict[str, FieldValue], UnfulfilledWishes]] = [
        ({}, UnfulfilledWishes(lacking=_WISHES)),
        ({"x-max-length": 5}, UnfulfilledWishes(lacking={"x-message-ttl": 60_000})),
        (
            {"x-message-ttl": 1000},
            UnfulfilledWishes({"x-max-length": 5}, {"x-message-ttl": 1000}),
        ),
    ]
    for number, (arguments, expected) in enumerate(cases):
        name = f"{ctx.harness.fresh}.{number}"
        await ctx.transport.declare(Topology(queues=(Queue(name, arguments=arguments),)))
        found = await _unfulfilled(ctx, Queue(name, wishes=_WISHES))
        expect(expected, found, f"what a queue with {arguments} was declared without")


@GROUP.clause("wishes do not hide that an existing queue has other arguments", "inspects")
async def _wishes_compare(ctx: CheckContext) -> None:
    await ctx.transport.declare(_topology(ctx, arguments={"x-expires": 60_000}))
    with expect_error(TopologyError, "declaring a queue with other arguments and wishes"):
        await ctx.transport.declare(_topology(ctx, wishes=_WISHES))


@GROUP.clause("exchange_type finds the type of an exchange, and creates none", "inspects")
async def _exchange_type(ctx: CheckContext) -> None:
    transport = ctx.transport
    if not isinstance(transport, InspectingTransport):
        raise ClauseBroken("the transport has no method exchange_type")
    for kind in ("direct", "fanout", "topic", "headers"):
        for taken_for in ("direct", "topic"):
            found = await transport.exchange_type(Exchange(f"amq.{kind}", taken_for))
            expect(kind, found, f"the type of amq.{kind}")
    missing = Exchange(f"{ctx.harness.fresh}.x", "topic")
    for _ in range(2):
        expect(None, await transport.exchange_type(missing), "the type of a missing exchange")


@GROUP.clause("what can be published to is checked without storing anything", "inspects")
async def _publish_check(ctx: CheckContext) -> None:
    check = PublishCheck("", ctx.queue)
    await ctx.transport.declare(Topology(publishes=(check, PublishCheck("amq.fanout", ""))))
    await ctx.expect_count(0)
    missing = PublishCheck(f"{ctx.harness.fresh}.x", "")
    with expect_error(TopologyError, "checking a missing exchange"):
        await ctx.transport.declare(Topology(publishes=(check, missing)))
    await ctx.expect_count(0)
