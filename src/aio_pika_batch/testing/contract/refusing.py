"""Which settlements are refused, so that nothing of them reaches the broker?

A broker that is told of a tag twice closes the channel, or settles another message; so whoever
hands a tag out has to know what has become of it.
"""

from __future__ import annotations

from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.errors import SettlementError
from aio_pika_batch.testing.contract.broken import refused
from aio_pika_batch.testing.contract.clause import Chapter
from aio_pika_batch.testing.contract.stage import Stage, settled

CHAPTER = Chapter()


@CHAPTER.clause("a tag that is settled already is refused, with all that stands beside it")
async def _twice(stage: Stage) -> None:
    for disposition in Disposition:
        await stage.put(2)
        async with stage.consuming() as consuming:
            first, second = await consuming.take(2)
            await consuming.settle(Disposition.ACK, [first])
            with refused(SettlementError, f"{disposition.name} of a settled tag"):
                await consuming.settle(disposition, [second, first])
        # Nothing was sent: the other one was still unsettled when the session was left.
        await stage.holds([second.body])


@CHAPTER.clause("a tag that stands twice in one call is refused, and nothing is sent")
async def _twice_at_once(stage: Stage) -> None:
    await stage.put(2)
    async with stage.consuming() as consuming:
        first, second = messages = await consuming.take(2)
        with refused(SettlementError, "a tag twice in one settlement"):
            await consuming.settle(Disposition.ACK, [first, second, first])
        with refused(SettlementError, "a tag in two settlements"):
            await consuming.session.settle(
                [settled(Disposition.ACK, messages), settled(Disposition.REJECT, [second])]
            )
    await stage.holds([first.body, second.body])


@CHAPTER.clause("a tag that was never delivered is refused, and nothing is sent")
async def _never_delivered(stage: Stage) -> None:
    await stage.put(1)
    async with stage.consuming() as consuming:
        [message] = await consuming.take(1)
        tag = message.delivery_tag
        for wrong in (0, tag + 1, tag + 1000):
            with refused(SettlementError, f"tag {wrong}, when {tag} is the only one"):
                await consuming.session.settle([Settlement(Disposition.ACK, (tag, wrong))])
    await stage.holds([message.body])


@CHAPTER.clause("a tag of another session is refused")
async def _other_session(stage: Stage) -> None:
    await stage.put(3)
    async with stage.consuming(consumer_tag="one") as one:
        theirs = await one.take(3)
        async with stage.consuming(consumer_tag="two") as two:
            with refused(SettlementError, "a tag of another session"):
                await two.settle(Disposition.ACK, theirs)
            await one.settle(Disposition.ACK, theirs[:1])
    await stage.holds([message.body for message in theirs[1:]])


@CHAPTER.clause("a session goes on after it has refused a settlement")
async def _goes_on(stage: Stage) -> None:
    await stage.put(1)
    async with stage.consuming() as consuming:
        messages = await consuming.take(1)
        with refused(SettlementError, "tag 0"):
            await consuming.session.settle([Settlement(Disposition.REJECT, (0,))])
        await consuming.settle(Disposition.ACK, messages)
        await stage.harness.put([b"next"])
        await consuming.settle(Disposition.ACK, await consuming.take(1))
    await stage.holds([])
