"""Which exchanges and queues are there, and how does a message get from one to another?

Everything that a change sets off (deliveries, expiries, dead letters that enter further queues) is
done before the operation that made the change ends, so that between operations nothing is on its
way.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.memory.arguments import (
    QueueType,
    check_same_arguments,
)
from aio_pika_batch.adapters.memory.arguments import (
    spec as read_spec,
)
from aio_pika_batch.adapters.memory.dead_lettering import (
    Reason,
    claimed_deaths,
    dead_letter,
    goes_in_circles,
)
from aio_pika_batch.adapters.memory.exchanges import Bound, Exchange, Kind
from aio_pika_batch.adapters.memory.exchanges import kind as kind_of
from aio_pika_batch.adapters.memory.journal import BrokerEvent, EventKind, Journal
from aio_pika_batch.adapters.memory.queues import Queue
from aio_pika_batch.adapters.memory.refusals import (
    Refusal,
    locked,
    no_exchange,
    no_queue,
    on_default_exchange,
    unequal,
)
from aio_pika_batch.adapters.memory.stored_message import copied_headers, short
from aio_pika_batch.core.refusals import ReplyCode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aio_pika_batch.adapters.memory.consumers import Consumer
    from aio_pika_batch.adapters.memory.stored_message import Stored
    from aio_pika_batch.adapters.memory.versions import Dialect
    from aio_pika_batch.core.message import Headers

_PREDECLARED = {
    "amq.direct": Kind.DIRECT,
    "amq.fanout": Kind.FANOUT,
    "amq.topic": Kind.TOPIC,
    "amq.headers": Kind.HEADERS,
    "amq.match": Kind.HEADERS,
}


class VirtualHost:
    """Exchanges, queues, and the ways between them."""

    def __init__(self, dialect: Dialect, journal: Journal) -> None:
        self.dialect = dialect
        self.journal = journal
        self.now = 0.0
        self.queues: dict[str, Queue] = {}
        self.exchanges = {name: Exchange(name, kind) for name, kind in _PREDECLARED.items()}
        self._awake: dict[Queue, None] = {}
        self._dying: dict[Queue, None] = {}
        self._names = count(1)

    # -- what is there --

    def queue(self, name: str, asker: object | None) -> Queue:
        """A queue, if it is there and not another connection's."""
        queue = self.queues.get(name)
        if queue is None:
            raise no_queue(name)
        if queue.owner is not None and queue.owner is not asker:
            raise locked(name)
        return queue

    def exchange(self, name: str) -> Exchange:
        """An exchange other than the default one."""
        if not name:
            raise on_default_exchange()
        exchange = self.exchanges.get(name)
        if exchange is None:
            raise no_exchange(name)
        return exchange

    def declare_exchange(
        self, name: str, type_: str, *, durable: bool, auto_delete: bool, arguments: Headers
    ) -> None:
        """Create an exchange, or find it to be what is declared."""
        short("an exchange's name", name)
        kind = kind_of(type_, self.dialect)
        existing = self.exchanges.get(name)
        if existing is not None:
            existing.check_same(kind, durable=durable, auto_delete=auto_delete, arguments=arguments)
            return
        if not name:
            raise on_default_exchange()
        _check_prefix("exchange", name)
        self.exchanges[name] = Exchange(name, kind, durable, auto_delete, copied_headers(arguments))
        self.wake_dying()

    def declare_queue(
        self,
        name: str,
        *,
        durable: bool,
        exclusive: bool,
        auto_delete: bool,
        arguments: Headers,
        asker: object,
    ) -> Queue:
        """Create a queue, or find it to be what is declared. Without a name it is given one."""
        short("a queue's name", name)
        entity = f"queue '{name}'"
        existing = self.queues.get(name)
        if existing is not None:
            if existing.owner is not (asker if exclusive else None):
                raise locked(name)
            for argument, received, current in (
                ("durable", durable, existing.durable),
                ("auto_delete", auto_delete, existing.auto_delete),
            ):
                if received != current:
                    raise unequal(argument, entity, _told(received), _told(current))
            check_same_arguments(name, arguments, existing.arguments)
            existing.unused_since = self.now
            return existing
        spec = read_spec(name, arguments, self.dialect)
        if spec.type is QueueType.QUORUM:
            for fault, what in (
                (not durable, "non-durable"),
                (exclusive, "exclusive-owner"),
                (auto_delete, "auto-delete"),
            ):
                if fault:
                    raise Refusal(
                        ReplyCode.PRECONDITION_FAILED,
                        f"invalid property '{what}' for {entity} in vhost '/'",
                    )
        _check_prefix("queue", name)
        name = name or f"amq.gen-{next(self._names)}"
        queue = Queue(
            self,
            name,
            spec,
            copied_headers(arguments),
            durable=durable,
            auto_delete=auto_delete,
            owner=asker if exclusive else None,
        )
        self.queues[name] = queue
        self.wake_dying()
        return queue

    def bind(self, queue: Queue, exchange: str, routing_key: str, arguments: Headers) -> None:
        """Bind a queue."""
        short("a routing key", routing_key)
        self.exchange(exchange).bind(Bound(queue.name, routing_key, copied_headers(arguments)))
        self.wake_dying()

    def unbind(self, queue: Queue, exchange: str, routing_key: str, arguments: Headers) -> None:
        """Take a binding away."""
        source = self.exchange(exchange)
        source.unbind(Bound(queue.name, routing_key, copied_headers(arguments)))
        self._drop_if_unused(source)

    def delete_queue(self, queue: Queue) -> None:
        """Delete a queue and its bindings."""
        del self.queues[queue.name]
        self._awake.pop(queue, None)
        self._dying.pop(queue, None)
        for exchange in list(self.exchanges.values()):
            if exchange.forget(queue.name):
                self._drop_if_unused(exchange)
        queue.delete()

    def leave(self, consumer: Consumer) -> None:
        """A consumer goes; with the last one goes a queue that was declared so."""
        queue = consumer.queue
        queue.leave(consumer)
        if queue.auto_delete and not queue.consumers:
            self.delete_queue(queue)

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange; one that is not there is no mistake."""
        _check_prefix("exchange", name)
        self.exchanges.pop(name, None)

    def _drop_if_unused(self, exchange: Exchange) -> None:
        if exchange.auto_delete and not exchange.bindings:
            del self.exchanges[exchange.name]

    # -- how a message gets there --

    def route(self, message: Stored) -> list[Queue]:
        """The queues that a message goes to."""
        if not message.exchange:
            names: Iterable[str] = dict.fromkeys(message.routing_keys)
        else:
            names = self._route_from(self.exchange(message.exchange), message)
        return [self.queues[name] for name in names if name in self.queues]

    def _route_from(self, exchange: Exchange, message: Stored) -> list[str]:
        seen: set[str] = set()
        while True:
            seen.add(exchange.name)
            names = list(exchange.route(message))
            alternate = exchange.alternate
            if names or alternate is None or alternate in seen or alternate not in self.exchanges:
                return names
            exchange = self.exchanges[alternate]

    @staticmethod
    def offer_to_all(queues: Iterable[Queue], message: Stored) -> bool:
        """Offer a message to each queue, even if one refuses; tell whether all took it."""
        refusals = [queue.name for queue in queues if not queue.offer(message)]
        return not refusals

    def received(self, message: Stored) -> Stored:
        """A message from a client, with the deaths that the broker takes its word for."""
        if not self.dialect.reads_client_deaths or "x-death" not in message.headers:
            return message
        return replace(message, deaths=claimed_deaths(message.headers["x-death"]))

    def send_dead_letter(self, queue: Queue, message: Stored, reason: Reason) -> bool:
        """Publish to a queue's dead-letter exchange; tell whether all queues there took it.

        What no queue takes is lost, unless its queue keeps it.
        """
        exchange = queue.spec.dead_letter_exchange
        if exchange is None or (exchange and exchange not in self.exchanges):
            return self._not_buried(queue, message, "no dead-letter exchange")
        letter = dead_letter(
            message,
            queue.name,
            reason,
            exchange,
            queue.spec.dead_letter_routing_key,
            self.now,
            self.dialect,
        )
        targets = self.route(letter)
        if not targets:
            return self._not_buried(queue, message, "dead letter not routable")
        if reason is not Reason.REJECTED:
            straight = [each for each in targets if not goes_in_circles(letter.deaths, each.name)]
            if not straight:
                self.note(EventKind.DROPPED, queue.name, message, "dead letter goes in circles")
                return True
            targets = straight
        if queue.spec.at_least_once and any(each.would_refuse(letter) for each in targets):
            return False
        if not self.offer_to_all(targets, letter):
            self.note(EventKind.DROPPED, queue.name, message, "dead letter refused")
        return True

    def _not_buried(self, queue: Queue, message: Stored, why: str) -> bool:
        if not queue.spec.at_least_once:
            self.note(EventKind.DROPPED, queue.name, message, why)
        return False

    # -- what follows from it --

    def note(self, kind: EventKind, queue: str, message: Stored | None, detail: str = "") -> None:
        """Write into the journal."""
        body = None if message is None else message.body
        self.journal.write(BrokerEvent(self.now, kind, queue, body, detail))

    def wake(self, queue: Queue) -> None:
        """See to it that the queue runs before the current operation ends."""
        self._awake[queue] = None

    def wake_dying(self) -> None:
        """Dead letters that nobody took may find somebody now."""
        self._awake.update(self._dying)

    def run(self) -> None:
        """Do everything that can be done now."""
        while self._awake:
            queue = next(iter(self._awake))
            del self._awake[queue]
            before = len(queue.ready)
            queue.run()
            if queue.dying:
                self._dying[queue] = None
            else:
                self._dying.pop(queue, None)
            if len(queue.ready) < before:
                # It has room again.
                self.wake_dying()

    def fire(self) -> None:
        """Do what is due by now."""
        for queue in list(self.queues.values()):
            gone_at = queue.gone_at
            if gone_at is not None and gone_at <= self.now:
                self.delete_queue(queue)
            elif (deadline := queue.deadline) is not None and deadline <= self.now:
                self.wake(queue)

    def deadline(self) -> float | None:
        """When something happens by itself."""
        return min(
            (at for queue in self.queues.values() if (at := queue.deadline) is not None),
            default=None,
        )


def _check_prefix(what: str, name: str) -> None:
    if name.startswith("amq."):
        raise Refusal(
            ReplyCode.ACCESS_REFUSED, f"{what} name '{name}' contains reserved prefix 'amq.*'"
        )


def _told(flag: bool) -> str:  # noqa: FBT001
    return f"'{str(flag).lower()}'"
