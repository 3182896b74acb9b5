"""Holds the exchanges and queues of the virtual host `/`, and moves messages between them.

Everything that a change causes (deliveries, expiries, dead letters that enter other queues) is done
before the operation that made the change ends, so between operations no message is on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

from aio_pika_batch.adapters.memory.exchanges import (
    ExchangeBinding,
    ExchangeType,
    MemoryExchange,
    parse_exchange_type,
)
from aio_pika_batch.adapters.memory.faults import BrokerEvent, EventKind, Journal
from aio_pika_batch.adapters.memory.queue import MemoryQueue, QueueConsumer
from aio_pika_batch.adapters.memory.rabbitmq import (
    QueueType,
    Refusal,
    VersionRules,
    check_same_arguments,
    format_flag,
    inequivalent_argument,
    parse_arguments,
)
from aio_pika_batch.adapters.memory.stored_message import (
    DeathReason,
    StoredMessage,
    check_short_string,
    copy_headers,
    is_dead_letter_cycle,
    make_dead_letter,
    parse_x_death,
)
from aio_pika_batch.core.message import Headers
from aio_pika_batch.core.refusals import ReplyCode

_PREDECLARED = {
    "amq.direct": ExchangeType.DIRECT,
    "amq.fanout": ExchangeType.FANOUT,
    "amq.topic": ExchangeType.TOPIC,
    "amq.headers": ExchangeType.HEADERS,
    "amq.match": ExchangeType.HEADERS,
}


class VirtualHost:
    """Exchanges, queues, and the messages that go from one to another.

    Attributes:
        now: The broker's time.
    """

    def __init__(self, rules: VersionRules, journal: Journal) -> None:
        self.rules = rules
        self.journal = journal
        self.now = 0.0
        self.queues: dict[str, MemoryQueue] = {}
        self.exchanges = {name: MemoryExchange(name, type_) for name, type_ in _PREDECLARED.items()}
        # Ordered sets of the queues that must run, and of those with pending dead letters.
        self._scheduled: dict[MemoryQueue, None] = {}
        self._waiting: dict[MemoryQueue, None] = {}
        # What waits for the end of `dead_letters_last`; None outside of it.
        self._dead_letters: list[tuple[MemoryQueue, StoredMessage, DeathReason]] | None = None
        self._name_numbers = count(1)

    # -- topology --

    def queue(self, name: str, connection: object | None) -> MemoryQueue:
        """Return a queue that the connection may use.

        Raises:
            Refusal: It does not exist, or is another connection's exclusive queue.
        """
        queue = self.queues.get(name)
        if queue is None:
            raise Refusal(ReplyCode.NOT_FOUND, f"no queue '{name}' in vhost '/'")
        if queue.owner is not None and queue.owner is not connection:
            raise _locked(name)
        return queue

    def exchange(self, name: str) -> MemoryExchange:
        """Return an exchange other than the default one.

        Raises:
            Refusal: It does not exist, or is the default exchange.
        """
        if not name:
            raise _default_exchange_refused()
        exchange = self.exchanges.get(name)
        if exchange is None:
            raise Refusal(ReplyCode.NOT_FOUND, f"no exchange '{name}' in vhost '/'")
        return exchange

    def check_publish(self, exchange: str) -> None:
        """Refuse a client's publication to an exchange that is missing or internal."""
        if exchange and self.exchange(exchange).internal:
            raise Refusal(
                ReplyCode.ACCESS_REFUSED,
                f"cannot publish to internal exchange '{exchange}' in vhost '/'",
            )

    def declare_exchange(
        self,
        name: str,
        type_: str,
        *,
        durable: bool,
        auto_delete: bool,
        arguments: Headers,
        internal: bool = False,
    ) -> None:
        """Create an exchange, or check that the existing one is the same."""
        check_short_string("an exchange's name", name)
        exchange_type = parse_exchange_type(type_, self.rules)
        declared = MemoryExchange(
            name, exchange_type, durable, auto_delete, internal, copy_headers(arguments)
        )
        existing = self.exchanges.get(name)
        if existing is not None:
            existing.check_same(declared)
            return
        if not name:
            raise _default_exchange_refused()
        _refuse_reserved_name("exchange", name)
        self.exchanges[name] = declared
        self.retry_dead_letters()

    def declare_queue(
        self,
        name: str,
        *,
        durable: bool,
        exclusive: bool,
        auto_delete: bool,
        arguments: Headers,
        connection: object,
    ) -> MemoryQueue:
        """Create a queue, or check that the existing one is the same.

        Args:
            name: Empty: the broker chooses one.
        """
        check_short_string("a queue's name", name)
        entity = f"queue '{name}'"
        owner = connection if exclusive else None
        existing = self.queues.get(name)
        if existing is not None:
            if existing.owner is not owner:
                raise _locked(name)
            for flag, received in (("durable", durable), ("auto_delete", auto_delete)):
                if received != (current := getattr(existing, flag)):
                    raise inequivalent_argument(
                        flag, entity, format_flag(received), format_flag(current)
                    )
            check_same_arguments(name, arguments, existing.arguments)
            # Declaring it again keeps a queue with x-expires alive.
            existing.unused_since = self.now
            return existing
        spec = parse_arguments(name, arguments, self.rules)
        if spec.type is QueueType.QUORUM:
            for is_wrong, what in (
                (not durable, "non-durable"),
                (exclusive, "exclusive-owner"),
                (auto_delete, "auto-delete"),
            ):
                if is_wrong:
                    raise Refusal(
                        ReplyCode.PRECONDITION_FAILED,
                        f"invalid property '{what}' for {entity} in vhost '/'",
                    )
        # Only now: a queue that the broker has named may be declared again.
        _refuse_reserved_name("queue", name)
        name = name or f"amq.gen-{next(self._name_numbers)}"
        queue = MemoryQueue(
            self,
            name,
            spec,
            copy_headers(arguments),
            durable=durable,
            auto_delete=auto_delete,
            owner=owner,
        )
        self.queues[name] = queue
        self.retry_dead_letters()
        return queue

    def bind(self, queue: MemoryQueue, exchange: str, routing_key: str, arguments: Headers) -> None:
        """Bind a queue to an exchange."""
        check_short_string("a routing key", routing_key)
        binding = ExchangeBinding(queue.name, routing_key, copy_headers(arguments))
        self.exchange(exchange).bind(binding)
        self.retry_dead_letters()

    def unbind(
        self, queue: MemoryQueue, exchange: str, routing_key: str, arguments: Headers
    ) -> None:
        """Remove a binding, if it exists."""
        source = self.exchange(exchange)
        source.unbind(ExchangeBinding(queue.name, routing_key, copy_headers(arguments)))
        self._delete_if_unused(source)

    def delete_queue(self, queue: MemoryQueue) -> None:
        """Delete a queue and its bindings."""
        # First of all: nothing that follows from it may reach the queue or schedule it.
        del self.queues[queue.name]
        self._scheduled.pop(queue, None)
        self._waiting.pop(queue, None)
        for exchange in list(self.exchanges.values()):
            if exchange.unbind_queue(queue.name):
                self._delete_if_unused(exchange)
        queue.delete()

    def delete_exclusive_queues(self, connection: object) -> None:
        """Delete the exclusive queues of a connection."""
        for queue in [each for each in self.queues.values() if each.owner is connection]:
            self.delete_queue(queue)

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange, if it exists."""
        _refuse_reserved_name("exchange", name)
        self.exchanges.pop(name, None)

    def _delete_if_unused(self, exchange: MemoryExchange) -> None:
        if exchange.auto_delete and not exchange.bindings:
            del self.exchanges[exchange.name]

    def remove_consumer(self, consumer: QueueConsumer) -> None:
        """Remove a consumer; an auto-delete queue is deleted with its last one."""
        queue = consumer.queue
        queue.remove_consumer(consumer)
        if queue.auto_delete and not queue.consumers:
            self.delete_queue(queue)

    # -- messages --

    def route(self, message: StoredMessage) -> list[MemoryQueue]:
        """Return the queues that a message goes to."""
        if not message.exchange:
            # The default exchange: a routing key is the name of a queue.
            names: Iterable[str] = dict.fromkeys(message.routing_keys)
        else:
            names = self._route_from(self.exchange(message.exchange), message)
        return [self.queues[name] for name in names if name in self.queues]

    def _route_from(self, exchange: MemoryExchange, message: StoredMessage) -> list[str]:
        seen: set[str] = set()
        while True:
            seen.add(exchange.name)
            names = list(exchange.route(message))
            alternate = exchange.alternate
            if names or alternate is None or alternate in seen or alternate not in self.exchanges:
                return names
            exchange = self.exchanges[alternate]

    @staticmethod
    def offer_to_all(
        queues: Iterable[MemoryQueue], message: StoredMessage, *, is_confirmed: bool = True
    ) -> bool:
        """Offer a message to each queue, even if one refuses it; return whether all stored it."""
        # A list, since all() would stop at the first queue that refuses.
        return all([queue.offer(message, is_confirmed=is_confirmed) for queue in queues])  # noqa: C419

    def with_client_deaths(self, message: StoredMessage) -> StoredMessage:
        """Return a client's message with the deaths that this version believes."""
        if not self.rules.trusts_client_deaths or "x-death" not in message.headers:
            return message
        return replace(message, deaths=parse_x_death(message.headers["x-death"]))

    @contextmanager
    def dead_letters_last(self) -> Iterator[None]:
        """Let classic queues send their dead letters at the end of this context.

        A queue reads what a channel has written together before its own dead letters arrive.
        """
        dead_letters: list[tuple[MemoryQueue, StoredMessage, DeathReason]] = []
        self._dead_letters = dead_letters
        try:
            yield
        finally:
            self._dead_letters = None
            for queue, message, reason in dead_letters:
                self.send_dead_letter(queue, message, reason)

    def send_dead_letter(
        self, queue: MemoryQueue, message: StoredMessage, reason: DeathReason
    ) -> bool:
        """Publish to the queue's dead-letter exchange; return False if the message must be kept.

        A message that no queue takes is dropped, unless its queue is at-least-once.
        """
        if self._dead_letters is not None and queue.spec.type is QueueType.CLASSIC:
            self._dead_letters.append((queue, message, reason))
            return True
        exchange, key = queue.spec.dead_letter_exchange, queue.spec.dead_letter_routing_key
        if exchange is None or (exchange and exchange not in self.exchanges):
            return self._not_sent(queue, message, "no dead-letter exchange")
        dead_letter = make_dead_letter(
            message, queue.name, reason, exchange, key, self.now, self.rules
        )
        targets = self.route(dead_letter)
        if not targets:
            return self._not_sent(queue, message, "dead letter not routable")
        if reason is not DeathReason.REJECTED:
            # A cycle in which no consumer rejects the message would never end.
            targets = [
                each for each in targets if not is_dead_letter_cycle(dead_letter.deaths, each.name)
            ]
            if not targets:
                self.record(EventKind.DROPPED, queue.name, message, "dead-letter cycle")
                return True
        # All targets or none: otherwise the next attempt would duplicate it in some of them.
        if queue.spec.at_least_once and any(each.would_refuse(dead_letter) for each in targets):
            return False
        if not self.offer_to_all(targets, dead_letter, is_confirmed=queue.spec.at_least_once):
            self.record(EventKind.DROPPED, queue.name, message, "dead letter refused")
        return True

    def _not_sent(self, queue: MemoryQueue, message: StoredMessage, reason: str) -> bool:
        if not queue.spec.at_least_once:
            self.record(EventKind.DROPPED, queue.name, message, reason)
        return False

    # -- what follows from a change --

    def record(
        self, kind: EventKind, queue: str, message: StoredMessage | None, detail: str = ""
    ) -> None:
        """Write into the journal."""
        body = None if message is None else message.body
        self.journal.record(BrokerEvent(self.now, kind, queue, body, detail))

    def schedule(self, queue: MemoryQueue) -> None:
        """Let a queue run before the current operation ends."""
        self._scheduled[queue] = None

    def retry_dead_letters(self) -> None:
        """Schedule the queues with pending dead letters: something may take them now."""
        # RabbitMQ tries again after some minutes. Here every change is an occasion, so that tests
        # need not wait.
        self._scheduled.update(self._waiting)

    def run(self) -> None:
        """Run the scheduled queues, and those that they schedule, until none is left."""
        while self._scheduled:
            queue = next(iter(self._scheduled))
            del self._scheduled[queue]
            before = len(queue.ready)
            queue.run()
            if queue.pending_dead_letters:
                self._waiting[queue] = None
            else:
                self._waiting.pop(queue, None)
            if len(queue.ready) < before:
                # It may have room for a dead letter now.
                self.retry_dead_letters()

    def expire(self) -> None:
        """Delete the queues that have expired, and schedule those with expired messages."""
        for queue in list(self.queues.values()):
            expires_at = queue.expires_at
            if expires_at is not None and expires_at <= self.now:
                self.delete_queue(queue)
            elif (deadline := queue.deadline) is not None and deadline <= self.now:
                self.schedule(queue)

    def next_deadline(self) -> float | None:
        """Return when a message or a queue expires next."""
        return min(
            (at for queue in self.queues.values() if (at := queue.deadline) is not None),
            default=None,
        )


def _locked(queue: str) -> Refusal:
    return Refusal(
        ReplyCode.RESOURCE_LOCKED,
        f"cannot obtain exclusive access to locked queue '{queue}' in vhost '/'. It could be"
        " originally declared on another connection or the exclusive property value does not match"
        " that of the original declaration.",
    )


def _default_exchange_refused() -> Refusal:
    return Refusal(ReplyCode.ACCESS_REFUSED, "operation not permitted on the default exchange")


def _refuse_reserved_name(what: str, name: str) -> None:
    if name.startswith("amq."):
        raise Refusal(
            ReplyCode.ACCESS_REFUSED, f"{what} name '{name}' contains reserved prefix 'amq.*'"
        )
