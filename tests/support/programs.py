"""Random programs for a broker, and how they are played on RabbitMQ and on the broker in memory.

A program declares exchanges, queues and bindings, and then publishes, consumes, settles, expires
and purges, one step after another. After each step both brokers must show the same: the outcome of
the step, every delivery with its headers, and the number of ready messages in each queue.

The broker in memory plays a step first. RabbitMQ then has time to show the same, so a busy machine
makes no difference. Some things are left out of the programs, because RabbitMQ does not do them in
a fixed order or at a fixed time:

- Several consumers of one queue: RabbitMQ decides whose turn it is by what has arrived where.
- Messages of one channel that were partly taken by `basic.get`, and partly sent to a consumer: when
  the channel is closed, a quorum queue returns one part after the other.
- Priorities in quorum queues, which the broker in memory does not imitate.
- Several settlements in one write: dead letters that return to the same queue overtake what is
  requeued with them, or don't.
- Messages for a quorum queue that expire at once: if it is full, it drops them for its length, and
  the broker in memory lets them expire.
- What makes a dead letter routable later: RabbitMQ tries again after minutes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

import aiormq
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import DeliveryError
from pamqp.commands import Basic

from aio_pika_batch.adapters.memory import Broker
from aio_pika_batch.adapters.memory.channel import ConfirmFrame, DeliverFrame
from aio_pika_batch.adapters.memory.stored_message import check_publication
from aio_pika_batch.core.message import Properties

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel, AbstractConnection


PATIENCE = 10.0
"""Seconds in which RabbitMQ must show what the broker in memory shows."""

TTL = 20
"""Milliseconds after which messages expire. Then each step waits until they have."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish a message; it is mandatory."""

    body: bytes
    exchange: str
    key: str
    headers: Mapping[str, Any] | None
    expiration: int | None
    priority: int | None


@dataclass(frozen=True, slots=True)
class Consume:
    """Start the consumer of a queue, unless it has one."""

    queue: str
    prefetch: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel the consumer of a queue, if it has one."""

    queue: str


@dataclass(frozen=True, slots=True)
class Get:
    """Take the first message of a queue that has no consumer, without settling it."""

    queue: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Settle a delivery of a queue, if there is any."""

    queue: str
    which: int
    by: str
    multiple: bool
    requeue: bool


@dataclass(frozen=True, slots=True)
class Close:
    """Close the channel of a queue, and open it again."""

    queue: str


@dataclass(frozen=True, slots=True)
class Purge:
    """Purge a queue."""

    queue: str


Step: TypeAlias = Publish | Consume | Cancel | Get | Settle | Close | Purge


@dataclass(frozen=True, slots=True)
class Program:
    """What is declared, and what is done then."""

    exchanges: Mapping[str, tuple[str, Mapping[str, Any]]]
    queues: Mapping[str, Mapping[str, Any]]
    bindings: tuple[tuple[str, str, str, Mapping[str, Any]], ...]
    steps: tuple[Step, ...]

    @property
    def expires(self) -> bool:
        """Whether messages may expire a while after a step."""
        return any(arguments.get("x-message-ttl") for arguments in self.queues.values()) or any(
            isinstance(step, Publish) and step.expiration for step in self.steps
        )


@dataclass(slots=True)
class Seen:
    """What a broker shows after a step.

    Attributes:
        outcome: Of a publication, or the number of purged messages.
        deliveries: From each queue, since the step before.
        ready: The number of ready messages in each queue.
    """

    outcome: object = None
    deliveries: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    ready: dict[str, int] = field(default_factory=dict)


# --- making programs -----------------------------------------------------------


def make(seed: int, version: str, prefix: str) -> Program:
    """Return the program with this number; all its names begin with the prefix."""
    return _Maker(Random(seed), version, prefix).program()


class _Maker:
    def __init__(self, random: Random, version: str, prefix: str) -> None:
        self._random = random
        self._version = version
        self._work = [f"{prefix}.q{number}" for number in range(3)]
        self._dead = f"{prefix}.dead"
        self._kinds = {
            f"{prefix}.{kind}": kind for kind in ("direct", "fanout", "topic", "headers")
        }
        self._dlx = f"{prefix}.dlx"
        self._body = 0

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def program(self) -> Program:
        one_of = self._random.choice
        exchanges: dict[str, tuple[str, dict[str, Any]]] = {
            name: (kind, {"alternate-exchange": self._dlx} if self._chance(0.1) else {})
            for name, kind in self._kinds.items()
        }
        exchanges[self._dlx] = (one_of(["direct", "fanout", "topic"]), {})
        queues = {name: self._arguments(name) for name in self._work}
        queues[self._dead] = {"x-queue-type": one_of(["classic", "quorum"])}
        bindings: list[tuple[str, str, str, Mapping[str, Any]]] = [
            (self._dead, self._dlx, key, {}) for key in ("#", "a", "a.b", *self._work, self._dead)
        ]
        bindings += [self._binding(name) for name in self._work for _ in range(one_of([0, 1, 2]))]
        steps: list[Step] = []
        for _ in range(self._random.randint(8, 25)):
            steps += self._steps()
        return Program(exchanges, queues, tuple(bindings), tuple(steps))

    def _arguments(self, queue: str) -> dict[str, Any]:
        one_of, chance = self._random.choice, self._chance
        kind = one_of(["classic", "quorum"])
        # The quorum queues of 3.8 have none of what came later.
        is_old = kind == "quorum" and self._version == "3.8"
        found: dict[str, Any] = {"x-queue-type": kind}
        if chance(0.3):
            found["x-max-length"] = one_of([0, 1, 2, 4])
            overflows = ["drop-head"] if is_old else ["drop-head", "reject-publish"]
            found["x-overflow"] = one_of(
                [*overflows, "reject-publish-dlx"] if kind == "classic" else overflows
            )
        if chance(0.7):
            # To itself, too: a third of all dead-letter cycles has one queue.
            found["x-dead-letter-exchange"] = one_of(["", self._dlx, f"{queue}.missing"])
            if chance(0.7):
                found["x-dead-letter-routing-key"] = one_of([queue, *self._work, self._dead, "a.b"])
        if kind == "classic" and chance(0.2):
            found["x-max-priority"] = one_of([1, 5])
        if kind == "quorum" and chance(0.5):
            found["x-delivery-limit"] = one_of([0, 1, 2, 3])
        if chance(0.1):
            found["x-single-active-consumer"] = True
        if not is_old and chance(0.15):
            found["x-message-ttl"] = one_of([0 if kind == "classic" else TTL, TTL])
        return found

    def _binding(self, queue: str) -> tuple[str, str, str, dict[str, Any]]:
        one_of = self._random.choice
        exchange = one_of(list(self._kinds))
        key = one_of(["", "a", "a.b", "*", "#", "*.b", "a.#", "#.b", "*.#", "#.*", "a.*.c"])
        arguments: dict[str, Any] = {}
        if self._kinds[exchange] == "headers":
            arguments["x-match"] = one_of(["all", "any", "all-with-x", "any-with-x"])
            wanted = {"h": one_of([1, "1", True, None]), "i": "z", "x-h": 1}
            arguments |= {name: each for name, each in wanted.items() if self._chance(0.6)}
        return queue, exchange, key, arguments

    def _steps(self) -> list[Step]:
        random = self._random
        queue = random.choice(self._work)
        makers: dict[str, Callable[[], Step]] = {
            "publish": self._publish,
            "settle": lambda: self._settle(queue),
            "consume": lambda: Consume(queue, random.choice([0, 1, 2, 5])),
            "get": lambda: Get(queue),
            "cancel": lambda: Cancel(queue),
            "close": lambda: Close(queue),
            "purge": lambda: Purge(queue),
        }
        kind = random.choices(list(makers), [6, 6, 3, 3, 1, 1, 0.5])[0]
        count = random.randint(1, {"publish": 4, "settle": 3}.get(kind, 1))
        return [makers[kind]() for _ in range(count)]

    def _publish(self) -> Publish:
        one_of, chance = self._random.choice, self._chance
        self._body += 1
        exchange = one_of(["", "", *self._kinds])
        keys = ["", "a", "a.b", "a.b.c", "b", "a..b", "."] if exchange else [*self._work, "nowhere"]
        headers: dict[str, Any] | None = {} if chance(0.2) else None
        if chance(0.5):
            headers = {"h": one_of([1, "1", True]), "i": one_of(["z", "y"]), "x-h": 1}
        claims: dict[str, Any] = {
            "CC": [one_of([*self._work, "a"])],
            "BCC": [one_of([*self._work, "a.b"])],
            "x-acquired-count": 7,
        }
        if self._version[0] != "3":
            claims["x-delivery-count"] = 7
        for name, value in claims.items():
            if chance(0.08):
                headers = {**(headers or {}), name: value}
        return Publish(
            b"%d" % self._body,
            exchange,
            one_of(keys),
            headers,
            TTL if chance(0.1) and self._version != "3.8" else None,
            None,
        )

    def _settle(self, queue: str) -> Settle:
        by = self._random.choice(["ack", "nack", "nack", "reject", "reject"])
        return Settle(
            queue,
            self._random.randrange(10),
            by,
            multiple=by != "reject" and self._chance(0.3),
            requeue=self._chance(0.6),
        )


# --- playing them --------------------------------------------------------------


async def difference(url: str, version: str, seed: int, prefix: str) -> str | None:
    """Play a program on both brokers; return the first difference, in words."""
    program = make(seed, version, prefix)
    memory = _InMemory(program, version)
    async with await aiormq.connect(url) as connection:
        rabbit = _OnRabbit(program, connection)
        try:
            await rabbit.open()
            for number, step in enumerate((*program.steps, *_ending(program))):
                if not memory.can_play(step):
                    continue
                tag = memory.tag_of(step)
                expected = memory.play(step, tag)
                seen = await rabbit.play(step, tag, expected)
                if seen != expected:
                    return (
                        f"program {seed} on RabbitMQ {version}, step {number}: {step}\n"
                        f"in memory: {expected}\nRabbitMQ:  {seen}\nqueues: {program.queues}"
                    )
        finally:
            await rabbit.close()
    return None


def _ending(program: Program) -> list[Step]:
    """Return the steps that show what is left."""
    closed: list[Step] = [Close(queue) for queue in program.queues]
    return closed + [Consume(queue, 0) for queue in program.queues]


def _shown(
    body: bytes, redelivered: object, exchange: str, key: str, headers: object
) -> tuple[Any, ...]:
    # Some versions send an empty table where none was published.
    return (body, bool(redelivered), exchange, key, _plain(headers or {}))


def _plain(value: object) -> object:
    """Return a header without what differs from run to run."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in sorted(value.items()) if name != "time"}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


class _Tags:
    """Tags of consumers, each used once.

    A quorum queue takes a consumer with the tag of a cancelled one for the same: what the earlier
    one has not settled counts for its prefetch.
    """

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()

    def new(self, queue: str) -> str:
        self._count[queue] += 1
        return self.last(queue)

    def last(self, queue: str) -> str:
        return f"consumer-{self._count[queue]}"


class _InMemory:
    def __init__(self, program: Program, version: str) -> None:
        self._program = program
        self._broker = Broker(version)
        self._connection = self._broker.connect()
        self._publisher = self._connection.channel()
        # Each queue has a channel, so its delivery tags are the same on both brokers.
        self._channels = {queue: self._connection.channel() for queue in program.queues}
        self._taken: set[str] = set()
        self._tags = _Tags()
        with self._publisher.operation() as vhost:
            flags: Any = {"durable": True, "auto_delete": False}
            for name, (kind, arguments) in program.exchanges.items():
                vhost.declare_exchange(name, kind, arguments=arguments, **flags)
            for name, arguments in program.queues.items():
                vhost.declare_queue(
                    name,
                    exclusive=False,
                    arguments=arguments,
                    connection=self._connection,
                    **flags,
                )
            for queue, exchange, key, arguments in program.bindings:
                vhost.bind(vhost.queue(queue, None), exchange, key, arguments)

    def can_play(self, step: Step) -> bool:
        match step:
            case Settle():
                return bool(self._channels[step.queue].unsettled)
            case Consume():
                return not (self._broker.consumers(step.queue) or self._has_taken(step.queue))
            case Get():
                unsettled = self._channels[step.queue].unsettled
                if unsettled and not self._has_taken(step.queue):
                    return False
                # Quorum queues with a single active consumer refuse it.
                is_single = "x-single-active-consumer" in self._program.queues[step.queue]
                return not (is_single or self._broker.consumers(step.queue))
            case Cancel():
                return bool(self._broker.consumers(step.queue))
            case _:
                return True

    def _has_taken(self, queue: str) -> bool:
        """Return whether messages are unsettled that were taken without a consumer."""
        return queue in self._taken and bool(self._channels[queue].unsettled)

    def tag_of(self, step: Step) -> int:
        """Return the delivery tag that a step settles."""
        if not isinstance(step, Settle):
            return 0
        unsettled = self._channels[step.queue].unsettled
        return unsettled[step.which % len(unsettled)]

    def play(self, step: Step, tag: int) -> Seen:
        seen = Seen(self._do(step, tag))
        if self._program.expires:
            self._broker.advance(self._broker.now + 2 * TTL / 1000)
        for queue, channel in self._channels.items():
            seen.deliveries[queue] = [
                _shown(
                    each.body,
                    each.redelivered,
                    each.exchange,
                    each.routing_key,
                    each.properties.headers,
                )
                for each in channel.take()
                if isinstance(each, DeliverFrame)
            ]
        seen.ready = {queue: len(self._broker.ready(queue)) for queue in self._program.queues}
        return seen

    def _do(self, step: Step, tag: int) -> object:
        if isinstance(step, Publish):
            return self._publish(step)
        channel = self._channels[step.queue]
        match step:
            case Consume() | Get():
                channel.qos(step.prefetch if isinstance(step, Consume) else 1)
                tag_name = self._tags.new(step.queue)
                channel.consume(step.queue, tag_name)
                self._taken.discard(step.queue)
                if isinstance(step, Get):
                    channel.cancel(tag_name)
                    self._taken.add(step.queue)
            case Cancel():
                channel.cancel(self._tags.last(step.queue))
            case Settle(by="ack"):
                channel.ack(tag, multiple=step.multiple)
            case Settle(by="nack"):
                channel.nack(tag, multiple=step.multiple, requeue=step.requeue)
            case Settle():
                channel.reject(tag, requeue=step.requeue)
            case Close():
                channel.close()
                self._channels[step.queue] = self._connection.channel()
            case Purge():
                with self._publisher.operation() as vhost:
                    return vhost.queue(step.queue, None).purge()
            case never:
                assert_never(never)
        return None

    def _publish(self, step: Publish) -> str:
        expiration = None if step.expiration is None else str(step.expiration)
        properties = Properties(
            headers=None if step.headers is None else dict(step.headers),
            expiration=expiration,
            priority=step.priority,
        )
        self._publisher.publish(
            check_publication(step.exchange, step.key, step.body, properties), mandatory=True
        )
        outcomes = []
        for frame in self._publisher.take():
            match frame:
                case ConfirmFrame(_, outcome):
                    outcomes.append(outcome.value)
                case _:
                    outcomes.append(str(frame))
        return outcomes[0]


class _OnRabbit:
    def __init__(self, program: Program, connection: AbstractConnection) -> None:
        self._program = program
        self._connection = connection
        self._channels: dict[str, AbstractChannel] = {}
        self._received: dict[str, list[tuple[Any, ...]]] = {}
        self._tags = _Tags()

    async def open(self) -> None:
        self._publisher = publisher = await self._connection.channel(on_return_raises=False)
        for name, (kind, arguments) in self._program.exchanges.items():
            await publisher.exchange_declare(
                name, exchange_type=kind, durable=True, arguments=dict(arguments)
            )
        for name, arguments in self._program.queues.items():
            await publisher.queue_declare(name, durable=True, arguments=dict(arguments))
        for queue, exchange, key, arguments in self._program.bindings:
            await publisher.queue_bind(queue, exchange, key, arguments=dict(arguments))
        for queue in self._program.queues:
            self._channels[queue] = await self._connection.channel()
            self._received[queue] = []

    async def close(self) -> None:
        """Delete all that was declared."""
        channel = await self._connection.channel()
        for queue in self._program.queues:
            await channel.queue_delete(queue)
        for exchange in self._program.exchanges:
            await channel.exchange_delete(exchange)

    async def play(self, step: Step, tag: int, expected: Seen) -> Seen:
        seen = Seen(await self._do(step, tag))
        if self._program.expires:
            await asyncio.sleep(2 * TTL / 1000)
        deadline = time.monotonic() + PATIENCE
        while True:
            seen.ready = {queue: await self._ready(queue) for queue in self._program.queues}
            # After the counts, which show what the deliveries may not show yet.
            seen.deliveries = {queue: list(each) for queue, each in self._received.items()}
            if seen == expected or time.monotonic() > deadline:
                for each in self._received.values():
                    each.clear()
                return seen
            await asyncio.sleep(0.01)

    async def _ready(self, queue: str) -> int:
        return (await self._publisher.queue_declare(queue, passive=True)).message_count or 0

    async def _do(self, step: Step, tag: int) -> object:  # noqa: C901  -- a case for each step
        if isinstance(step, Publish):
            return await self._publish(step)
        channel = self._channels[step.queue]
        match step:
            case Consume():
                await channel.basic_qos(prefetch_count=step.prefetch)
                await channel.basic_consume(
                    step.queue,
                    partial(self._on_message, step.queue),
                    consumer_tag=self._tags.new(step.queue),
                )
            case Cancel():
                await channel.basic_cancel(self._tags.last(step.queue))
            case Get():
                message = await channel.basic_get(step.queue)
                if isinstance(message.delivery, Basic.GetOk):
                    # Before 4.0 quorum queues send a count of 0, though not to consumers.
                    headers = message.header.properties.headers
                    if headers is not None and headers.get("x-delivery-count") == 0:
                        del headers["x-delivery-count"]
                    await self._on_message(step.queue, message)
            case Settle(by="ack"):
                await channel.basic_ack(tag, multiple=step.multiple)
            case Settle(by="nack"):
                await channel.basic_nack(tag, multiple=step.multiple, requeue=step.requeue)
            case Settle():
                await channel.basic_reject(tag, requeue=step.requeue)
            case Close():
                await channel.close()
                self._channels[step.queue] = await self._connection.channel()
            case Purge():
                return (await self._publisher.queue_purge(step.queue)).message_count
            case never:
                assert_never(never)
        return None

    async def _on_message(self, queue: str, message: DeliveredMessage) -> None:
        self._received[queue].append(
            _shown(
                message.body,
                message.redelivered,
                message.exchange or "",
                message.routing_key or "",
                message.header.properties.headers,
            )
        )

    async def _publish(self, step: Publish) -> str:
        properties = Basic.Properties(
            headers=None if step.headers is None else dict(step.headers),
            expiration=None if step.expiration is None else str(step.expiration),
            priority=step.priority,
            delivery_mode=2,
        )
        try:
            answer = await self._publisher.basic_publish(
                step.body,
                exchange=step.exchange,
                routing_key=step.key,
                properties=properties,
                mandatory=True,
            )
        except DeliveryError:
            return "refused"
        return "confirmed" if isinstance(answer, Basic.Ack) else "returned"
