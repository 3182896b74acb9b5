"""Which broker does a test talk to, and when is there nothing left to wait for?

`BatchBroker` is the strict broker in memory with the few calls that most tests need; whatever else
it can do is at its `broker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.faults import ConnectFault, PublishFault
from aio_pika_batch.adapters.memory.journal import BrokerEvent, EventKind
from aio_pika_batch.adapters.memory.queues import Queue
from aio_pika_batch.adapters.memory.refusals import Refusal
from aio_pika_batch.adapters.memory.stored_message import Stored
from aio_pika_batch.adapters.memory.transport import MemoryTransport
from aio_pika_batch.adapters.memory.versions import NEWEST
from aio_pika_batch.core.message import FieldValue, Headers
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.errors import PublishError
from aio_pika_batch.testing.virtual_time import VirtualTimeLoop, run

T = TypeVar("T")

_TURNS = 20
"""Rounds of the event loop for which nothing must stir: more than a settlement takes to be told."""


class BatchBroker:
    """A broker of one test.

    Args:
        version: Of the RabbitMQ that it imitates: `3.8`, `3.10`, `4.0` or `4.3`.

    Attributes:
        transport: For `MyConsumer(settings, transport=batch_broker.transport)`.
    """

    def __init__(self, version: str = NEWEST) -> None:
        self._broker = Broker(version)
        self._broker.journal.on_event = self._note
        self.transport = MemoryTransport(self._broker)
        self._awaited: set[str] = set()
        self._watchers: set[asyncio.Event] = set()

    @property
    def broker(self) -> Broker:
        """The broker itself: its journal, its faults, all that has been declared."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._broker
        # The transport's, since it lives by the loop's clock.
        return self.transport.broker

    # -- what is there --

    def declare(self, queue: str, **arguments: FieldValue) -> None:
        """Declare a durable queue; its arguments are given as `x_queue_type="quorum"`."""
        with self.broker.operation() as vhost:
            vhost.declare_queue(
                queue,
                durable=True,
                exclusive=False,
                auto_delete=False,
                arguments={name.replace("_", "-"): each for name, each in arguments.items()},
                asker=None,
            )

    def bind(self, queue: str, exchange: str, *keys: str, kind: str = "direct") -> None:
        """Declare a durable exchange, and bind a queue to it, once for each key."""
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
        """Publish messages; no fault is in their way.

        Args:
            routing_key: With the default exchange, the queue.
            **properties: Further ones of :class:`~aio_pika_batch.Publication`.

        Raises:
            PublishError: There is no queue for one of them, or it is full.
        """
        for body in bodies:
            publication = Publication(
                body, exchange=exchange, routing_key=routing_key, headers=headers, **properties
            )
            try:
                outcome = self.broker.publish(publication)
            except Refusal as refusal:
                raise PublishError(str(refusal)) from refusal
            if outcome is Outcome.CONFIRMED:
                continue
            where = f"exchange {exchange!r}, routing key {routing_key!r}"
            if outcome is Outcome.RETURNED:
                why = "no queue is bound for it: start its consumer before, or `declare` the queue"
            else:
                why = "the queue is full"
            raise PublishError(f"{where}: {why}")

    def drain(self, queue: str) -> list[Stored]:
        """Take out what waits in a queue, in order: `body`, `headers`, `properties`, …."""
        return self.broker.drain(queue)

    # -- what goes wrong --

    def cut(self) -> None:
        """Cut all connections; consumers come back."""
        self.broker.cut()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Be unreachable, until the context is left."""
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
        """Refuse what consumers publish: their requeues, their dead letters, what they send.

        Args:
            times: So many publications; None: all, until `accept`.
            exchange: Only those to this exchange.
            routing_key: Only those with this key; that of a requeue is the queue.
        """
        self.broker.faults.on_publish(
            PublishFault.REFUSE, times=times, exchange=exchange, routing_key=routing_key
        )

    def accept(self) -> None:
        """Refuse nothing any more."""
        self.broker.faults.clear(PublishFault.REFUSE)

    # -- time --

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run a test's coroutine in virtual time, where no test plugin does."""
        return run(main)

    async def advance(self, seconds: float) -> None:
        """Let so much virtual time go by.

        Raises:
            RuntimeError: The time of the running event loop is real.
        """
        if not isinstance(asyncio.get_running_loop(), VirtualTimeLoop):
            raise RuntimeError(  # noqa: TRY004  -- the loop is no argument
                "advance() needs virtual time: run the test by batch_broker.run(…), or on a"
                " VirtualTimeLoop"
            )
        await asyncio.sleep(seconds)

    async def settled(self, within: float = 3600.0) -> None:
        """Wait until consumers have nothing left to do: nothing handed out, nothing that waits for
        them, be it in their queues or for a retry.

        A queue counts as consumed until its consumer stops: one that was cut off is waited for.
        With `settle="yield"` a handler whose messages are all settled may still be running.

        Args:
            within: Seconds.

        Raises:
            TimeoutError: They are still not done; it says what is open.
        """
        stirred = asyncio.Event()
        self._watchers.add(stirred)
        try:
            async with asyncio.timeout(within):
                while not await self._keeps_still():
                    stirred.clear()
                    if self._open():
                        await stirred.wait()
        except TimeoutError:
            told = ", ".join(self._open())
            raise TimeoutError(f"not settled within {within:g} s: {told}") from None
        finally:
            self._watchers.discard(stirred)

    async def _keeps_still(self) -> bool:
        for _ in range(_TURNS):
            if self._open():
                return False
            await asyncio.sleep(0)
        return True

    def _note(self, event: BrokerEvent) -> None:
        match event.kind:
            case EventKind.CONSUMING:
                self._awaited.add(event.queue)
            case EventKind.CANCELLED:
                self._awaited.discard(event.queue)
            case _:
                pass
        for watcher in self._watchers:
            watcher.set()

    def _open(self) -> list[str]:
        """What consumers still have to do, in words."""
        with self.broker.operation() as vhost:
            queues = list(vhost.queues.values())
            consumed = self._awaited | {each.name for each in queues if each.consumers}
            found = []
            for queue in queues:
                waiting = len(queue.ready) + len(queue.dying)
                if queue.unacked:
                    found.append(f"{len(queue.unacked)} handed out from {queue.name!r}")
                if waiting and queue.name in consumed:
                    found.append(f"{waiting} waiting in {queue.name!r}")
                elif waiting and _goes_on_to(queue) in consumed:
                    found.append(f"{waiting} waiting in {queue.name!r} for another attempt")
            return found


def _goes_on_to(queue: Queue) -> str | None:
    """The queue to which messages go from here when their time is over."""
    spec = queue.spec
    waits = spec.message_ttl is not None and not spec.dead_letter_exchange
    return spec.dead_letter_routing_key if waits else None
