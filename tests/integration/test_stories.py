"""The invariants of stories hold on RabbitMQ: the same stories as in memory, and the same
invariants.

They run concurrently, each with its own proxy, queues and consumer, ten times as fast as they say.
`AIO_PIKA_BATCH_TEST_REAL_STORIES` says how many; `nox -s stories -- 500` plays 500 on each
supported RabbitMQ that can be fetched.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import aio_pika
import pytest
from hypothesis import Phase, given, settings

from aio_pika_batch.adapters.rabbitmq import open_transport
from aio_pika_batch.testing.stories import FaultKind, Played, Story, StoryBroken, judge, play
from aio_pika_batch.testing.stories.story import LATER, WAIT_SUFFIX
from aio_pika_batch.testing.strategies import stories
from aio_pika_batch.transport import Endpoint, Wire
from tests.integration.helpers import PATIENCE, ready, skip_without_amqp10, until
from tests.stories import REAL_STORIES
from tests.support.proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aio_pika.abc import AbstractConnection

    from tests.support.find import RunningBroker

PACE = 0.1
LONGEST = 4 * PATIENCE
"""Seconds in which a story must come to rest, while others are played."""

AT_ONCE = 24
_ALIKE = 6
KINDS = set(FaultKind) - {FaultKind.CANCEL, FaultKind.STALLED, FaultKind.FORBIDDEN}
"""All but what a broker does only to a queue that is deleted, and then what was in it is gone."""


class RabbitScene:
    """A :class:`~aio_pika_batch.testing.stories.Scene` on RabbitMQ, behind a proxy."""

    pace = PACE
    keeps_place = True
    delivery_limit = 1000

    def __init__(
        self,
        url: str,
        proxy: TcpProxy,
        connection: AbstractConnection,
        wire: Wire,
        *,
        waits: bool,
    ) -> None:
        self._url = url
        self._waits = waits
        self.queue = f"story-{uuid.uuid4().hex[:12]}"
        self.dead_letter_exchange = f"{self.queue}.dlx"
        # Not at the pace of the story: on a busy machine a short one would be a fault of its own.
        self.transport = open_transport(
            Endpoint(url=proxy.url(url), publish_timeout=PATIENCE, wire=wire)
        )
        if wire == "amqp10":
            # Before 4.3 AMQP 1.0 is used only without a limit.
            self.delivery_limit = -1
        self._quiet = 15 if wire == "amqp10" else 3
        self._proxy = proxy
        self._connection = connection
        self._door = asyncio.Lock()
        self._restless: str | None = None
        self._oversized = 0
        self._dead = f"{self.queue}.dead"
        self._full = f"{self.queue}.full"

    async def open(self) -> None:
        """Declare a queue for dead letters, and one that refuses everything."""
        self._channel = channel = await self._connection.channel()
        await channel.declare_exchange(self.dead_letter_exchange, "fanout", durable=True)
        await channel.declare_queue(self._dead, durable=True)
        takes_one = {"x-max-length": 1, "x-overflow": "reject-publish"}
        await channel.declare_queue(self._full, durable=True, arguments=takes_one)
        await channel.default_exchange.publish(aio_pika.Message(b"full"), self._full)
        await self._bind(self._dead)

    async def close(self) -> None:
        """Delete everything."""
        channel = self._channel
        for queue in (self.queue, f"{self.queue}{WAIT_SUFFIX}", self._dead, self._full):
            await channel.queue_delete(queue)
        await channel.exchange_delete(self.dead_letter_exchange)
        await channel.close()

    async def _bind(self, queue: str) -> None:
        await (await self._channel.get_queue(queue, ensure=False)).bind(self.dead_letter_exchange)

    async def _unbind(self, queue: str) -> None:
        await (await self._channel.get_queue(queue, ensure=False)).unbind(self.dead_letter_exchange)

    async def put(self, body: bytes) -> None:
        """Publish with a confirm, bypassing the proxy."""
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        if self._oversized:
            message.headers = {"token": "t" * (131_072 - 150)}
        await self._channel.default_exchange.publish(message, self.queue)

    async def hurt(self, kind: FaultKind, seconds: float) -> None:
        """Cause a fault and end it."""
        proxy = self._proxy
        match kind:
            case FaultKind.CUT:
                proxy.cut()
            case FaultKind.AWAY:
                async with self._door:  # one after the other: it is shut or open
                    await proxy.refuse()
                    proxy.cut()
                    await asyncio.sleep(seconds)
                    await proxy.refuse(False)
            case FaultKind.REFUSE:
                # Refused by one queue is refused, so nothing must be stored in the other.
                await self._bind(self._full)
                await self._unbind(self._dead)
                await asyncio.sleep(seconds)
                await self._bind(self._dead)
                await self._unbind(self._full)
            case FaultKind.RETURN:
                await self._unbind(self._dead)
                await asyncio.sleep(seconds)
                await self._bind(self._dead)
            case FaultKind.LOSE | FaultKind.UNCONFIRMED:
                proxy.freeze("to_broker" if kind is FaultKind.LOSE else "to_client")
                await asyncio.sleep(seconds)
                proxy.cut()
                proxy.thaw()
            case FaultKind.LATE:
                proxy.freeze("to_client")
                await asyncio.sleep(seconds)
                proxy.thaw()
            case FaultKind.OVERSIZED:
                self._oversized += 1
                await asyncio.sleep(seconds)
                self._oversized -= 1
            case FaultKind.CANCEL | FaultKind.STALLED | FaultKind.FORBIDDEN:
                raise NotImplementedError(kind)

    async def come_to_rest(self, done: Callable[[], bool]) -> None:
        """Wait until nothing happens for a while, since delivered messages may be in flight."""
        quiet = 0
        try:
            async with asyncio.timeout(LONGEST):
                while quiet < 1 + self._quiet:
                    is_quiet = done() and not await self._ready() and not await self._waiting()
                    quiet = quiet + 1 if is_quiet else 0
                    await asyncio.sleep(0.1)
        except TimeoutError:
            # Not on the channel that was interrupted.
            count = await ready(self._url, self.queue)
            self._restless = (
                f"no rest: {await self._waiting()} wait for a retry, {count} are ready, and the"
                f" consumer is {'' if done() else 'not '}done"
            )

    async def _waiting(self) -> int:
        """Return how many messages wait for a retry."""
        # On a connection of its own: as long as there is no such queue, the question costs it.
        return max(0, await ready(self._url, f"{self.queue}{WAIT_SUFFIX}")) if self._waits else 0

    async def _ready(self) -> int:
        found = await self._channel.get_queue(self.queue)
        return found.declaration_result.message_count or 0

    async def look(self, played: Played) -> None:
        """Take what is left. Delayed messages must come back first."""
        quiet = 0
        async with asyncio.timeout(PATIENCE):
            # No question finds out how many messages are delayed over AMQP 1.0.
            while quiet < self._quiet:
                taken = await self._take(self.queue, played.waiting)
                quiet = 0 if taken or await self._waiting() else quiet + 1
                await asyncio.sleep(0.1)
        await self._take(self._dead, played.dead)
        if self._restless is not None:
            played.complaints.append(self._restless)
        if self._proxy.connections:
            await until(lambda: not self._proxy.connections, what="all connections are closed")

    async def _take(self, queue: str, into: Counter[bytes]) -> int:
        source = await self._channel.get_queue(queue, ensure=False)
        taken = 0
        while (message := await source.get(no_ack=True, fail=False, timeout=PATIENCE)) is not None:
            into[message.body] += 1
            taken += 1
        return taken


@asynccontextmanager
async def staged(
    url: str, connection: AbstractConnection, wire: Wire, story: Story
) -> AsyncIterator[RabbitScene]:
    """Open a scene."""
    where = aio_pika.connection.make_url(url)
    async with TcpProxy(where.host or "localhost", where.port or 5672) as proxy:
        waits = any(LATER in each for each in story.answers)
        scene = RabbitScene(url, proxy, connection, wire, waits=waits)
        await scene.open()
        try:
            yield scene
        finally:
            await scene.close()


def drawn(count: int, kinds: set[FaultKind] = KINDS) -> list[Story]:
    """Return this many stories, all drawn before the first is played, so that none depends on what
    happens.

    Hypothesis makes several similar variants of one; one of them is enough.
    """
    found: list[Story] = []

    @settings(max_examples=_ALIKE * count, phases=[Phase.generate], database=None)
    @given(stories(faults=kinds))
    def draw(story: Story) -> None:
        found.append(story)

    draw()
    return found[::_ALIKE]


async def test_the_invariants_hold_in_any_story_on_rabbitmq(amqp_url: str) -> None:
    """Nothing is lost, acked without a reason, beyond its limits or left behind."""
    await play_all(amqp_url, drawn(REAL_STORIES), ("fast", "plain"))


async def test_the_invariants_hold_over_amqp_1_0(amqp_url: str, broker: RunningBroker) -> None:
    """Retries and dead letters need no copies there."""
    skip_without_amqp10(broker)
    # A dead letter that no queue takes stays in its queue, unseen, and is tried again only after
    # three minutes.
    kinds = KINDS - {FaultKind.REFUSE, FaultKind.RETURN}
    some = [replace(story, quorum=True) for story in drawn(REAL_STORIES, kinds)]
    await play_all(amqp_url, some, ("amqp10",))


async def play_all(amqp_url: str, some: Sequence[Story], wires: Sequence[Wire]) -> None:
    """Play stories concurrently, on one wire after the other."""
    room = asyncio.Semaphore(AT_ONCE)
    broken: list[str] = []

    async def tell(number: int, story: Story) -> None:
        wire = wires[number % len(wires)]
        async with room, staged(amqp_url, connection, wire, story) as scene:
            try:
                judge(story, await play(story, scene))
            except StoryBroken as error:
                broken.append(f"on the {wire} wire:\n{error}")

    async with await aio_pika.connect(amqp_url) as connection, asyncio.TaskGroup() as all_of_them:
        for number, story in enumerate(some):
            all_of_them.create_task(tell(number, story))
    if broken:
        pytest.fail("\n\n".join(broken), pytrace=False)
