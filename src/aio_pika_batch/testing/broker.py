"""`BatchBroker`: an in-memory RabbitMQ for tests, with the few methods that most tests need.

Everything else that it can do is at its attribute `broker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.faults import BrokerEvent, ConnectFault, EventKind, PublishFault
from aio_pika_batch.adapters.memory.queue import MemoryQueue
from aio_pika_batch.adapters.memory.rabbitmq import NEWEST, Refusal
from aio_pika_batch.adapters.memory.stored_message import StoredMessage
from aio_pika_batch.adapters.memory.transport import MemoryTransport
from aio_pika_batch.core.message import FieldValue, Headers
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.errors import PublishError
from aio_pika_batch.testing.virtual_time import VirtualTimeLoop, run
from aio_pika_batch.transport import Wire

T = TypeVar("T")

_IDLE_TURNS = 20
"""For this many turns of the event loop nothing must happen; a settlement needs fewer."""


class BatchBroker:
    """An in-memory RabbitMQ for one test.

    Args:
        version: The RabbitMQ version that it imitates: `3.8`, `3.10`, `4.0` or `4.3`.
        wire: With `amqp10`, consumers use AMQP 1.0 on quorum queues; their setting is not read.

    Attributes:
        transport: Pass it to consumers: `MyConsumer(settings, transport=batch_broker.transport)`.
    """

    def __init__(self, version: str = NEWEST, *, wire: Wire = "auto") -> None:
        self._broker = Broker(version)
        self._broker.journal.on_event = self._on_event
        self.transport = MemoryTransport(self._broker, wire=wire)
        self._consumed: set[str] = set()
        self._watchers: set[asyncio.Event] = set()

    @property
    def broker(self) -> Broker:
        """The broker itself: its journal, its faults, and everything that is declared."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._broker
        # The transport's broker uses the clock of the running event loop.
        return self.transport.broker

    # -- queues and messages --

    def declare(self, queue: str, **arguments: FieldValue) -> None:
        """Declare a durable queue; pass its arguments like `x_queue_type="quorum"`."""
        with self.broker.operation() as vhost:
            vhost.declare_queue(
                queue,
                durable=True,
                exclusive=False,
                auto_delete=False,
                arguments={name.replace("_", "-"): each for name, each in arguments.items()},
                connection=None,
            )

    def bind(self, queue: str, exchange: str, *keys: str, kind: str = "direct") -> None:
        """Declare a durable exchange, and bind a queue to it with each key."""
        with self.broker.operation() as vhost:
            vhost.declare_exchange(exchange, kind, durable=True, auto_delete=False, arguments={})
            for key in keys or ("",):
                vhost.bind(vhost.queue(queue, None), exchange, key, {})

    def publish(
        self,
        *bodies: bytes,
        exchange: str = "",
        routing_key: str = "",
        headers: Headers | None = None,
        **properties: Any,  # noqa: ANN401  -- those of Publication, each with its own type
    ) -> None:
        """Publish messages; faults of the broker don't affect them.

        Args:
            routing_key: With the default exchange, the name of the queue.
            **properties: Further properties of :class:`~aio_pika_batch.Publication`.

        Raises:
            PublishError: No queue is bound for a message, or the queue is full.
        """
        for body in bodies:
            publication = Publication(
                body, exchange=exchange, routing_key=routing_key, headers=headers, **properties
            )
            try:
                # Not through the transport: the faults are for what consumers publish.
                outcome = self.broker.publish(publication)
            except Refusal as refusal:
                raise PublishError(str(refusal)) from refusal
            if outcome is Outcome.CONFIRMED:
                continue
            where = f"exchange {exchange!r}, routing key {routing_key!r}"
            if outcome is Outcome.RETURNED:
                reason = (
                    "no queue is bound for it; start its consumer first, or `declare` the queue"
                )
            else:
                reason = "the queue is full"
            raise PublishError(f"{where}: {reason}")

    def drain(self, queue: str) -> list[StoredMessage]:
        """Remove all waiting messages from a queue, and return them in order."""
        return self.broker.drain(queue)

    # -- faults --

    def cut(self) -> None:
        """Cut all connections; consumers reconnect."""
        self.broker.cut()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Be unreachable while the context is open."""
        faults = self.broker.faults
        faults.connect_fault = ConnectFault.UNREACHABLE
        self.cut()
        try:
            yield
        finally:
            faults.connect_fault = ConnectFault.NONE

    def refuse(
        self,
        times: int | None = None,
        *,
        exchange: str | None = None,
        routing_key: str | None = None,
    ) -> None:
        """Refuse what consumers publish: retries, dead letters and their own publications.

        Args:
            times: How many publications to refuse; None: all, until `accept`.
            exchange: Refuse only publications to this exchange.
            routing_key: Refuse only publications with this key; a retry's key is the queue.
        """
        self.broker.faults.on_publish(
            PublishFault.REFUSE, times=times, exchange=exchange, routing_key=routing_key
        )

    def accept(self) -> None:
        """Stop refusing publications."""
        self.broker.faults.clear(PublishFault.REFUSE)

    # -- time --

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in virtual time, if no test plugin does that."""
        return run(main)

    async def advance(self, seconds: float) -> None:
        """Let virtual time pass.

        Raises:
            RuntimeError: The running event loop has real time.
        """
        if not isinstance(asyncio.get_running_loop(), VirtualTimeLoop):
            raise RuntimeError(  # noqa: TRY004  -- the loop is no argument
                "advance() needs virtual time; run the test with batch_broker.run(…), or on a"
                " VirtualTimeLoop"
            )
        await asyncio.sleep(seconds)

    async def settled(self, within: float = 3600.0) -> None:
        """Wait until consumers have nothing left to do.

        Then no message is unsettled, and none waits in a consumed queue or for a retry. A queue
        counts as consumed until its consumer stops, even if it is disconnected. With
        `settle="yield"`, a handler whose messages are all settled may still be running.

        Args:
            within: Time limit in seconds.

        Raises:
            TimeoutError: Consumers still have something to do; the text says what.
        """
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            async with asyncio.timeout(within):
                while not await self._stays_idle():
                    changed.clear()
                    if self._unfinished():
                        await changed.wait()
        except TimeoutError:
            left = ", ".join(self._unfinished())
            raise TimeoutError(f"not settled within {within:g} s: {left}") from None
        finally:
            self._watchers.discard(changed)

    async def _stays_idle(self) -> bool:
        # Nothing is open on the broker, but observers and tasks may not have run yet.
        for _ in range(_IDLE_TURNS):
            if self._unfinished():
                return False
            await asyncio.sleep(0)
        return True

    # Called for each event of the broker's journal, so that `settled` need not poll: virtual time
    # can still detect a test that hangs.
    def _on_event(self, event: BrokerEvent) -> None:
        match event.kind:
            case EventKind.CONSUMING:
                self._consumed.add(event.queue)
            case EventKind.CANCELLED:
                # A consumer that is cut off stays: a test would look before it has reconnected.
                self._consumed.discard(event.queue)
            case _:
                pass
        for watcher in self._watchers:
            watcher.set()

    def _unfinished(self) -> list[str]:
        """Describe what consumers still have to do."""
        with self.broker.operation() as vhost:
            queues = list(vhost.queues.values())
            consumed = self._consumed | {each.name for each in queues if each.consumers}
            found = []
            for queue in queues:
                waiting = len(queue.ready) + len(queue.delayed) + len(queue.pending_dead_letters)
                if queue.unacked:
                    found.append(f"{len(queue.unacked)} unsettled from {queue.name!r}")
                if waiting and queue.name in consumed:
                    found.append(f"{waiting} waiting in {queue.name!r}")
                elif waiting and _retry_target(queue) in consumed:
                    found.append(f"{waiting} waiting in {queue.name!r} for a retry")
            return found


def _retry_target(queue: MemoryQueue) -> str | None:
    """Return the queue to which messages of a wait queue go when they expire."""
    spec = queue.spec
    waits = spec.message_ttl is not None and not spec.dead_letter_exchange
    return spec.dead_letter_routing_key if waits else None
