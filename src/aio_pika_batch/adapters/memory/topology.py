"""How does a topology come to be on the broker, and what is said when it cannot?

Each thing on a channel of its own, since a refusal closes the channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.memory.refusals import Refusal
from aio_pika_batch.core.refusals import ReplyCode, refusal_error
from aio_pika_batch.core.topology import (
    Exchange,
    Queue,
    Topology,
    parse_version,
    refuse_lossy_wait_queue,
)

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.connections import Connection


@contextmanager
def explained(entity: str, if_unequal: str | None = None) -> Iterator[None]:
    """Tell refusals of a topology in the port's words."""
    try:
        yield
    except Refusal as refusal:
        raise refusal_error(refusal.code, refusal.text, entity, if_unequal) from refusal


def declare(connection: Connection, topology: Topology) -> None:
    """Declare and check.

    Raises:
        TopologyError: The broker says no.
    """
    for exchange in topology.exchanges:
        with explained(f"exchange {exchange.name!r}"):
            _declare_exchange(connection, exchange)
    for queue in topology.queues:
        refuse_lossy_wait_queue(queue, "RabbitMQ", connection.version)
        with explained(f"queue {queue.name!r}", queue.if_unequal):
            _declare_queue(connection, queue)
    for binding in topology.bindings:
        entity = f"binding of queue {binding.queue!r} to exchange {binding.exchange!r}"
        with explained(entity), connection.channel().operation() as vhost:
            vhost.bind(
                vhost.queue(binding.queue, connection),
                binding.exchange,
                binding.routing_key,
                binding.arguments,
            )


def count(connection: Connection, queue: str) -> int:
    """How many messages are ready in a queue. Raises TopologyError."""
    with explained(f"queue {queue!r}"), connection.channel().operation() as vhost:
        return len(vhost.queue(queue, connection).ready)


def _declare_exchange(connection: Connection, exchange: Exchange) -> None:
    if _must_exist(exchange):
        try:
            with connection.channel().operation() as vhost:
                vhost.exchange(exchange.name)
        except Refusal as refusal:
            if not _may_be_created(exchange, refusal):
                raise
        else:
            return
    with connection.channel().operation() as vhost:
        vhost.declare_exchange(
            exchange.name,
            exchange.type,
            durable=exchange.durable,
            auto_delete=exchange.auto_delete,
            arguments=exchange.arguments,
        )


def _declare_queue(connection: Connection, queue: Queue) -> None:
    if _must_exist(queue):
        try:
            with connection.channel().operation() as vhost:
                vhost.queue(queue.name, connection)
        except Refusal as refusal:
            if not _may_be_created(queue, refusal):
                raise
        else:
            return
    with connection.channel().operation() as vhost:
        vhost.declare_queue(
            queue.name,
            durable=queue.durable,
            exclusive=queue.exclusive,
            auto_delete=queue.auto_delete,
            arguments=queue.arguments_on(parse_version("RabbitMQ", connection.version)),
            asker=connection,
        )


def _must_exist(entity: Exchange | Queue) -> bool:
    return entity.check_only or entity.existing_first


def _may_be_created(entity: Exchange | Queue, refusal: Refusal) -> bool:
    return refusal.code is ReplyCode.NOT_FOUND and not entity.check_only
