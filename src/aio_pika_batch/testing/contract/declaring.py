"""Clauses about declared, existing and missing queues."""

from __future__ import annotations

from typing import Any

from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.topology import Exchange, PublishCheck, Queue, Topology
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.testing.contract.checks import CheckContext, ClauseBroken, expect, expect_error
from aio_pika_batch.testing.contract.clause import ClauseGroup
from aio_pika_batch.transport import (
    CountingTransport,
    InspectingTransport,
    Transport,
    VersionedTransport,
)

GROUP = ClauseGroup()


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
        async with ctx.transport.session(ctx.subscription(queue=ctx.harness.fresh)):
            pass


@GROUP.clause("an exclusive consumer's queue refuses a second session", "exclusive_consumers")
async def _exclusive_consumer(ctx: CheckContext) -> None:
    async with ctx.transport.session(ctx.subscription(exclusive=True)):
        with expect_error(TopologyError, "consuming beside an exclusive consumer"):
            async with ctx.transport.session(ctx.subscription()):
                pass


@GROUP.clause("an exclusive queue is deleted when its session closes", "exclusive_queues")
async def _exclusive_queue(ctx: CheckContext) -> None:
    fresh = ctx.harness.fresh
    own = _topology(ctx, exclusive=True)
    for _ in range(2):
        async with ctx.read(queue=fresh, own=own) as reader:
            await reader.settle(Disposition.ACK, [])
            with expect_error(TopologyError, "consuming another session's own queue"):
                async with ctx.transport.session(ctx.subscription(queue=fresh)):
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


_WISHES = ({"x-max-length": 5, "x-message-ttl": 60_000}, {"x-max-length": 5})


async def _lacking(transport: Transport, queue: Queue) -> dict[str, Any] | None:
    report = await transport.declare(Topology(queues=(queue,)))
    return None if report is None else dict(report.lacking.get(queue.name, {}))


@GROUP.clause("a new queue gets its best wishes, and lacks nothing later", "inspects")
async def _wishes(ctx: CheckContext) -> None:
    wanted = Queue(ctx.harness.fresh, wishes=_WISHES)
    for _ in range(2):
        expect({}, await _lacking(ctx.transport, wanted), "what the queue lacks")
    with expect_error(TopologyError, "declaring the queue without its wishes"):
        await ctx.transport.declare(_topology(ctx))


@GROUP.clause("an existing queue is accepted without wishes, and they are reported", "inspects")
async def _lacking_wishes(ctx: CheckContext) -> None:
    best, good = _WISHES
    for arguments, lacks in (({}, best), (good, {"x-message-ttl": 60_000})):
        name = f"{ctx.harness.fresh}.{len(arguments)}"
        await ctx.transport.declare(Topology(queues=(Queue(name, arguments=arguments),)))
        found = await _lacking(ctx.transport, Queue(name, wishes=_WISHES))
        expect(lacks, found, f"what a queue with {arguments} lacks")


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
