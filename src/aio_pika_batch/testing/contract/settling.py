"""What becomes of a message that was settled?"""

from __future__ import annotations

from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.testing.contract.broken import same
from aio_pika_batch.testing.contract.clause import Chapter
from aio_pika_batch.testing.contract.stage import Stage, bodies_of, settled

CHAPTER = Chapter()

_GIVEN_BACK = (Disposition.REQUEUE, Disposition.RETURN)


@CHAPTER.clause("an acked message stays gone after the session")
async def _acked(stage: Stage) -> None:
    await stage.put(10)
    async with stage.consuming() as consuming:
        await consuming.settle(Disposition.ACK, await consuming.take(10))
    await stage.holds([])


@CHAPTER.clause("an ack settles its own tags, and none before them")
async def _own_tags(stage: Stage) -> None:
    await stage.put(10)
    async with stage.consuming() as consuming:
        messages = await consuming.take(10)
        await consuming.settle(Disposition.ACK, messages[1::2])
    await stage.holds(bodies_of(messages[0::2]))


@CHAPTER.clause("hundreds of acks that cannot be joined are not lost at the end")
async def _many_acks(stage: Stage) -> None:
    await stage.put(500)
    async with stage.consuming() as consuming:
        first, *others = await consuming.take(500)
        await consuming.settle(Disposition.ACK, others)
    await stage.holds([first.body])


@CHAPTER.clause("a rejected message leaves its queue")
async def _rejected(stage: Stage) -> None:
    await stage.put(3)
    async with stage.consuming() as consuming:
        await consuming.settle(Disposition.REJECT, await consuming.take(3))
        await consuming.nothing_comes()
    await stage.holds([])


@CHAPTER.clause("a rejected message is dead-lettered, and an acked one is not", "dead_letters")
async def _dead_lettered(stage: Stage) -> None:
    await stage.put(4)
    async with stage.consuming() as consuming:
        messages = await consuming.take(4)
        await consuming.session.settle(
            [settled(Disposition.REJECT, messages[:2]), settled(Disposition.ACK, messages[2:])]
        )
    await stage.holds(bodies_of(messages[:2]), stage.harness.dead_letters)


@CHAPTER.clause("what is requeued or returned is handed out again")
async def _again(stage: Stage) -> None:
    for disposition in _GIVEN_BACK:
        bodies = await stage.put(3)
        async with stage.consuming() as consuming:
            messages = await consuming.take(3)
            await consuming.settle(disposition, messages)
            again = await consuming.take(3)
            same(bodies, sorted(bodies_of(again)), f"what came again after {disposition.name}")
            old = {message.delivery_tag for message in messages}
            same(set(), old & {each.delivery_tag for each in again}, "tags that are used again")
            await consuming.settle(Disposition.ACK, again)
        await stage.holds([])


@CHAPTER.clause("what is handed out again says so", "marks_redelivered")
async def _redelivered(stage: Stage) -> None:
    await stage.put(2)
    async with stage.consuming() as consuming:
        for disposition in _GIVEN_BACK:
            await consuming.settle(disposition, await consuming.take(2))
        again = await consuming.take(2)
        same([True, True], [message.redelivered for message in again], "whether they say so")
    async with stage.consuming() as consuming:
        [first, second] = await consuming.take(2)
        same((True, True), (first.redelivered, second.redelivered), "and in the next session")


@CHAPTER.clause(
    "what is given back keeps its place before what was never handed out", "keeps_place"
)
async def _place(stage: Stage) -> None:
    await stage.put(3)
    async with stage.consuming(prefetch=1) as consuming:
        for disposition in _GIVEN_BACK:
            [message] = await consuming.take(1)
            same(b"0", message.body, f"what came before {disposition.name}")
            await consuming.settle(disposition, [message])
        same([b"0"], bodies_of(await consuming.take(1)), "what came last")


@CHAPTER.clause("what is requeued counts its deliveries", "counts_deliveries")
async def _counted(stage: Stage) -> None:
    await stage.put(1)
    async with stage.consuming() as consuming:
        for count in range(3):
            [message] = await consuming.take(1)
            same(count, message.delivery_count or 0, "delivery_count")
            await consuming.settle(Disposition.REQUEUE, [message])


@CHAPTER.clause("what is returned does not count as delivered", "spares_returns")
async def _spared(stage: Stage) -> None:
    await stage.put(1)
    async with stage.consuming() as consuming:
        for _ in range(3):
            [message] = await consuming.take(1)
            same(0, message.delivery_count or 0, "delivery_count")
            await consuming.settle(Disposition.RETURN, [message])


@CHAPTER.clause("each message is settled as it was said, whatever its neighbours")
async def _mixed(stage: Stage) -> None:
    bodies = await stage.put(60)
    async with stage.consuming() as consuming:
        messages = await consuming.take(60)
        # The fifth of each five is left unsettled.
        of = {each: messages[start::5] for start, each in enumerate(Disposition)}
        await consuming.session.settle([settled(each, those) for each, those in of.items()])
        back = bodies_of([*of[Disposition.REQUEUE], *of[Disposition.RETURN]])
        again = await consuming.take(len(back))
        same(sorted(back), sorted(bodies_of(again)), "what came again")
        await consuming.settle(Disposition.ACK, again)
    if stage.features.dead_letters:
        await stage.holds(bodies_of(of[Disposition.REJECT]), stage.harness.dead_letters)
    gone = {*back, *bodies_of(of[Disposition.ACK]), *bodies_of(of[Disposition.REJECT])}
    await stage.holds(set(bodies) - gone)


@CHAPTER.clause("settling goes on after cancel")
async def _after_cancel(stage: Stage) -> None:
    await stage.put(4)
    async with stage.consuming() as consuming:
        messages = await consuming.take(4)
        await consuming.session.cancel()
        await consuming.session.settle(
            [settled(Disposition.RETURN, messages[:1]), settled(Disposition.ACK, messages[1:])]
        )
        await stage.waiting(1)
    await stage.holds(bodies_of(messages[:1]))


@CHAPTER.clause("to settle nothing is allowed")
async def _nothing(stage: Stage) -> None:
    bodies = await stage.put(1)
    async with stage.consuming() as consuming:
        await consuming.take(1)
        await consuming.session.settle([])
        await consuming.settle(Disposition.ACK, [])
    await stage.holds(bodies)
