"""What is told when the world ends a session, or a publisher?"""

from __future__ import annotations

import asyncio

from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.topology import Topology
from aio_pika_batch.errors import BrokerUnavailable, SessionLost
from aio_pika_batch.testing.contract.broken import ClauseBroken, refused, same
from aio_pika_batch.testing.contract.clause import Chapter
from aio_pika_batch.testing.contract.stage import Consuming, Stage, bodies_of, settled
from aio_pika_batch.transport import Publisher

CHAPTER = Chapter()


async def _lost(consuming: Consuming) -> None:
    """Expect that the session is lost, whatever is handed out before that is noticed."""
    with refused(SessionLost, "receiving in a session that the world has ended"):
        await consuming.take_to_the_end()


@CHAPTER.clause(
    "a cut connection raises SessionLost: in receive, in settle and in cancel", "can_cut"
)
async def _cut(stage: Stage) -> None:
    await stage.put(1)
    async with stage.consuming() as consuming:
        messages = await consuming.take(1)
        await consuming.nothing_comes()
        await stage.harness.cut()
        await _lost(consuming)
        for disposition in Disposition:
            with refused(SessionLost, f"{disposition.name} after the loss"):
                await consuming.settle(disposition, messages)
        with refused(SessionLost, "cancelling after the loss"):
            await consuming.session.cancel()


@CHAPTER.clause(
    "what a lost session had comes again, and only the next one can settle it", "can_cut"
)
async def _next_session(stage: Stage) -> None:
    bodies = await stage.put(3)
    async with stage.consuming() as lost:
        messages = await lost.take(3)
        await lost.settle(Disposition.ACK, messages[:1])
        await stage.waiting(0)
        await stage.harness.cut()
        await _lost(lost)
        async with stage.consuming() as consuming:
            again = await consuming.take(2)
            same(bodies[1:], sorted(bodies_of(again)), "what came again")
            with refused(SessionLost, "settling in the lost session"):
                await lost.settle(Disposition.ACK, messages[1:])
            await consuming.settle(Disposition.ACK, again[:1])
    await stage.holds([again[1].body])


@CHAPTER.clause("the end of a subscription is a loss, too", "can_end_subscriptions")
async def _subscription_ended(stage: Stage) -> None:
    await stage.put(1)
    async with stage.consuming() as consuming:
        messages = await consuming.take(1)
        await consuming.nothing_comes()
        await stage.harness.end_subscriptions()
        await _lost(consuming)
        with refused(SessionLost, "settling after the loss"):
            await consuming.session.settle([settled(Disposition.ACK, messages)])


@CHAPTER.clause("a publisher that was lost is not open, and stays so", "can_cut")
async def _publisher_cut(stage: Stage) -> None:
    there = Publication(b"before", routing_key=stage.queue)
    async with stage.transport.publisher() as publisher:
        same([Outcome.CONFIRMED], list(await publisher.publish([there])), "the outcome before")
        same(True, publisher.is_open, "is_open before")
        await stage.harness.cut()
        await _closes(stage, publisher)
        # Nothing of it is raised, and nothing opens it again.
        late = Publication(b"late", routing_key=stage.queue)
        same([Outcome.UNKNOWN], list(await publisher.publish([late])), "the outcome after")
        same(False, publisher.is_open, "is_open after")
    await stage.holds([b"before"])


@CHAPTER.clause("publications in flight on a lost connection are UNKNOWN", "can_cut", "can_hush")
async def _in_flight(stage: Stage) -> None:
    publications = [Publication(b"%d" % n, routing_key=stage.queue) for n in range(3)]
    async with stage.transport.publisher() as publisher:
        await stage.harness.hush()
        publishing = asyncio.ensure_future(publisher.publish(publications))
        await asyncio.sleep(stage.quiet)
        same(False, publishing.done(), "whether it was done before the broker has answered")
        await stage.harness.cut()
        async with asyncio.timeout(stage.patience):
            outcomes = list(await publishing)
        same([Outcome.UNKNOWN] * 3, outcomes, "the outcomes")
        await _closes(stage, publisher)


async def _closes(stage: Stage, publisher: Publisher) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + stage.patience
    while publisher.is_open:
        if loop.time() > deadline:
            raise ClauseBroken("is_open: expected to become False, and it did not")
        await asyncio.sleep(0.02)


@CHAPTER.clause("a broker that is not there is told by BrokerUnavailable", "can_lock_out")
async def _not_there(stage: Stage) -> None:
    await stage.harness.lock_out()
    with refused(BrokerUnavailable, "declaring"):
        await stage.transport.declare(stage.existing)
    with refused(BrokerUnavailable, "declaring nothing"):
        await stage.transport.declare(Topology())
    with refused(BrokerUnavailable, "opening a session"):
        async with stage.transport.session(stage.subscription()):
            pass
    with refused(BrokerUnavailable, "opening a publisher"):
        async with stage.transport.publisher():
            pass
