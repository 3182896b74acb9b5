"""Is what is declared there, and is what is not there told?"""

from __future__ import annotations

from typing import Any

from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.testing.contract.broken import ClauseBroken, refused, same
from aio_pika_batch.testing.contract.clause import Chapter
from aio_pika_batch.testing.contract.stage import Stage
from aio_pika_batch.transport import CountingTransport, VersionedTransport

CHAPTER = Chapter()


def _fresh(stage: Stage, **how: Any) -> Topology:  # noqa: ANN401  -- Queue's own
    return Topology(queues=(Queue(stage.harness.fresh, **how),))


@CHAPTER.clause("to declare nothing is allowed")
async def _nothing(stage: Stage) -> None:
    await stage.transport.declare(Topology())


@CHAPTER.clause("a declared queue is there, and to declare it again changes nothing", "declares")
async def _declared(stage: Stage) -> None:
    for _ in range(2):
        await stage.transport.declare(_fresh(stage))
        same(0, await stage.harness.count(stage.harness.fresh), "messages in the new queue")


@CHAPTER.clause("check_only creates nothing, and is content with what is there", "declares")
async def _check_only(stage: Stage) -> None:
    with refused(TopologyError, "checking for a queue that is not there"):
        await stage.transport.declare(_fresh(stage, check_only=True))
    same(None, await stage.harness.count(stage.harness.fresh), "messages in a queue that is not")
    await stage.transport.declare(stage.existing)


@CHAPTER.clause("what exists is taken as it is, where that is asked for", "declares", "compares")
async def _existing_first(stage: Stage) -> None:
    await stage.transport.declare(_fresh(stage, arguments={"x-max-length": 5}))
    await stage.transport.declare(_fresh(stage, existing_first=True))


@CHAPTER.clause("what exists otherwise than declared is a TopologyError", "declares", "compares")
async def _otherwise(stage: Stage) -> None:
    await stage.transport.declare(_fresh(stage))
    with refused(TopologyError, "declaring a queue with other arguments"):
        await stage.transport.declare(_fresh(stage, arguments={"x-max-length": 5}))


@CHAPTER.clause("a queue that is not there cannot be consumed: TopologyError")
async def _not_there(stage: Stage) -> None:
    with refused(TopologyError, "consuming from a queue that is not there"):
        async with stage.transport.session(stage.subscription(queue=stage.harness.fresh)):
            pass


@CHAPTER.clause("a queue that is consumed alone has no second session", "exclusive_consumers")
async def _alone(stage: Stage) -> None:
    async with stage.transport.session(stage.subscription(exclusive=True)):
        with refused(TopologyError, "consuming beside an exclusive consumer"):
            async with stage.transport.session(stage.subscription()):
                pass


@CHAPTER.clause("a queue of a session's own lives and dies with it", "exclusive_queues")
async def _own(stage: Stage) -> None:
    fresh = stage.harness.fresh
    own = _fresh(stage, exclusive=True)
    for _ in range(2):
        async with stage.consuming(queue=fresh, own=own) as consuming:
            await consuming.settle(Disposition.ACK, [])
            with refused(TopologyError, "consuming another session's own queue"):
                async with stage.transport.session(stage.subscription(queue=fresh)):
                    pass
        await stage.waiting(None, fresh)


@CHAPTER.clause("the broker's version is known once something was declared", "tells_version")
async def _version(stage: Stage) -> None:
    transport = stage.transport
    if not isinstance(transport, VersionedTransport):
        raise ClauseBroken("the transport has no broker_version")
    await transport.declare(stage.existing)
    same(True, bool(transport.broker_version), "whether there is a version")


@CHAPTER.clause("what is ready in a queue is counted, where there is such a queue", "counts_ready")
async def _count(stage: Stage) -> None:
    transport = stage.transport
    if not isinstance(transport, CountingTransport):
        raise ClauseBroken("the transport has no method count")
    with refused(TopologyError, "counting in a queue that is not there"):
        await transport.count(stage.harness.fresh)
    await stage.put(3)
    await stage.waiting(3)
    same(3, await transport.count(stage.queue), "messages that are counted")
