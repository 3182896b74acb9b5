"""How does a session end, if nothing goes wrong?"""

from __future__ import annotations

import asyncio

from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.errors import SessionClosed
from aio_pika_batch.testing.contract.broken import ClauseBroken, refused, same
from aio_pika_batch.testing.contract.clause import Chapter
from aio_pika_batch.testing.contract.stage import Stage, bodies_of, settled

CHAPTER = Chapter()


@CHAPTER.clause("after cancel what was delivered before is handed out, and then iteration ends")
async def _cancel(stage: Stage) -> None:
    bodies = await stage.put(200)
    async with stage.consuming(prefetch=50) as consuming:
        first = await consuming.chunk()
        same(True, bool(first), "that something was handed out before")
        await consuming.session.cancel()
        await consuming.take_to_the_end()
        handed_out = consuming.messages
        same(True, len(handed_out) <= 50, "that prefetch was kept")
        await consuming.settle(Disposition.ACK, handed_out)
        # Inside: at the end the broker would get back what was lost on its way, and hide the loss.
        await stage.waiting(200 - len(handed_out))
    await stage.holds(set(bodies) - set(bodies_of(handed_out)))


@CHAPTER.clause(
    "what has arrived and was not handed out when cancel is called still is", "prefetches"
)
async def _cancel_at_once(stage: Stage) -> None:
    await stage.put(20)
    async with stage.consuming() as consuming:
        await stage.waiting(0)
        await consuming.session.cancel()
        same(20, len(await consuming.take_to_the_end()), "messages handed out after cancel")


@CHAPTER.clause("after cancel nothing new is delivered")
async def _nothing_new(stage: Stage) -> None:
    async with stage.consuming() as consuming:
        await consuming.session.cancel()
        await stage.harness.put([b"late"])
        same([], await consuming.take_to_the_end(), "what was handed out")
        await stage.waiting(1)


@CHAPTER.clause("cancel may be called again, and by several at once")
async def _cancel_again(stage: Stage) -> None:
    await stage.put(1)
    async with stage.consuming() as consuming:
        messages = await consuming.take(1)
        session = consuming.session
        await asyncio.gather(session.cancel(), session.cancel())
        await session.cancel()
        same([], await consuming.take_to_the_end(), "what was handed out")
        await session.cancel()
        await consuming.settle(Disposition.ACK, messages)
    await stage.holds([])


@CHAPTER.clause("cancel ends the wait of who receives")
async def _cancel_wakes(stage: Stage) -> None:
    async with stage.consuming() as consuming:
        await consuming.nothing_comes()
        await consuming.session.cancel()
        same([], await consuming.take_to_the_end(), "what was handed out")


@CHAPTER.clause("what is unsettled on leaving goes back to the queue")
async def _leaving(stage: Stage) -> None:
    bodies = await stage.put(5)
    async with stage.consuming() as consuming:
        messages = await consuming.take(5)
        await consuming.settle(Disposition.ACK, [messages[0], messages[3]])
    kept = {messages[0].body, messages[3].body}
    await stage.holds(set(bodies) - kept)


@CHAPTER.clause("what was never handed out goes back, too", "prefetches")
async def _leaving_unread(stage: Stage) -> None:
    bodies = await stage.put(5)
    async with stage.transport.session(stage.subscription()):
        await stage.waiting(0)
    await stage.holds(bodies)


@CHAPTER.clause("an exception leaves the context as it is, and what is unsettled goes back")
async def _leaving_by_exception(stage: Stage) -> None:
    bodies = await stage.put(2)

    async def fail() -> None:
        async with stage.consuming() as consuming:
            await consuming.take(2)
            raise LookupError("by the clause")

    with refused(LookupError, "leaving by an exception"):
        await fail()
    await stage.holds(bodies)


@CHAPTER.clause("a session that was left raises SessionClosed, and settles nothing")
async def _closed(stage: Stage) -> None:
    bodies = await stage.put(1)
    async with stage.consuming() as consuming:
        messages = await consuming.take(1)
        session = consuming.session
    with refused(SessionClosed, "settling after the end"):
        await session.settle([settled(Disposition.ACK, messages)])
    with refused(SessionClosed, "cancelling after the end"):
        await session.cancel()
    with refused(SessionClosed, "receiving after the end"):
        await consuming.chunk()
    await stage.holds(bodies)


@CHAPTER.clause("whoever waits for messages when a session is left is told")
async def _leaving_wakes(stage: Stage) -> None:
    async with stage.transport.session(stage.subscription()) as session:
        waiting = asyncio.ensure_future(anext(aiter(session)))
        await asyncio.sleep(stage.quiet)
    with refused(SessionClosed, "waiting for messages when the session is left"):
        await asyncio.wait({waiting}, timeout=stage.patience)
        if not waiting.done():
            waiting.cancel()
            raise ClauseBroken("it waits for ever")
        await waiting
