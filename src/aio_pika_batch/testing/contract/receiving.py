"""What does a session hand out, and how much of it?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aio_pika_batch.core.message import Message
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.testing.contract.broken import ClauseBroken, refused, same
from aio_pika_batch.testing.contract.clause import Chapter
from aio_pika_batch.testing.contract.stage import CONSUMER_TAG, Stage, bodies_of, settled
from aio_pika_batch.transport import NativeSession, PumpingSession, Session

CHAPTER = Chapter()

_MOMENTS = 6
"""How many turns of the event loop a receive is given before it is cancelled, at most."""


@CHAPTER.clause("every message is handed out once")
async def _once(stage: Stage) -> None:
    bodies = await stage.put(50)
    async with stage.consuming() as consuming:
        messages = await consuming.take(50)
        same(sorted(bodies), sorted(bodies_of(messages)), "what was handed out")
        await consuming.nothing_comes()
        await consuming.settle(Disposition.ACK, messages)


@CHAPTER.clause("messages are handed out in the order of their queue", "keeps_order")
async def _in_order(stage: Stage) -> None:
    bodies = await stage.put(50)
    async with stage.consuming() as consuming:
        same(bodies, bodies_of(await consuming.take(50)), "what was handed out")


@CHAPTER.clause("chunks hold messages, in the rising order of their tags")
async def _tags_rise(stage: Stage) -> None:
    await stage.put(30)
    async with stage.consuming(prefetch=10) as consuming:
        for _ in range(3):
            await consuming.settle(Disposition.ACK, await consuming.take(10))
        same(True, all(consuming.chunks), "that no chunk is empty")
        tags = [message.delivery_tag for message in consuming.messages]
        same(sorted(set(tags)), tags, "the tags")
        same(True, tags[0] > 0, "that tags are positive")


@CHAPTER.clause("a message says where it was found, and that it is new")
async def _says_where(stage: Stage) -> None:
    await stage.harness.put([b"body"])
    async with stage.consuming() as consuming:
        [message] = await consuming.take(1)
        same(b"body", message.body, "the body")
        same(stage.queue, message.queue, "the queue")
        same(CONSUMER_TAG, message.consumer_tag, "the consumer tag")
        same(False, message.redelivered, "whether it is redelivered")
        same(0, message.retry_count, "the retry count")


@CHAPTER.clause("a body of any size arrives as it was, also an empty one")
async def _any_size(stage: Stage) -> None:
    bodies = [b"", bytes(range(256)), bytes(300_000)]
    await stage.harness.put(bodies)
    async with stage.consuming() as consuming:
        found = bodies_of(await consuming.take(len(bodies)))
        same(list(map(len, sorted(bodies))), list(map(len, sorted(found))), "the bodies' sizes")
        same(True, sorted(bodies) == sorted(found), "that the bodies are the same")


@CHAPTER.clause("what comes later wakes who waits")
async def _wakes(stage: Stage) -> None:
    async with stage.consuming() as consuming:
        await consuming.nothing_comes()
        await stage.harness.put([b"late"])
        same([b"late"], bodies_of(await consuming.take(1)), "what came")


@CHAPTER.clause("prefetch is what is handed out at most")
async def _prefetch(stage: Stage) -> None:
    await stage.put(10)
    async with stage.consuming(prefetch=3) as consuming:
        messages = await consuming.take(3)
        await consuming.nothing_comes()
        await stage.waiting(7)
        await consuming.settle(Disposition.ACK, messages[:1])
        await consuming.take(1)
        await consuming.nothing_comes()


@CHAPTER.clause("a prefetch of 0 is no limit")
async def _no_limit(stage: Stage) -> None:
    await stage.put(300)
    async with stage.consuming(prefetch=0) as consuming:
        await consuming.take(300)


@CHAPTER.clause("a receive that is cancelled loses nothing")
async def _cancelled_receive(stage: Stage) -> None:
    expected: list[bytes] = []
    found: list[bytes] = []
    async with stage.transport.session(stage.subscription()) as session:
        chunks = aiter(session)
        # Cancelled before anything comes, while it comes, and when it is there.
        for turns in range(_MOMENTS):
            receiving = asyncio.ensure_future(anext(chunks, None))
            await asyncio.sleep(0)
            body = b"%d" % turns
            expected.append(body)
            await stage.harness.put([body])
            for _ in range(turns):
                await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.wait({receiving})
            if not receiving.cancelled():
                found.extend(bodies_of(_more(receiving.result())))
        try:
            async with asyncio.timeout(stage.patience):
                while len(found) < len(expected):
                    found.extend(bodies_of(_more(await anext(chunks, None))))
        except TimeoutError:
            raise ClauseBroken(f"of {expected!r} only {found!r} came") from None
        same(expected, sorted(found), "what came")


def _more(chunk: Sequence[Message] | None) -> Sequence[Message]:
    if chunk is None:
        raise ClauseBroken("the iteration has ended")
    return chunk


@CHAPTER.clause("what a session offers beside is what is claimed")
async def _as_claimed(stage: Stage) -> None:
    async with stage.transport.session(stage.subscription()) as session:
        same(stage.features.pumps, isinstance(session, PumpingSession), "whether it can pump")
        same(
            stage.features.has_native,
            isinstance(session, NativeSession),
            "whether it has native objects",
        )


@CHAPTER.clause("pumping hands over what iterating would, and ends after cancel", "pumps")
async def _pumps(stage: Stage) -> None:
    bodies = await stage.put(50)
    seen: list[Message] = []
    async with stage.transport.session(stage.subscription()) as session:
        pumping = asyncio.create_task(_pumping(session).pump(seen.extend))
        await stage.waiting(0)
        same(bodies, sorted(bodies_of(seen), key=int), "what was handed over")
        tags = [message.delivery_tag for message in seen]
        same(sorted(set(tags)), tags, "the tags")
        await stage.harness.put([b"later"])
        await stage.waiting(0)
        same(b"later", seen[-1].body, "what came while it pumped")
        await session.cancel()
        async with asyncio.timeout(stage.patience):
            await pumping
        await session.settle([settled(Disposition.ACK, seen)])
    await stage.holds([])


@CHAPTER.clause("what a sink raises is raised where it pumps, and the sink is left alone", "pumps")
async def _sink_fails(stage: Stage) -> None:
    calls = 0

    def sink(_: Sequence[Message]) -> None:
        nonlocal calls
        calls += 1
        raise LookupError("the sink is broken")

    async with stage.transport.session(stage.subscription()) as session:
        await stage.harness.put([b"1"])
        pumping = _pumping(session)
        with refused(LookupError, "pumping into a sink that fails"):
            async with asyncio.timeout(stage.patience):
                await pumping.pump(sink)
        await stage.harness.put([b"2"])
        await asyncio.sleep(stage.quiet)
        same(1, calls, "how often the sink was called")
    await stage.holds([b"1", b"2"])


def _pumping(session: Session) -> PumpingSession:
    if not isinstance(session, PumpingSession):
        raise ClauseBroken("the session has no method pump")
    return session


@CHAPTER.clause("native objects are opened once", "has_native")
async def _native(stage: Stage) -> None:
    async with stage.transport.session(stage.subscription()) as session:
        if not isinstance(session, NativeSession):
            raise ClauseBroken("the session has no method native")
        first, second = await session.native(), await session.native()
        same(True, first.channel is second.channel, "that there is one channel")
