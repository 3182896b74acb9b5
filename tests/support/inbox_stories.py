"""Plays what may happen to the handlers of a consumer with an inbox, and checks the effects.

A consumer handles messages whose results are drawn beforehand. Effects are rows without a key, so
that a repetition shows. At the end every dead letter is replayed, and handled well: an effect that
is still missing then was dropped as a duplicate although its message was never ACKed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult, Requeue
from aio_pika_batch.databases.connections import adapt
from aio_pika_batch.inbox import Inbox
from aio_pika_batch.testing import BatchBroker
from tests.support.databases import EFFECTS, TestDatabase, write

ACK, NACK, REQUEUE = MessageResult.ACK, MessageResult.NACK, MessageResult.REQUEUE
AGAIN = MessageResult.REQUEUE_IMMEDIATE
FATES = (ACK, ACK, ACK, NACK, REQUEUE, Requeue(delay=1), AGAIN)

TROUBLES = (
    None,
    None,
    "raises first",
    "raises in the block",
    "hangs in the block",
    "raises after the block",
    "hangs after the block",
    "forgets to yield",
    "yields nonsense",
    "commit refused",
    "commit lost before",
    "commit lost after",
    "commit hangs before",
    "commit hangs after",
)
IN_THE_BLOCK = (None, None, "raises in the block", "hangs in the block")


@dataclass
class Plan:
    """What happens.

    Attributes:
        fates: For each message, its result at each attempt; ACK after the last.
        troubles: For each run of the handler, what goes wrong with it; nothing after the last.
        cuts: When connections to the broker are cut, each after the other, in hours of the player.
        copies: Messages that are published twice.
    """

    fates: list[list[Any]]
    troubles: list[str | None]
    settings: dict[str, Any]
    cuts: list[float] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    is_bare: bool = False

    @property
    def loses_acks(self) -> bool:
        """Whether a message can be dead-lettered that took effect.

        If its acknowledgement is lost, it is delivered again, and may fail before it is claimed.
        """
        others = {each for each in self.troubles if each not in (None, "commit lost after")}
        return bool(self.cuts or ("commit lost after" in self.troubles and others))


@st.composite
def plans(draw: st.DrawFn, *, bare: bool = False) -> Plan:
    """Everything that is drawn, before anything happens."""
    fates = draw(st.lists(st.lists(st.sampled_from(FATES), max_size=4), min_size=1, max_size=12))
    troubles = IN_THE_BLOCK if bare else TROUBLES
    return Plan(
        fates,
        draw(st.lists(st.sampled_from(troubles), max_size=8)),
        {
            "batch_size": draw(st.integers(1, 6)),
            "concurrency": draw(st.integers(1, 3)),
            "settle": "atomic" if bare else draw(st.sampled_from(["batch", "yield", "atomic"])),
            "isolate_failures": draw(st.booleans()),
            "max_requeue_attempts": draw(st.integers(0, 3)),
            "process_timeout": draw(st.sampled_from([3.0, 10.0])),
            "unhandled_exception_action": draw(st.sampled_from([NACK, REQUEUE, AGAIN])),
        },
        draw(st.lists(st.sampled_from([0.01, 0.03, 0.07, 0.15]), max_size=2)),
        draw(st.lists(st.integers(0, 11), max_size=2)),
        bare,
    )


class Failed(Exception):
    """The handler's own."""


class Refused(Exception):
    """A server's answer to a COMMIT."""

    sqlstate = "23505"


class Writer(BatchConsumer):
    """Writes an effect for each message whose result is ACK.

    Attributes:
        hour: Seconds that are long: longer than `process_timeout`.
        is_well: Whether everything goes well from now on.
    """

    plan: Plan
    database: TestDatabase
    inbox: Inbox
    hour: float
    is_well = False

    async def on_start(self) -> None:
        """Begin with the first result of each message."""
        self.attempts: Counter[str] = Counter()
        self.troubles = list(self.plan.troubles)

    def result(self, message: Message) -> Any:
        """The next result of a message."""
        key = message.message_id or ""
        at = self.attempts[key]
        self.attempts[key] += 1
        fates = self.plan.fates[int(key)]
        return ACK if self.is_well or at >= len(fates) else fates[at]

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Any]:
        """As the plan has it."""
        trouble = None if self.is_well or not self.troubles else self.troubles.pop(0)
        handle = self.bare if self.plan.is_bare else self.helped
        async for each in handle(messages, trouble):
            yield each

    async def helped(self, messages: Sequence[Message], trouble: str | None) -> AsyncIterator[Any]:
        """With the inbox's own transaction."""
        if trouble == "raises first":
            raise Failed
        async with (
            self.database.connect() as connection,
            self.inbox.transaction(connection, messages) as batch,
        ):
            written = []
            for message in batch.fresh:
                result = self.result(message)
                if result is ACK:
                    written.append(message.message_id or "")
                else:
                    batch.set_result(message, result)
            await write(connection, written)
            await self.happens_in_the_block(trouble)
            self.spoil(batch._database, trouble)
        if trouble == "raises after the block":
            raise Failed
        if trouble == "hangs after the block":
            await asyncio.sleep(self.hour)
        if trouble == "yields nonsense":
            yield "nonsense"
        for result in [] if trouble == "forgets to yield" else batch.results:
            yield result

    async def bare(self, messages: Sequence[Message], trouble: str | None) -> AsyncIterator[Any]:
        """With a transaction of the user's."""
        async with self.database.transaction() as connection:
            fresh = await self.inbox.claim(connection, messages)
            results = {id(each): self.result(each) for each in fresh}
            acked = [each for each in fresh if results[id(each)] is ACK]
            await write(connection, [each.message_id or "" for each in acked])
            await self.inbox.release(
                connection, [each for each in fresh if results[id(each)] is not ACK]
            )
            await self.happens_in_the_block(trouble)
        for message in messages:
            yield results.get(id(message), ACK)

    async def happens_in_the_block(self, trouble: str | None) -> None:
        """Before the commit."""
        if trouble == "raises in the block":
            raise Failed
        if trouble == "hangs in the block":
            await asyncio.sleep(self.hour)

    def spoil(self, connection: Any, trouble: str | None) -> None:
        """Let something go wrong with the commit that follows."""
        real = connection.commit

        async def commit() -> None:
            match trouble:
                case "commit refused":
                    raise Refused
                case "commit lost before":
                    raise ConnectionResetError
                case "commit lost after":
                    await real()
                    raise ConnectionResetError
                case "commit hangs before":
                    await asyncio.sleep(self.hour / 15)
                    await real()
                case "commit hangs after":
                    await real()
                    await asyncio.sleep(self.hour / 15)
                case _:
                    await real()

        connection.commit = commit


async def play(plan: Plan, database: TestDatabase, *, table: str, hour: float = 60.0) -> None:
    """Let it happen, and check the effects.

    Args:
        table: For the claims; a new one.
        hour: Seconds that are long.
    """
    inbox = Inbox("writer", table=table)
    async with database.transaction() as connection:
        await adapt(connection).execute("DROP TABLE IF EXISTS effects", {})
        await adapt(connection).execute(EFFECTS, {})
        await inbox.create(connection)
    broker = BatchBroker()
    for queue in ("orders", "orders.dead"):
        broker.declare(queue)
    writer = Writer(
        BatchConsumerSettings(
            url="memory://",
            queue_name="orders",
            batch_timeout=hour / 300,
            dead_letter_queue="orders.dead",
            reconnect_delay=hour / 600,
            **{**plan.settings, "process_timeout": plan.settings["process_timeout"] * hour / 60},
        ),
        transport=broker.transport,
    )
    writer.plan, writer.database, writer.inbox, writer.hour = plan, database, inbox, hour
    ids = [str(at) for at in range(len(plan.fates))]
    copies = [ids[at] for at in plan.copies if at < len(ids)]
    async with writer:
        for each in [*ids, *copies]:
            broker.publish(b"", routing_key="orders", message_id=each)
        for share in plan.cuts:
            await asyncio.sleep(share * hour)
            broker.cut()
        await broker.settled()
        found = Counter(await database.effects())
        dead = {each.properties.message_id for each in broker.broker.ready("orders.dead")}
        assert set(found.values()) <= {1}, found
        assert set(ids) == set(found) | dead
        if not plan.loses_acks and not copies:
            assert set() == set(found) & dead
        writer.is_well = True
        for letter in broker.drain("orders.dead"):
            broker.publish(b"", routing_key="orders", message_id=letter.properties.message_id)
        await broker.settled()
        assert Counter(ids) == Counter(await database.effects())
        assert [] == broker.broker.ready("orders.dead")
